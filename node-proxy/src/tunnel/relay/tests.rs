use std::sync::Arc;

use http::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::budget::{Account, Limits, Resource};
use crate::tcp::tests::fill;
use crate::tunnel::{CONNECTION_WINDOW, MAX_FRAME, SEND_BUFFER, STREAM_WINDOW};

/// A connected pair: (the app's end, the proxy's end).
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    (app, listener.accept().await.unwrap().0)
}

type Ends = (SendStream<Bytes>, RecvStream);

/// The two ends of one stream of a tunnel whose transport is in memory.
async fn stream() -> (Ends, Ends) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let client = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake::<_, Bytes>(near);
    let server = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake::<_, Bytes>(far);
    let (client, server) = tokio::join!(client, server);
    let (mut send, connection) = client.unwrap();
    let mut server = server.unwrap();
    tokio::spawn(async move { connection.await.unwrap() });
    let (response, out) = send.send_request(Request::new(()), false).unwrap();
    let (request, mut respond) = server.accept().await.unwrap().unwrap();
    let back = respond.send_response(Response::new(()), false).unwrap();
    tokio::spawn(async move { while server.accept().await.is_some() {} });
    let near = (out, response.await.unwrap().into_body());
    // The sender keeps the connection open for as long as the stream.
    tokio::spawn(async move {
        let _send = send;
        std::future::pending::<()>().await;
    });
    (near, (back, request.into_body()))
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

async fn run(
    mut socket: TcpStream,
    ends: Ends,
    account: Arc<Account>,
) -> (Result<(), Broken>, u64, u64) {
    let (mut send, mut receive) = ends;
    let (up, down) = (Meter::default(), Meter::default());
    let buffered = [
        account.open_charge(Resource::BufferedBytes),
        account.open_charge(Resource::BufferedBytes),
    ];
    let result = relay(&mut socket, &mut send, &mut receive, &up, &down, buffered).await;
    (result, up.get(), down.get())
}

#[tokio::test]
async fn bytes_and_half_close_cross_the_tunnel() {
    let (mut client, caller) = pair().await;
    let (mut server, callee) = pair().await;
    let (near, far) = stream().await;
    let account = account(64 << 20);
    let block = vec![42u8; 3 << 20];
    let talking = async {
        client.write_all(&block).await.unwrap();
        client.shutdown().await.unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).await.unwrap();
        back
    };
    let echoing = async {
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).await.unwrap();
        server.write_all(&heard).await.unwrap();
        server.shutdown().await.unwrap();
    };
    let (back, (), near, far) = tokio::join!(
        talking,
        echoing,
        run(caller, near, Arc::clone(&account)),
        run(callee, far, Arc::clone(&account)),
    );
    assert!(back == block);
    near.0.unwrap();
    far.0.unwrap();
    assert_eq!(
        (near.1, near.2, far.1, far.2),
        (3 << 20, 3 << 20, 3 << 20, 3 << 20)
    );
    assert_eq!(account.used(Resource::BufferedBytes), 0);
}

#[tokio::test]
async fn a_reset_crosses_the_tunnel() {
    let (client, caller) = pair().await;
    let (mut server, callee) = pair().await;
    let (near, far) = stream().await;
    let account = account(64 << 20);
    reset_on_close(&client);
    drop(client);
    let (near, far) = tokio::join!(
        run(caller, near, Arc::clone(&account)),
        run(callee, far, account)
    );
    assert!(matches!(near.0, Err(Broken::Io(_))), "{near:?}");
    assert!(matches!(far.0, Err(Broken::Stream)), "{far:?}");
    assert_eq!(
        server.read(&mut [0; 8]).await.unwrap_err().kind(),
        io::ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn a_callee_that_does_not_read_is_held_to_its_budget() {
    let (mut client, caller) = pair().await;
    let (server, callee) = pair().await;
    let (near, far) = stream().await;
    let generous = account(64 << 20);
    let tight = account(100 * 1024);
    let flooding = async {
        let block = vec![7u8; 1 << 20];
        let mut total = 0usize;
        // Ends by the reset; the bound is for a relay that would swallow everything.
        while let Ok(n) = client.write(&block).await {
            total += n;
            assert!(total < 256 << 20, "no limit");
        }
    };
    let (near, far, ()) = tokio::join!(
        run(caller, near, generous),
        run(callee, far, Arc::clone(&tight)),
        flooding
    );
    assert!(matches!(far.0, Err(Broken::Limit(_))), "{far:?}");
    assert!(near.0.is_err());
    assert_eq!(tight.refused(Resource::BufferedBytes), 1);
    assert_eq!(tight.used(Resource::BufferedBytes), 0);
    drop(server);
}

#[tokio::test]
async fn a_reset_crosses_the_tunnel_while_the_receiver_takes_nothing() {
    let (client, caller) = pair().await;
    let (_server, callee) = pair().await;
    let (near, far) = stream().await;
    let account = account(64 << 20);
    let leaving = async {
        fill(&client).await;
        reset_on_close(&client);
        drop(client);
    };
    let (near, far, ()) = tokio::join!(
        run(caller, near, Arc::clone(&account)),
        run(callee, far, Arc::clone(&account)),
        leaving
    );
    assert!(matches!(near.0, Err(Broken::Io(_))), "{near:?}");
    assert!(matches!(far.0, Err(Broken::Stream)), "{far:?}");
    assert_eq!(account.used(Resource::BufferedBytes), 0);
}
