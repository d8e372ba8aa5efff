//! Single experiments with a connection. Each prints one JSON object and exits with 0 whatever
//! happened: judging is the test's.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use serde_json::{Value, json};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// What the server says who calls, after an echo: {"peer": "..."} or {"error": "..."}
    Who { target: String },
    /// Sends bytes, ends the sending half, then reads the answer: {"answer": "..."}
    HalfClose { target: String, bytes: u64 },
    /// Sends a line and reads: how did it end? {"end": "reset" | "closed" | ...}
    Reset { target: String },
    /// Sends a line, then resets the connection from this side: {"sent": true}
    Abort { target: String },
    /// Asks for bytes, waits before it reads them: {"bytes": n, "correct": bool, "ms": t}
    Blast {
        target: String,
        bytes: u64,
        #[arg(long, default_value_t = 0)]
        pause_ms: u64,
    },
    /// Time from connect to the server's first bytes, `count` times: {"median_us": n, "first": "..."}
    Greeting { target: String, count: usize },
    /// Sends a text, ends the sending half, reads to the end or for 2 s: {"answer": "..."}
    Send { target: String, text: String },
}

const PATIENCE: Duration = Duration::from_secs(20);

fn main() {
    let result = match Args::parse().what {
        What::Who { target } => who(&target),
        What::HalfClose { target, bytes } => half_close(&target, bytes),
        What::Reset { target } => reset(&target),
        What::Abort { target } => abort(&target),
        What::Blast {
            target,
            bytes,
            pause_ms,
        } => blast(&target, bytes, Duration::from_millis(pause_ms)),
        What::Greeting { target, count } => greeting(&target, count),
        What::Send { target, text } => send(&target, &text),
    };
    println!(
        "{}",
        result
            .unwrap_or_else(|e| json!({"error": e.to_string(), "kind": format!("{:?}", e.kind())}))
    );
}

fn connect(target: &str) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::other("no address");
    for address in target.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn who(target: &str) -> std::io::Result<Value> {
    let stream = connect(target)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut greeting = String::new();
    reader.read_line(&mut greeting)?;
    (&stream).write_all(b"hello\n")?;
    let mut echoed = String::new();
    reader.read_line(&mut echoed)?;
    match greeting.trim().strip_prefix("peer ") {
        Some(peer) if echoed == "hello\n" => {
            let ip = peer
                .parse::<std::net::SocketAddr>()
                .map(|a| a.ip().to_string())
                .unwrap_or_default();
            Ok(json!({"peer": peer, "ip": ip}))
        }
        _ => Err(std::io::Error::other(format!(
            "closed early or another server: {greeting:?} {echoed:?}"
        ))),
    }
}

fn half_close(target: &str, bytes: u64) -> std::io::Result<Value> {
    let mut stream = connect(target)?;
    std::io::copy(&mut std::io::repeat(b'x').take(bytes), &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(json!({"answer": answer.trim()}))
}

fn reset(target: &str) -> std::io::Result<Value> {
    let mut stream = connect(target)?;
    stream.write_all(b"reset me\n")?;
    let end = match stream.read(&mut [0; 16]) {
        Ok(0) => "closed".to_owned(),
        Ok(_) => "answered".to_owned(),
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => "reset".to_owned(),
        Err(e) => e.to_string(),
    };
    Ok(json!({"end": end}))
}

fn abort(target: &str) -> std::io::Result<Value> {
    let mut stream = connect(target)?;
    stream.write_all(b"before the reset\n")?;
    let mut answer = [0; 17];
    stream.read_exact(&mut answer)?;
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(json!({"sent": true}))
}

fn blast(target: &str, bytes: u64, pause: Duration) -> std::io::Result<Value> {
    let mut stream = connect(target)?;
    stream.write_all(format!("{bytes}\n").as_bytes())?;
    std::thread::sleep(pause);
    let started = Instant::now();
    let (mut got, mut correct) = (0u64, true);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        // The server repeats blocks of 64 KiB of i % 251.
        correct &= buffer[..n]
            .iter()
            .zip(got..)
            .all(|(b, at)| u64::from(*b) == (at % (64 << 10)) % 251);
        got += n as u64;
    }
    Ok(json!({"bytes": got, "correct": correct, "ms": started.elapsed().as_secs_f64() * 1e3}))
}

fn greeting(target: &str, count: usize) -> std::io::Result<Value> {
    let address = target
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| std::io::Error::other("no address"))?;
    let mut times = Vec::with_capacity(count);
    let mut first = Vec::new();
    for _ in 0..count {
        let started = Instant::now();
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = [0; 256];
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Err(std::io::Error::other("closed without a greeting"));
        }
        times.push(started.elapsed().as_micros() as u64);
        first = buffer[..n].to_vec();
    }
    times.sort_unstable();
    Ok(json!({
        "median_us": times[times.len() / 2],
        "worst_us": times.last(),
        "first": String::from_utf8_lossy(&first),
    }))
}

fn send(target: &str, text: &str) -> std::io::Result<Value> {
    let mut stream = connect(target)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    let end = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break "closed".to_owned(),
            Ok(n) => answer.extend_from_slice(&buffer[..n]),
            Err(e) => break format!("{:?}", e.kind()),
        }
    };
    Ok(json!({"answer": String::from_utf8_lossy(&answer), "end": end}))
}
