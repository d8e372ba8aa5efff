//! A Service port that something else points to, by name: whoever holds the pointer sees the port as
//! it is now, also when its Service comes later, changes, or goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwapOption;

use super::ServicePort;

/// A named Service port. Reading it takes no lock.
#[derive(Default)]
pub struct Target {
    port: ArcSwapOption<ServicePort>,
    absent: AtomicBool,
}

/// What is known of a named Service port.
#[derive(Debug, Clone)]
pub enum TargetState {
    /// It exists.
    Known(Arc<ServicePort>),
    /// It has been asked for.
    Pending,
    /// There is no such Service, or it does not declare the port.
    Absent,
}

/// Without the port: its routes may point back here.
impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("known", &self.port.load().is_some())
            .field("absent", &self.absent)
            .finish()
    }
}

impl Target {
    /// What is known now.
    pub fn state(&self) -> TargetState {
        if let Some(port) = self.port.load_full() {
            return TargetState::Known(port);
        }
        match self.absent.load(Ordering::Acquire) {
            true => TargetState::Absent,
            false => TargetState::Pending,
        }
    }

    /// Whether the state is [`TargetState::Absent`], without touching the port's reference count.
    pub fn is_absent(&self) -> bool {
        self.absent.load(Ordering::Acquire) && self.port.load().is_none()
    }

    #[cfg(test)]
    pub(crate) fn set_absent(&self) {
        self.set(None, true);
    }

    pub(super) fn set(&self, port: Option<Arc<ServicePort>>, absent: bool) {
        self.absent
            .store(absent && port.is_none(), Ordering::Release);
        self.port.store(port);
    }
}
