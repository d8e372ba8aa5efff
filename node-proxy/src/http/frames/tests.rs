use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

const PING: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
const PONG: &[u8] = PING;
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
const WINDOW_UPDATE: &[u8] = &[0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const EMPTY_DATA: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 1];
const PRIORITY: &[u8] = &[0, 0, 5, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 1];
const UNKNOWN: &[u8] = &[0, 0, 0, 0xbe, 0, 0, 0, 0, 0];
const REQUEST: &[u8] = &[0, 0, 1, 1, 5, 0, 0, 0, 1, 0x82];
/// A gRPC message without content.
const MESSAGE: &[u8] = &[0, 0, 5, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0];

/// A client, and the proxy's end of its connection.
struct Wire {
    client: DuplexStream,
    proxy: Frames<DuplexStream>,
}

impl Wire {
    async fn new() -> Self {
        let (mut client, proxy) = duplex(64 * 1024);
        client.write_all(&[0; PREFACE]).await.unwrap();
        let mut wire = Self {
            client,
            proxy: Frames::of_client(proxy, Arc::default()),
        };
        wire.proxy.read_exact(&mut [0; PREFACE]).await.unwrap();
        wire
    }

    /// What becomes of a frame that the client sends.
    async fn send(&mut self, frame: &[u8]) -> Result<(), Abuse> {
        self.client.write_all(frame).await.unwrap();
        let read = self.proxy.read_exact(&mut vec![0; frame.len()]).await;
        read.map(|_| ()).map_err(abuse)
    }

    async fn answer(&mut self, frame: &[u8]) {
        self.proxy.write_all(frame).await.unwrap();
        self.client
            .read_exact(&mut vec![0; frame.len()])
            .await
            .unwrap();
    }
}

fn abuse(error: io::Error) -> Abuse {
    *error.get_ref().unwrap().downcast_ref().unwrap()
}

/// How many of the frames pass, each followed by that answer.
async fn pass(frame: &[u8], answer: &[u8], most: usize) -> usize {
    let mut wire = Wire::new().await;
    for sent in 0..most {
        if wire.send(frame).await.is_err() {
            return sent;
        }
        wire.answer(answer).await;
    }
    most
}

#[tokio::test(start_paused = true)]
async fn floods_end() {
    for (name, frame, answer) in [
        ("PING", PING, PONG),
        ("SETTINGS", SETTINGS, SETTINGS),
        ("WINDOW_UPDATE", WINDOW_UPDATE, b""),
        ("empty DATA", EMPTY_DATA, b""),
        ("PRIORITY", PRIORITY, b""),
        ("of an unknown type", UNKNOWN, b""),
    ] {
        let passed = pass(frame, answer, 20_000).await;
        assert!((3_000..12_000).contains(&passed), "{name}: {passed}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_real_clients_send_passes() {
    let many = 100_000;
    // A PING for every message of a stream, and for every answer to a request.
    let mut wire = Wire::new().await;
    for _ in 0..many {
        wire.answer(MESSAGE).await;
        wire.send(PING).await.unwrap();
        wire.answer(PONG).await;
    }
    // Window for every 16 KiB, twice: of the stream and of the connection.
    let mut wire = Wire::new().await;
    for _ in 0..2_000 {
        wire.answer(&[0; 16 * 1024]).await;
        wire.send(WINDOW_UPDATE).await.unwrap();
        wire.send(WINDOW_UPDATE).await.unwrap();
    }
    // Requests that are each reset, with a PRIORITY before and a window behind.
    let mut wire = Wire::new().await;
    for _ in 0..many {
        for frame in [PRIORITY, REQUEST, WINDOW_UPDATE] {
            wire.send(frame).await.unwrap();
        }
    }
    // Keepalive, for a month.
    let mut wire = Wire::new().await;
    for _ in 0..260_000 {
        tokio::time::advance(Duration::from_secs(10)).await;
        wire.send(PING).await.unwrap();
        wire.answer(PONG).await;
    }
}

#[tokio::test]
async fn streams_are_counted_once() {
    let mut wire = Wire::new().await;
    let mut trailers = REQUEST.to_vec();
    for stream in [1, 3, 7] {
        trailers[8] = stream;
        wire.send(&trailers).await.unwrap();
        // Trailers, and a stream that is closed.
        wire.send(&trailers).await.unwrap();
        wire.send(REQUEST).await.unwrap();
    }
    assert_eq!(wire.proxy.seen.streams(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_nothing_has_gone() {
    let (client, proxy) = duplex(1000);
    let mut proxy = Frames::of_client(proxy, Arc::default());
    let began = Instant::now();
    let error = proxy.write_all(&[0; 2000]).await.unwrap_err();
    assert_eq!(abuse(error), Abuse::Stalled);
    assert_eq!(began.elapsed().as_secs(), STALL.as_secs());
    drop(client);

    // One that takes a little now and then has not.
    let (mut client, proxy) = duplex(1000);
    let mut proxy = Frames::of_client(proxy, Arc::default());
    let reading = async {
        for _ in 0..4 {
            tokio::time::sleep(STALL - Duration::from_secs(1)).await;
            client.read_exact(&mut [0; 500]).await.unwrap();
        }
    };
    let (written, ()) = tokio::join!(proxy.write_all(&[0; 3000]), reading);
    written.unwrap();
}
