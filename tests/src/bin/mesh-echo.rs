//! The server of the tests: one behaviour a port (see the constants in `warren_tests::manifest`), IPv4
//! and IPv6, optionally spread over several processes because of the descriptor limit.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use clap::Parser;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy};
use tokio::net::{TcpListener, TcpStream};
use warren_tests::manifest::{BLAST, COUNT, ECHO, RESET, WHO};

#[derive(Clone, Parser)]
struct Args {
    /// Print a line for every connection
    #[arg(long)]
    log: bool,
    /// Added to every port
    #[arg(long, default_value_t = 0)]
    offset: u16,
    /// Processes that share the ports
    #[arg(long, default_value_t = 1)]
    processes: u32,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    // The children end with this process: their standard input closes.
    let mut children = Vec::new();
    for _ in 1..args.processes {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command
            .args(["--offset", &args.offset.to_string()])
            .args(args.log.then_some("--log"));
        children.push(
            command
                .env(CHILD, "1")
                .stdin(std::process::Stdio::piped())
                .spawn()?,
        );
    }
    if std::env::var_os(CHILD).is_some() {
        std::thread::spawn(|| {
            let _ = std::io::Read::read(&mut std::io::stdin(), &mut [0]);
            std::process::exit(0);
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(args))
}

const CHILD: &str = "MESH_ECHO_CHILD";

async fn serve(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let mut listeners = Vec::new();
    for port in [ECHO, WHO, COUNT, RESET, BLAST] {
        listeners.push((port, listen(port + args.offset)?));
    }
    println!("listening");
    for (port, listener) in listeners {
        let log = args.log;
        tokio::task::spawn_local(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, peer)) => {
                        tokio::task::spawn_local(connection(port, stream, peer, log));
                    }
                    // Out of descriptors, most likely: the next one may do.
                    Err(e) => {
                        eprintln!("accept on {port}: {e}");
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            }
        });
    }
    std::future::pending().await
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(4096)?;
    TcpListener::from_std(socket.into())
}

async fn connection(port: u16, stream: TcpStream, peer: SocketAddr, log: bool) {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    if log {
        println!("port {port} accepted {peer}");
    }
    let result = match port {
        WHO => who(stream, peer).await,
        COUNT => count(stream).await,
        RESET => reset(stream).await,
        BLAST => blast(stream).await,
        _ => echo(stream).await,
    };
    if log {
        match result {
            Ok(()) => println!("port {port} ended {peer}"),
            Err(e) => println!("port {port} broke {peer}: {:?}", e.kind()),
        }
    }
}

async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut read, mut write) = stream.split();
    // Small: a test holds thousands of these.
    let mut buffer = [0; 1024];
    loop {
        let n = read.read(&mut buffer).await?;
        if n == 0 {
            return write.shutdown().await;
        }
        write.write_all(&buffer[..n]).await?;
    }
}

async fn who(mut stream: TcpStream, peer: SocketAddr) -> std::io::Result<()> {
    stream
        .write_all(format!("peer {peer}\n").as_bytes())
        .await?;
    echo(stream).await
}

async fn count(mut stream: TcpStream) -> std::io::Result<()> {
    let bytes = copy(&mut stream, &mut tokio::io::sink()).await?;
    stream
        .write_all(format!("{bytes} bytes\n").as_bytes())
        .await?;
    stream.shutdown().await
}

async fn reset(stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    reader.read_line(&mut String::new()).await?;
    socket2::SockRef::from(&reader.into_inner()).set_linger(Some(Duration::ZERO))
}

async fn blast(stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).await?;
    let mut left: u64 = line.trim().parse().map_err(std::io::Error::other)?;
    let mut stream = reader.into_inner();
    let block: Vec<u8> = (0..64 << 10).map(|i| (i % 251) as u8).collect();
    while left > 0 {
        let n = left.min(block.len() as u64) as usize;
        stream.write_all(&block[..n]).await?;
        left -= n as u64;
    }
    stream.shutdown().await
}
