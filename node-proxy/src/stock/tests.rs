use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsFd;

use super::*;

thread_local!(static ADVANCED: Cell<Duration> = const { Cell::new(Duration::ZERO) });

/// Moves the stocks' clock of this test's thread.
fn advance(time: Duration) {
    ADVANCED.set(ADVANCED.get() + time);
}

/// A supply in a process with this descriptor limit that has `open` descriptors besides the stocks'.
fn supply(descriptor_limit: usize) -> Arc<Supply> {
    Arc::new(Supply {
        descriptor_limit,
        open: || 0,
        counted: Mutex::default(),
        now: || Instant::now() + ADVANCED.get(),
        stocked: AtomicUsize::new(0),
        wants: Mutex::default(),
        wanted: Notify::new(),
        metrics: Metrics::default(),
    })
}

/// Stand-ins: where nothing is connected, any descriptor will do.
fn sockets(count: usize) -> Vec<OwnedFd> {
    (0..count)
        .map(|_| File::open("/dev/null").unwrap().into())
        .collect()
}

fn stock(supply: &Arc<Supply>, owner: &str) -> Stock {
    Stock::new(Arc::clone(supply), owner.into(), false)
}

async fn take(stock: &Stock) -> Option<OwnedFd> {
    stock
        .take(false, Instant::now() + Duration::from_secs(5))
        .await
}

#[tokio::test]
async fn a_new_stock_asks_for_its_floor_once() {
    let supply = supply(1000);
    let stock = Stock::new(Arc::clone(&supply), "pod".into(), true);
    let mut wants = supply.wants().await;
    wants.sort_by_key(|want| want.v6);
    assert_eq!(
        wants,
        [false, true].map(|v6| Want {
            owner: "pod".into(),
            v6
        })
    );
    assert_eq!(
        (stock.open_request(false), stock.open_request(true)),
        (Some(8), Some(2))
    );
    assert_eq!(stock.open_request(false), None, "one request at a time");
    stock.fill(false, sockets(8));
    assert_eq!((stock.available(false), supply.stocked()), (8, 8));
    assert_eq!(stock.open_request(false), None, "full");
    drop(stock);
    assert_eq!(supply.stocked(), 0);
}

#[tokio::test]
async fn a_stock_below_half_asks_for_thirty_seconds_of_its_consumption() {
    let supply = supply(100_000);
    let stock = stock(&supply, "pod");
    stock.open_request(false);
    stock.fill(false, sockets(8));
    supply.wants().await;
    // Ten a second for a minute: the average settles there.
    for _ in 0..600 {
        if let Some(count) = stock.open_request(false) {
            stock.fill(false, sockets(count as usize));
        }
        take(&stock).await.unwrap();
        advance(Duration::from_millis(100));
    }
    while let Some(count) = stock.open_request(false) {
        assert!(count as usize <= MAX_FDS);
        stock.fill(false, sockets(count as usize));
    }
    let available = stock.available(false);
    assert!(
        (145..=330).contains(&available),
        "{available} sockets for 10/s"
    );
    // Unused, they are closed again, but for the floor.
    advance(Duration::from_secs(300));
    stock.tick();
    assert_eq!(
        (stock.available(false), supply.stocked()),
        (FLOOR_V4, FLOOR_V4)
    );
}

#[tokio::test]
async fn an_empty_stock_waits_for_sockets_until_the_deadline() {
    let supply = supply(1000);
    let stock = Arc::new(stock(&supply, "pod"));
    let deadline = Instant::now() + Duration::from_millis(50);
    assert!(stock.take(false, deadline).await.is_none());
    assert!(Instant::now() >= deadline);

    let takers: Vec<_> = (0..20)
        .map(|_| {
            let stock = Arc::clone(&stock);
            tokio::spawn(async move { take(&stock).await.is_some() })
        })
        .collect();
    tokio::task::yield_now().await;
    // All that wait, and the floor.
    assert_eq!(stock.open_request(false), Some(28));
    stock.fill(false, sockets(12));
    // The answer fell short: the rest is asked for again.
    assert_eq!(supply.wants().await.len(), 1);
    tokio::task::yield_now().await;
    assert!(stock.open_request(false).is_some_and(|count| count >= 8));
    stock.fill(false, sockets(12));
    for taker in takers {
        assert!(taker.await.unwrap());
    }
}

#[tokio::test]
async fn a_refused_request_is_made_again_at_the_next_tick_only() {
    let supply = supply(1000);
    let stock = stock(&supply, "pod");
    supply.wants().await;
    stock.open_request(false).unwrap();
    stock.fill(false, vec![]);
    assert!(supply.wants.lock().is_empty());
    stock.tick();
    assert_eq!(supply.wants().await.len(), 1);
    assert_eq!(stock.open_request(false), Some(8));
    // The connection is lost with the request.
    stock.forget_requests();
    assert_eq!(supply.wants().await.len(), 1);
    assert_eq!(stock.open_request(false), Some(8));
}

#[tokio::test]
async fn all_stocks_together_are_bounded_but_each_gets_its_floor() {
    let supply = supply(400);
    let (busy, quiet) = (stock(&supply, "busy"), stock(&supply, "quiet"));
    for _ in 0..50 {
        while let Some(count) = busy.open_request(false) {
            busy.fill(false, sockets(count as usize));
        }
        for _ in 0..busy.available(false).min(20) {
            take(&busy).await.unwrap();
        }
        assert!(
            supply.stocked() <= 100,
            "{} of 400 descriptors",
            supply.stocked()
        );
    }
    while let Some(count) = busy.open_request(false) {
        busy.fill(false, sockets(count as usize));
    }
    assert_eq!(supply.stocked(), 100, "a quarter");
    assert_eq!(quiet.open_request(false), Some(8));
}

#[tokio::test]
async fn short_connections_go_round_with_the_same_sockets() {
    use socket2::{Domain, Socket, Type};

    let supply = supply(10_000);
    let stock = stock(&supply, "pod");
    let mut asked = 0;
    // Bursts of 20, a hundred a second, for a minute.
    for _ in 0..300 {
        let mut burst = Vec::new();
        while burst.len() < 20 {
            if stock.available(false) == 0 {
                // A taker that waits.
                let _waiting = Waiting::new(&stock.v4);
                let count = stock.open_request(false).unwrap();
                let made = || {
                    Socket::new(Domain::IPV4, Type::STREAM, None)
                        .unwrap()
                        .into()
                };
                stock.fill(false, (0..count).map(|_| made()).collect());
                asked += count;
            }
            burst.push(take(&stock).await.unwrap());
        }
        advance(Duration::from_millis(200));
        burst
            .into_iter()
            .for_each(|socket| stock.give_back(socket, false));
    }
    // Most of them while the averages settle.
    assert!(asked < 400, "{asked} sockets for 6000 connections");
    advance(Duration::from_secs(120));
    stock.tick();
    assert_eq!(
        (stock.available(false), supply.stocked()),
        (FLOOR_V4, FLOOR_V4)
    );
}

#[tokio::test]
async fn a_socket_that_comes_back_has_nothing_of_its_last_connection() {
    let supply = supply(1000);
    let stock = stock(&supply, "pod");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let socket = socket2::SockRef::from(&client);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    crate::tcp::bound_buffers(socket).unwrap();
    assert!(recycle::sys::are_buffers_locked(client.as_fd()));
    // Both sides finish, the other one first.
    server.shutdown(std::net::Shutdown::Write).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    std::io::Read::read_to_end(&mut server, &mut Vec::new()).unwrap();
    stock.give_back(client.into(), false);
    // The last acknowledgement may be under way.
    while stock.available(false) == 0 {
        stock.tick();
        tokio::task::yield_now().await;
    }
    let back = take(&stock).await.unwrap();
    assert_eq!(socket2::SockRef::from(&back).linger().unwrap(), None);
    assert!(!recycle::sys::are_buffers_locked(back.as_fd()));
}

#[tokio::test]
async fn what_is_not_a_finished_connection_is_closed() {
    let supply = supply(1000);
    let stock = stock(&supply, "pod");
    for socket in sockets(1) {
        stock.give_back(socket, false);
    }
    // One whose peer is still there.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    std::io::Write::write_all(&mut client, b"last words").unwrap();
    stock.give_back(client.into(), false);
    assert_eq!(stock.available(false), 0);
    let mut heard = String::new();
    std::io::Read::read_to_string(&mut server, &mut heard).unwrap();
    assert_eq!(heard, "last words", "closed, not reset");
}
