//! Places for requests in flight.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::http::policy::Limits;

/// The places of one Service port, or of one workload.
#[derive(Debug, Default)]
pub struct InFlight {
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    used: usize,
    /// As the last policy said.
    max: usize,
    next_id: u64,
    waiting: VecDeque<(u64, oneshot::Sender<Permit>)>,
}

/// A place; given back on drop. Kept until the answer's body has ended.
#[derive(Debug)]
pub struct Permit {
    /// `None`: there is no limit, so nothing was taken.
    of: Option<Arc<InFlight>>,
}

/// Why a request got no place. Answered with 503 or `UNAVAILABLE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Overload {
    /// As many wait as may.
    #[error("too many requests are waiting")]
    QueueFull,
    /// None became free in time.
    #[error("no request ended within the pending timeout")]
    QueueTimeout,
}

impl InFlight {
    /// No place taken.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Takes a place, or waits for one. Cancel-safe: whoever stops waiting leaves the queue.
    ///
    /// Only limited requests are counted: after a limit is set, those that were let in before it do not
    /// take part.
    pub async fn acquire(self: &Arc<Self>, limits: &Limits) -> Result<Permit, Overload> {
        let Some(max) = limits.max_in_flight else {
            return Ok(Permit { of: None });
        };
        let waiting = {
            let mut places = self.places.lock();
            places.max = max;
            // A higher limit than before has room for some of those that wait.
            let woken = places.take_waiting();
            let waiting = if places.waiting.is_empty() && places.used < max {
                places.used += 1;
                None
            } else if places.waiting.len() >= limits.max_pending {
                drop(places);
                self.hand_over(woken);
                return Err(Overload::QueueFull);
            } else {
                let (sender, receiver) = oneshot::channel();
                let id = places.next_id;
                places.next_id += 1;
                places.waiting.push_back((id, sender));
                Some((id, receiver))
            };
            drop(places);
            self.hand_over(woken);
            waiting
        };
        let Some((id, mut receiver)) = waiting else {
            return Ok(self.permit());
        };
        let _waiting = Waiting { of: self, id };
        match timeout(limits.pending_timeout, &mut receiver).await {
            Ok(Ok(permit)) => Ok(permit),
            // The sender is dropped only with `self`, which is borrowed.
            Ok(Err(_)) => Err(Overload::QueueTimeout),
            // It may have come in the very moment.
            Err(_late) => receiver.try_recv().map_err(|_| Overload::QueueTimeout),
        }
    }

    /// Places taken, and requests waiting for one.
    pub fn used(&self) -> (usize, usize) {
        let places = self.places.lock();
        (places.used, places.waiting.len())
    }

    fn permit(self: &Arc<Self>) -> Permit {
        Permit {
            of: Some(Arc::clone(self)),
        }
    }

    /// Gives places that are already counted to those that waited for them.
    fn hand_over(self: &Arc<Self>, mut woken: Vec<oneshot::Sender<Permit>>) {
        while let Some(sender) = woken.pop() {
            let Err(mut permit) = sender.send(self.permit()) else {
                continue;
            };
            // Gone in the meantime: its place is free again. Not through `drop`, which would nest.
            permit.of = None;
            let mut places = self.places.lock();
            places.used -= 1;
            woken.extend(places.take_waiting());
        }
    }
}

impl Places {
    /// Counts places for those that can have one now.
    fn take_waiting(&mut self) -> Vec<oneshot::Sender<Permit>> {
        let mut woken = Vec::new();
        while self.used < self.max {
            let Some((_, sender)) = self.waiting.pop_front() else {
                break;
            };
            self.used += 1;
            woken.push(sender);
        }
        woken
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(of) = self.of.take() else { return };
        let woken = {
            let mut places = of.places.lock();
            places.used -= 1;
            places.take_waiting()
        };
        of.hand_over(woken);
    }
}

/// A place in the queue.
struct Waiting<'a> {
    of: &'a InFlight,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut places = self.of.places.lock();
        // Ids ascend from front to back.
        let found = places.waiting.binary_search_by_key(&self.id, |(id, _)| *id);
        let left = found.ok().and_then(|index| places.waiting.remove(index));
        drop(places);
        drop(left);
    }
}

#[cfg(test)]
mod tests;
