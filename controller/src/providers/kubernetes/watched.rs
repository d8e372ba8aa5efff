//! A list and a watch, kept up through everything that ends a watch.
//!
//! The library begins anew where a watch says that its version has expired (410), but tries a watch that is refused with
//! that answer again as it is, for ever. The API's concepts allow both; here both end in a new list.

use std::fmt::Debug;
use std::time::Duration;

use futures::stream::{self, Stream, StreamExt};
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Error, Event};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

/// Never ends. A failure is told, and followed by a rest.
pub(crate) fn watched<K>(
    api: Api<K>,
    config: watcher::Config,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    K::DynamicType: Send,
{
    let begin = move || watcher::watcher(api.clone(), config.clone()).boxed();
    let events = stream::unfold((begin(), begin), |(mut watch, begin)| async move {
        let event = watch.next().await?;
        if is_refused_as_expired(&event) {
            watch = begin();
        }
        Some((event, (watch, begin)))
    });
    events.backoff(Retry::default())
}

fn is_refused_as_expired<T>(event: &watcher::Result<T>) -> bool {
    matches!(event, Err(Error::WatchStartFailed(kube::Error::Api(status))) if status.code == 410)
}

/// How long a failed watch rests: doubled from failure to failure, from the start after a minute without.
#[derive(Debug, Default)]
struct Retry {
    last: Option<(Instant, Duration)>,
}

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let rest = match self.last {
            Some((at, rest)) if now < at + CALM => (rest * 2).min(LONGEST_REST),
            _ => SHORTEST_REST,
        };
        self.last = Some((now, rest));
        // Half of it by chance, so that replicas and kinds do not come all at once.
        Some(rest.mul_f64(rand::random_range(0.5..1.0)))
    }
}

impl Backoff for Retry {
    // A list that is about to be tried counts as success: time decides instead.
    fn reset(&mut self) {}
}

const SHORTEST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(5);
const CALM: Duration = Duration::from_secs(60);
