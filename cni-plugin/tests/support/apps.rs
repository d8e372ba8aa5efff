//! Apps in pods: threads that have entered the pod's namespace.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use super::Sandbox;

/// Runs `work` on a thread inside the pod.
pub fn inside<T: Send + 'static>(pod: &Sandbox, work: impl FnOnce() -> T + Send + 'static) -> T {
    let file = std::fs::File::open(&pod.path).unwrap();
    let thread = std::thread::spawn(move || {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        work()
    });
    thread.join().unwrap()
}

/// Greets each caller with the address it sees, then echoes lines.
pub fn serve(pod: &Sandbox, port: u16) {
    let listener = inside(pod, move || {
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap()
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || -> std::io::Result<()> {
                let caller = stream.peer_addr()?.ip().to_canonical();
                writeln!(stream, "{caller}")?;
                let mut lines = BufReader::new(stream.try_clone()?).lines();
                while let Some(line) = lines.next().transpose()? {
                    writeln!(stream, "echo {line}")?;
                }
                Ok(())
            });
        }
    });
}

/// Greets each caller, and ends the connection first.
pub fn greet(pod: &Sandbox, port: u16) {
    let listener = inside(pod, move || {
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap()
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let caller = stream.peer_addr().unwrap().ip().to_canonical();
            writeln!(stream, "{caller}").unwrap();
        }
    });
}

/// Answers datagrams with the port they came to.
pub fn serve_udp(pod: &Sandbox, port: u16) {
    let socket = inside(pod, move || {
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap()
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

pub fn udp_echoes(pod: &Sandbox, to: SocketAddr) -> bool {
    inside(pod, move || {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => "0.0.0.0".parse().unwrap(),
            SocketAddr::V6(_) => "::".parse().unwrap(),
        };
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        socket.send_to(b"datagram", to).unwrap();
        let mut buffer = [0; 64];
        socket
            .recv(&mut buffer)
            .is_ok_and(|length| &buffer[..length] == b"datagram")
    })
}

/// A connection to an app.
pub struct Call {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
    /// The caller's address as the app sees it.
    pub seen: IpAddr,
}

impl Call {
    pub fn open(pod: &Sandbox, to: SocketAddr) -> std::io::Result<Self> {
        Self::open_from(pod, to, None)
    }

    /// From a given source port.
    pub fn open_from(
        pod: &Sandbox,
        to: SocketAddr,
        from: Option<SocketAddr>,
    ) -> std::io::Result<Self> {
        let stream = inside(pod, move || -> std::io::Result<TcpStream> {
            use socket2::{Domain, Socket, Type};
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            if let Some(from) = from {
                socket.bind(&from.into())?;
            }
            socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
            Ok(socket.into())
        })?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let seen = line
            .trim()
            .parse()
            .map_err(|_| std::io::Error::other(format!("greeted with {line:?}")))?;
        Ok(Self {
            stream,
            reader,
            seen,
        })
    }

    /// Waits for the other end to end it, which it does first.
    pub fn ends(mut self) -> bool {
        self.reader.read_to_end(&mut Vec::new()).is_ok()
    }

    pub fn works(&mut self) -> bool {
        let mut line = String::new();
        writeln!(self.stream, "hello").is_ok()
            && self.reader.read_line(&mut line).is_ok()
            && line == "echo hello\n"
    }
}
