use std::future::pending;
use std::time::Duration;

use tokio::sync::Notify;

use super::*;
use crate::stock::{self, Supply};
use crate::testing;

/// One thread, without pods.
fn workers() -> (Arc<Workers>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let supply = Supply::new(10_000, stock::Metrics::default());
    let context = testing::context(testing::identities(directory.path()), &supply);
    (Workers::start(1, context).unwrap(), directory)
}

#[tokio::test]
async fn a_drain_waits_for_streams_that_a_tunnel_brings_before_its_end() {
    let (workers, _directory) = workers();
    let worker = Arc::clone(&workers.workers[0]);
    let (begin, end) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (began, ended) = (Arc::clone(&begin), Arc::clone(&end));
    let streams = Arc::clone(&worker);
    worker.spawn_tunnel(async move {
        began.notified().await;
        streams.spawn(async move { ended.notified().await });
    });

    // A day, so that only its end ends it.
    let mut drain = Box::pin(workers.drain(Instant::now() + Duration::from_secs(86_400)));
    assert!(
        futures::poll!(&mut drain).is_pending(),
        "the tunnel is there"
    );
    begin.notify_one();
    workers.sources.wait().await;
    assert!(
        futures::poll!(&mut drain).is_pending(),
        "its stream is there"
    );
    end.notify_one();
    drain.await;
    assert_eq!(workers.live(), 0);
}

#[tokio::test]
async fn a_thread_with_little_to_do_has_short_slices() {
    let (workers, _directory) = workers();
    let (told, tells) = tokio::sync::oneshot::channel();
    workers.workers[0].spawn(async {
        while slices::tests::has_short() == Some(false) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        told.send(()).unwrap();
    });
    let told = tokio::time::timeout(Duration::from_secs(60), tells).await;
    told.expect("it asks for them").unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_at_its_deadline() {
    let (workers, _directory) = workers();
    workers.workers[0].spawn(pending());
    let deadline = Instant::now() + Duration::from_secs(60);
    workers.drain(deadline).await;
    assert!(Instant::now() >= deadline);
    assert_eq!(workers.live(), 1);
}
