//! When which node has taken a change.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::harness::Error;

/// A resource of the mesh: its type, and its number in the plan.
pub(super) type Key = (&'static str, usize);

/// Whether a resource's content (`None`: it was removed) is what is waited for.
pub(super) type Wanted = Box<dyn Fn(Option<&[u8]>) -> bool + Send>;

/// The changes that are waited for. Every node tells what it takes.
#[derive(Default)]
pub(super) struct Watches(Mutex<Vec<(usize, Key, Arc<Watch>)>>);

/// One change that is waited for. Ends when dropped.
pub(super) struct Watching<'a> {
    watches: &'a Watches,
    id: usize,
    watch: Arc<Watch>,
    what: String,
}

struct Watch {
    since: Instant,
    wanted: Mutex<Wanted>,
    /// By node.
    taken: Mutex<BTreeMap<usize, Duration>>,
    more: Notify,
}

impl Watches {
    pub(super) fn start(&self, key: Key, what: String, wanted: Wanted) -> Watching<'_> {
        let watch = Arc::new(Watch {
            since: Instant::now(),
            wanted: Mutex::new(wanted),
            taken: Mutex::default(),
            more: Notify::new(),
        });
        let mut all = self.0.lock();
        let id = all.iter().map(|(id, ..)| id + 1).max().unwrap_or(0);
        all.push((id, key, watch.clone()));
        Watching {
            watches: self,
            id,
            watch,
            what,
        }
    }

    /// A node has taken a resource.
    pub(super) fn taken(&self, node: usize, key: Key, content: Option<&[u8]>) {
        for (_, of, watch) in self.0.lock().iter() {
            if *of == key && (watch.wanted.lock())(content) {
                let after = watch.since.elapsed();
                watch.taken.lock().entry(node).or_insert(after);
                watch.more.notify_one();
            }
        }
    }
}

impl Watching<'_> {
    /// Waits until exactly these nodes have it: when each of them had.
    pub(super) async fn all(
        self,
        nodes: &[usize],
        limit: Duration,
    ) -> Result<Vec<Duration>, Error> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let more = self.watch.more.notified();
            {
                let taken = self.watch.taken.lock();
                if let Some(stranger) = taken.keys().find(|n| nodes.binary_search(n).is_err()) {
                    return Err(Error::Other(format!(
                        "{}: node {stranger} was sent it and has no use for it",
                        self.what
                    )));
                }
                if taken.len() == nodes.len() {
                    return Ok(taken.values().copied().collect());
                }
            }
            if tokio::time::timeout_at(deadline, more).await.is_err() {
                let taken = self.watch.taken.lock().len();
                return Err(Error::Other(format!(
                    "{}: after {limit:?} only {taken} of {} nodes have it",
                    self.what,
                    nodes.len()
                )));
            }
        }
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.watches.0.lock().retain(|(id, ..)| *id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = ("type", 3);
    const SOON: Duration = Duration::from_millis(50);

    fn is_yes() -> Wanted {
        Box::new(|content| content == Some(b"yes"))
    }

    #[tokio::test]
    async fn waits_for_the_content_at_every_node() {
        let watches = Watches::default();
        let watching = watches.start(KEY, "x".into(), is_yes());
        watches.taken(1, KEY, Some(b"yes"));
        watches.taken(2, KEY, Some(b"no"));
        watches.taken(2, ("type", 4), Some(b"yes"));
        let error = watching
            .all(&[1, 2], SOON)
            .await
            .expect_err("node 2 has another");
        assert!(error.to_string().contains("only 1 of 2"), "{error}");

        let watching = watches.start(KEY, "x".into(), is_yes());
        watches.taken(1, KEY, Some(b"yes"));
        watches.taken(2, KEY, Some(b"yes"));
        assert_eq!(
            watching.all(&[1, 2], SOON).await.map(|t| t.len()).ok(),
            Some(2)
        );
        assert!(
            watches.0.lock().is_empty(),
            "a watch that ended is forgotten"
        );
    }

    #[tokio::test]
    async fn a_node_that_has_no_use_for_it_is_a_mistake() {
        let watches = Watches::default();
        let watching = watches.start(KEY, "x".into(), is_yes());
        watches.taken(7, KEY, Some(b"yes"));
        assert!(watching.all(&[1], SOON).await.is_err());
    }
}
