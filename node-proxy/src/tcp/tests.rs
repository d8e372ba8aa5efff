use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::budget::{Account, Limits, Resource};

/// A connected pair: (the app's end, the proxy's end).
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    (app, listener.accept().await.unwrap().0)
}

fn account(buffered_bytes: usize) -> Arc<Account> {
    Account::new(
        "demo".into(),
        "web".into(),
        &Limits {
            buffered_bytes,
            ..Limits::default()
        },
    )
}

fn charges(account: &Arc<Account>) -> [Charge; 2] {
    [
        account.open_charge(Resource::BufferedBytes),
        account.open_charge(Resource::BufferedBytes),
    ]
}

#[tokio::test]
async fn half_close_lets_the_answer_through() {
    let (mut client, mut a) = pair().await;
    let (mut server, mut b) = pair().await;
    let (sent, received) = (
        Meter::new(Default::default()),
        Meter::new(Default::default()),
    );
    let account = account(1 << 20);
    let relaying = async {
        relay(&mut a, &mut b, &sent, &received, charges(&account))
            .await
            .unwrap()
    };
    let talking = async {
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = String::new();
        server.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "question");
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        heard.clear();
        client.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "answer");
    };
    tokio::join!(relaying, talking);
    assert_eq!((sent.get(), received.get()), (8, 6));
}

#[tokio::test]
async fn a_reset_is_passed_on_as_a_reset() {
    let (client, mut a) = pair().await;
    let (mut server, mut b) = pair().await;
    let account = account(1 << 20);
    reset_on_close(&client);
    drop(client);
    let broken = relay(
        &mut a,
        &mut b,
        &Meter::default(),
        &Meter::default(),
        charges(&account),
    )
    .await;
    assert!(matches!(broken, Err(Broken::Io(_))));
    drop((a, b));
    let error = server.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_receiver_that_does_not_read_stops_the_sender_and_is_charged() {
    let (mut client, mut a) = pair().await;
    let (mut server, mut b) = pair().await;
    let account = account(1 << 20);
    let (sent, received) = (
        Meter::new(Default::default()),
        Meter::new(Default::default()),
    );
    let mut relaying = Box::pin(relay(&mut a, &mut b, &sent, &received, charges(&account)));
    // Bounded by the kernel's buffers: the write must stall long before 256 MiB.
    let block = vec![7u8; 1 << 20];
    let mut total = 0u64;
    let stalled = loop {
        tokio::select! {
            biased;
            r = &mut relaying => panic!("relay ended: {r:?}"),
            n = client.write(&block) => total += n.unwrap() as u64,
            () = tokio::time::sleep(Duration::from_millis(300)) => break true,
        }
        assert!(total < 256 << 20, "no back-pressure");
    };
    assert!(stalled);
    assert!(account.used(Resource::BufferedBytes) <= CHUNK);
    // Everything arrives once the receiver reads.
    client.shutdown().await.unwrap();
    server.shutdown().await.unwrap();
    let reading = async {
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).await.unwrap();
        heard.len() as u64
    };
    let (ended, heard) = tokio::join!(relaying, reading);
    ended.unwrap();
    assert_eq!((heard, sent.get()), (total, total));
    assert_eq!(account.used(Resource::BufferedBytes), 0);
}

/// Writes until nothing more is taken: the kernel's buffers are full, and so is who reads.
pub(crate) async fn fill(socket: &TcpStream) {
    const QUIET: Duration = Duration::from_millis(300);
    let block = [7; 64 * 1024];
    let mut total = 0;
    while tokio::time::timeout(QUIET, socket.writable()).await.is_ok() {
        total += write_some(socket, &block).unwrap();
        assert!(total < 256 << 20, "no back-pressure");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_reset_is_noticed_while_the_receiver_takes_nothing() {
    let (client, mut a) = pair().await;
    let (mut server, mut b) = pair().await;
    let account = account(1 << 20);
    let relaying = async {
        let (sent, received) = (Meter::default(), Meter::default());
        relay(&mut a, &mut b, &sent, &received, charges(&account)).await
    };
    let leaving = async {
        fill(&client).await;
        reset_on_close(&client);
        drop(client);
    };
    let (broken, ()) = tokio::join!(relaying, leaving);
    assert!(matches!(broken, Err(Broken::Io(_))), "{broken:?}");
    drop((a, b));
    let mut heard = Vec::new();
    let error = server.read_to_end(&mut heard).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}
