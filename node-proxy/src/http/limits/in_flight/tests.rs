use std::time::{Duration, Instant};

use futures::FutureExt;

use super::*;

fn limits(max_in_flight: usize, max_pending: usize) -> Limits {
    Limits {
        max_in_flight: Some(max_in_flight),
        max_pending,
        pending_timeout: Duration::from_secs(60),
    }
}

#[tokio::test]
async fn without_a_limit_nothing_is_counted() {
    let places = InFlight::new();
    let _permit = places.acquire(&Limits::default()).await.unwrap();
    assert_eq!(places.used(), (0, 0));
}

#[tokio::test]
async fn a_full_queue_fails_at_once_and_a_long_wait_after_the_timeout() {
    let places = InFlight::new();
    let limits = Limits {
        pending_timeout: Duration::from_millis(20),
        ..limits(1, 1)
    };
    let first = places.acquire(&limits).await.unwrap();
    let start = Instant::now();
    let (waited, refused) = tokio::join!(places.acquire(&limits), async {
        tokio::task::yield_now().await;
        places.acquire(&limits).now_or_never()
    });
    assert_eq!(refused.expect("at once").unwrap_err(), Overload::QueueFull);
    assert_eq!(waited.unwrap_err(), Overload::QueueTimeout);
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert_eq!(places.used(), (1, 0));
    drop(first);
    assert_eq!(places.used(), (0, 0));
}

#[tokio::test]
async fn first_come_first_served() {
    let places = InFlight::new();
    let limits = limits(1, 10);
    let first = places.acquire(&limits).await.unwrap();
    let mut second = Box::pin(places.acquire(&limits));
    let mut third = Box::pin(places.acquire(&limits));
    assert!((&mut second).now_or_never().is_none());
    assert!((&mut third).now_or_never().is_none());
    drop(first);
    // A newcomer does not overtake.
    let mut fourth = Box::pin(places.acquire(&limits));
    assert!((&mut fourth).now_or_never().is_none());
    assert!((&mut third).now_or_never().is_none());
    let second = second.now_or_never().expect("its turn").unwrap();
    drop(second);
    let third = third.now_or_never().expect("its turn").unwrap();
    assert!((&mut fourth).now_or_never().is_none());
    drop(third);
    assert!(fourth.now_or_never().is_some());
}

#[tokio::test]
async fn whoever_stops_waiting_leaves_the_queue_and_its_place() {
    let places = InFlight::new();
    let limits = limits(1, 2);
    let first = places.acquire(&limits).await.unwrap();
    let mut second = Box::pin(places.acquire(&limits));
    let mut third = Box::pin(places.acquire(&limits));
    assert!((&mut second).now_or_never().is_none());
    assert!((&mut third).now_or_never().is_none());
    drop(second);
    assert_eq!(places.used(), (1, 1));
    // Given the place, but gone before it could take it: the next one gets it.
    let mut fourth = Box::pin(places.acquire(&limits));
    assert!((&mut fourth).now_or_never().is_none());
    drop(first);
    assert_eq!(places.used(), (1, 1));
    drop(third);
    assert_eq!(places.used(), (1, 0));
    let permit = fourth.now_or_never().expect("handed on").unwrap();
    drop(permit);
    assert_eq!(places.used(), (0, 0));
}

#[tokio::test]
async fn a_higher_limit_lets_those_in_that_wait() {
    let places = InFlight::new();
    let _first = places.acquire(&limits(1, 10)).await.unwrap();
    let low = limits(1, 10);
    let mut second = Box::pin(places.acquire(&low));
    assert!((&mut second).now_or_never().is_none());
    let third = places.acquire(&limits(3, 10)).now_or_never();
    assert!(third.expect("there is room").is_ok());
    assert!(second.now_or_never().is_some());
}

#[tokio::test]
async fn a_lower_limit_holds_from_the_next_request_on() {
    let places = InFlight::new();
    let held: Vec<_> = [
        places.acquire(&limits(3, 10)).await.unwrap(),
        places.acquire(&limits(3, 10)).await.unwrap(),
        places.acquire(&limits(3, 10)).await.unwrap(),
    ]
    .into();
    let low = limits(1, 10);
    let mut next = Box::pin(places.acquire(&low));
    assert!((&mut next).now_or_never().is_none());
    let mut held = held.into_iter();
    drop(held.next());
    drop(held.next());
    assert!(
        (&mut next).now_or_never().is_none(),
        "one is still in flight"
    );
    drop(held.next());
    assert!((&mut next).now_or_never().is_some());
    drop(next);
    assert_eq!(places.used(), (0, 0));
}

#[tokio::test]
async fn many_threads_never_exceed_the_limit() {
    let places = InFlight::new();
    let peak = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (places, peak) = (Arc::clone(&places), Arc::clone(&peak));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_time()
                    .build()
                    .unwrap();
                runtime.block_on(async {
                    for _ in 0..500 {
                        let limits = limits(2, 10);
                        let permit = places.acquire(&limits).await.unwrap();
                        peak.fetch_max(places.used().0, std::sync::atomic::Ordering::Relaxed);
                        drop(permit);
                    }
                });
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(peak.load(std::sync::atomic::Ordering::Relaxed) <= 2);
    assert_eq!(places.used(), (0, 0));
}
