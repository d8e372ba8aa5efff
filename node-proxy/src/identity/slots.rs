//! A bounded number of signing requests at one time; identities without a certificate go first.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

pub(super) struct Slots {
    state: Mutex<State>,
}

struct State {
    free: usize,
    first_time: VecDeque<oneshot::Sender<Slot>>,
    renewals: VecDeque<oneshot::Sender<Slot>>,
}

/// The right to one request. Passed on when dropped.
pub(super) struct Slot(Arc<Slots>);

impl Slots {
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                free: count,
                first_time: VecDeque::new(),
                renewals: VecDeque::new(),
            }),
        })
    }

    pub(super) async fn take(self: &Arc<Self>, first_time: bool) -> Slot {
        loop {
            let turn = {
                let mut state = self.state.lock();
                if state.free > 0 {
                    state.free -= 1;
                    return Slot(Arc::clone(self));
                }
                let (sender, turn) = oneshot::channel();
                let queue = if first_time {
                    &mut state.first_time
                } else {
                    &mut state.renewals
                };
                // Those that gave up waiting.
                queue.retain(|waiting| !waiting.is_closed());
                queue.push_back(sender);
                turn
            };
            if let Ok(slot) = turn.await {
                return slot;
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let next = {
            let mut state = self.0.state.lock();
            let next = state
                .first_time
                .pop_front()
                .or_else(|| state.renewals.pop_front());
            if next.is_none() {
                state.free += 1;
            }
            next
        };
        if let Some(next) = next {
            // If nobody waits there any more the slot comes back and is dropped, which goes on with
            // the next in the queue.
            let _ = next.send(Slot(Arc::clone(&self.0)));
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn first_requests_overtake_renewals() {
        let slots = Slots::new(1);
        let held = slots.take(false).await;
        let mut renewal = Box::pin(slots.take(false));
        let mut first = Box::pin(slots.take(true));
        assert!(renewal.as_mut().now_or_never().is_none());
        assert!(first.as_mut().now_or_never().is_none());
        drop(held);
        assert!(renewal.as_mut().now_or_never().is_none());
        let held = first.await;
        drop(held);
        renewal.await;
    }

    #[tokio::test]
    async fn a_slot_is_not_lost_with_who_waited_for_it() {
        let slots = Slots::new(1);
        let held = slots.take(true).await;
        let mut waiting = Box::pin(slots.take(true));
        assert!(waiting.as_mut().now_or_never().is_none());
        let mut other = Box::pin(slots.take(false));
        assert!(other.as_mut().now_or_never().is_none());
        drop(waiting);
        drop(held);
        drop(other);
        assert!(slots.take(false).now_or_never().is_some());
    }
}
