//! Recycling of sockets as the agent makes them, between two network namespaces: bound to an address that
//! is on no interface, connected, used, given back, and bound and connected again. Needs root.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::time::Instant;
use warren_node_proxy::stock::{Metrics, Stock, Supply};

const PEER: Ipv4Addr = Ipv4Addr::new(10, 254, 77, 2);
const FOREIGN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);

/// Two namespaces with a link; `here` takes packets to any address as its own.
struct Namespaces {
    here: String,
    there: String,
}

impl Namespaces {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make network namespaces: run them as root"
        );
        let name = |side: &str| format!("warren-stock-{}-{side}", std::process::id());
        let made = Self {
            here: name("a"),
            there: name("b"),
        };
        let (a, b) = (&made.here, &made.there);
        ip(&format!("netns add {a}"));
        ip(&format!("netns add {b}"));
        ip(&format!(
            "-n {a} link add veth0 type veth peer name veth0 netns {b}"
        ));
        for (name, address) in [(a, "10.254.77.1/24"), (b, "10.254.77.2/24")] {
            ip(&format!("-n {name} link set lo up"));
            ip(&format!("-n {name} link set veth0 up"));
            ip(&format!("-n {name} address add {address} dev veth0"));
        }
        ip(&format!("-n {b} route add 192.0.2.0/24 via 10.254.77.1"));
        ip(&format!("-n {a} route add local default dev lo table 100"));
        ip(&format!("-n {a} rule add iif veth0 lookup 100"));
        made
    }

    /// Changes what `there` hears.
    fn deafen(&self, rules: &str) {
        let status = Command::new("ip")
            .args(["netns", "exec", &self.there, "nft", rules])
            .status()
            .unwrap();
        assert!(status.success(), "nft {rules}");
    }

    /// Runs `with` on a thread inside a namespace.
    fn inside<T: Send + 'static>(name: &str, with: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = File::open(format!("/run/netns/{name}")).unwrap();
        let thread = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            with()
        });
        thread.join().unwrap()
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in [&self.here, &self.there] {
            // Whatever is left is seen in the next run's error.
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// As the agent makes them (mesh-api/proto/broker.proto, NeedSockets).
fn agents_socket() -> OwnedFd {
    let socket = Socket::new(
        Domain::IPV4,
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )
    .unwrap();
    socket.set_ip_transparent_v4(true).unwrap();
    socket.set_mark(0x77).unwrap();
    nix::sys::socket::setsockopt(
        &socket,
        nix::sys::socket::sockopt::IpBindAddressNoPort,
        &true,
    )
    .unwrap();
    socket.into()
}

/// Binds to the foreign address and connects, as deliveries do.
fn connect(socket: OwnedFd, port: u16) -> TcpStream {
    let socket = Socket::from(socket);
    socket.set_nonblocking(false).unwrap();
    socket.bind(&SocketAddr::from((FOREIGN, 0)).into()).unwrap();
    socket
        .connect_timeout(
            &SocketAddr::from((PEER, port)).into(),
            Duration::from_secs(5),
        )
        .unwrap();
    socket.into()
}

fn echo(client: &mut TcpStream, server: &mut TcpStream) {
    assert_eq!(server.peer_addr().unwrap().ip(), FOREIGN);
    client.write_all(b"ping").unwrap();
    let mut heard = [0; 4];
    server.read_exact(&mut heard).unwrap();
    server.write_all(&heard).unwrap();
    client.read_exact(&mut heard).unwrap();
}

/// The last acknowledgement may still be under way. A socket in state CLOSE has no peer.
fn until_closed(client: &TcpStream) {
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while client.peer_addr().is_ok() {
        assert!(
            std::time::Instant::now() < deadline,
            "the connection does not end"
        );
        std::thread::yield_now();
    }
}

#[test]
fn a_used_socket_is_bound_and_connected_again_however_its_connection_ended() {
    let namespaces = Namespaces::new();
    let listener = Namespaces::inside(&namespaces.there, || TcpListener::bind((PEER, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let made = Namespaces::inside(&namespaces.here, agents_socket);
    let again = SockRef::from(&made).try_clone().unwrap();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let supply = Supply::new(1000, Metrics::default());
        let stock = Stock::new(Arc::clone(&supply), "pod".into(), false);
        stock.open_request(false).unwrap();
        stock.fill(false, vec![made]);
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut used_ports = Vec::new();
        type End = fn(&mut TcpStream, TcpStream);
        let ends: [(&str, End); 4] = [
            ("the app closes first", |client, server| {
                drop(server);
                assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
                client.shutdown(std::net::Shutdown::Write).unwrap();
            }),
            ("the proxy closes first", |client, mut server| {
                client.shutdown(std::net::Shutdown::Write).unwrap();
                assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
                drop(server);
                assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
            }),
            ("the app resets", |client, server| {
                SockRef::from(&server)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
                drop(server);
                let error = client.read(&mut [0; 1]).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            }),
            (
                "the app resets with data unread and a linger of zero on our side",
                |client, mut server| {
                    server.write_all(b"unread").unwrap();
                    SockRef::from(&*client)
                        .set_linger(Some(Duration::ZERO))
                        .unwrap();
                    SockRef::from(&server)
                        .set_linger(Some(Duration::ZERO))
                        .unwrap();
                    drop(server);
                    client
                        .write_all(b"x")
                        .and_then(|()| client.write_all(b"x"))
                        .unwrap_err();
                },
            ),
        ];
        // Twice, so that each follows each.
        for (end, finish) in ends.iter().chain(&ends) {
            let socket = stock
                .take(false, deadline)
                .await
                .unwrap_or_else(|| panic!("kept before: {end}"));
            let mut client = connect(socket, port);
            let (mut server, _) = listener.accept().unwrap();
            echo(&mut client, &mut server);
            used_ports.push(client.local_addr().unwrap().port());
            finish(&mut client, server);
            until_closed(&client);
            stock.give_back(client.into(), false);
            assert_eq!(stock.available(false), 1, "{end}");
            assert!(again.take_error().unwrap().is_none(), "{end}");
            assert_eq!(again.linger().unwrap(), None, "{end}");
        }
        // It was one socket all along, with what the agent set.
        assert_eq!(again.mark().unwrap(), 0x77);
        assert!(again.ip_transparent_v4().unwrap());
        assert_eq!(used_ports.len(), 8);

        // The last acknowledgement is late: the socket comes back with it.
        let mut client = connect(stock.take(false, deadline).await.unwrap(), port);
        let (mut server, _) = listener.accept().unwrap();
        echo(&mut client, &mut server);
        drop(server);
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        namespaces.deafen(
            "add table inet deaf; add chain inet deaf wall { type filter hook input priority 0; policy drop; }",
        );
        client.shutdown(std::net::Shutdown::Write).unwrap();
        stock.give_back(client.into(), false);
        assert_eq!(stock.available(false), 0);
        stock.tick();
        assert_eq!(stock.available(false), 0);
        namespaces.deafen("delete table inet deaf");
        let retransmitted = std::time::Instant::now() + Duration::from_secs(10);
        while stock.available(false) == 0 {
            assert!(
                std::time::Instant::now() < retransmitted,
                "the socket does not come back"
            );
            std::thread::yield_now();
            stock.tick();
        }

        // A refused connect leaves a socket that is as good.
        let socket = Socket::from(stock.take(false, deadline).await.unwrap());
        socket.bind(&SocketAddr::from((FOREIGN, 0)).into()).unwrap();
        let refused =
            socket.connect_timeout(&SocketAddr::from((PEER, 1)).into(), Duration::from_secs(5));
        assert_eq!(
            refused.unwrap_err().kind(),
            std::io::ErrorKind::ConnectionRefused
        );
        stock.give_back(socket.into(), false);
        assert_eq!(stock.available(false), 1);

        // One that is still connected is closed instead.
        let client = connect(stock.take(false, deadline).await.unwrap(), port);
        let (_server, _) = listener.accept().unwrap();
        stock.give_back(client.into(), false);
        assert_eq!(stock.available(false), 0);
    });
}
