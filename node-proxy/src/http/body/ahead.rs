//! What an HTTP/2 body brought before it was asked for.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use mesh_api::errors::ProxyError;

use crate::budget::{Account, Charge, Resource};

/// Data smaller than this is copied: kept as it came, it would keep the whole buffer it was read into.
const COPY_BELOW: usize = 4096;
/// What a piece takes beside its bytes.
const PIECE: usize = size_of::<Bytes>();

/// Data in its order, charged until it is taken.
#[derive(Debug)]
pub(super) struct Ahead {
    data: VecDeque<Bytes>,
    failed: Option<h2::Error>,
    charge: Charge,
}

impl Ahead {
    pub(super) fn new(account: &Arc<Account>) -> Self {
        Self {
            data: VecDeque::new(),
            failed: None,
            charge: account.open_charge(Resource::BufferedBytes),
        }
    }

    /// Keeps what came, `None` the end. An error: the account has no room for it.
    pub(super) fn put(&mut self, came: Option<Result<Bytes, h2::Error>>) -> Result<(), ProxyError> {
        match came {
            None => Ok(()),
            Some(Err(error)) => {
                self.failed = Some(error);
                Ok(())
            }
            Some(Ok(data)) => {
                let charged = self.charge.add(data.len() + PIECE);
                let small = data.len() < COPY_BELOW;
                self.data.push_back(if small {
                    Bytes::copy_from_slice(&data)
                } else {
                    data
                });
                charged
            }
        }
    }

    /// The next data, or what came instead.
    pub(super) fn next(&mut self) -> Option<Result<Bytes, h2::Error>> {
        match self.data.pop_front() {
            Some(data) => {
                self.charge.release(data.len() + PIECE);
                Some(Ok(data))
            }
            None => self.failed.take().map(Err),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.data.is_empty() && self.failed.is_none()
    }
}
