//! From a client's connect to the first byte of the answer, through the proxy's own way from listener to
//! app: accept, original destination, table, socket from the stock, connect, copy.
//!
//! Client, proxy thread and app share loopback of a network namespace of their own, with a redirect as in a
//! pod's. Making one needs root; without, the bench says so and passes.

mod fixture;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use criterion::Criterion;
use futures::future::BoxFuture;
use mesh_api::identity::Identity;
use socket2::{Domain, Protocol, Socket, Type};
use warren_node_proxy::budget::Limits;
use warren_node_proxy::connections::Connections;
use warren_node_proxy::identity::{Identities, IssueError, Issuer};
use warren_node_proxy::pods::{Host, Pod, PodInfo, Pods};
use warren_node_proxy::stock::{Metrics, Supply};
use warren_node_proxy::table::{Kind, Table};
use warren_node_proxy::telemetry::Telemetry;
use warren_node_proxy::telemetry::access_log::{AccessLog, Format};
use warren_node_proxy::tunnel::tls::ServerConfigs;
use warren_node_proxy::worker::{Context, PodListeners, Workers};

fn main() {
    if std::env::var_os(INSIDE).is_none() {
        return reenter();
    }
    let app = start_app();
    let _proxy = start_proxy();
    // Long enough for the stock of sockets to reach the level of this rate.
    let criterion = Criterion::default().warm_up_time(Duration::from_secs(5));
    let mut criterion = criterion.configure_from_args();
    criterion.bench_function("accept to first byte/direct", |b| {
        b.iter(|| round_trip(app))
    });
    let captured = SocketAddr::new(app.ip(), CAPTURED);
    criterion.bench_function("accept to first byte/through the proxy", |b| {
        b.iter(|| round_trip(captured));
    });
    criterion.final_summary();
}

/// Runs this program again in a namespace of its own: `CAPTURED` is redirected to the proxy, whose own
/// connections, told by their mark, are sent to the app.
fn reenter() {
    let script = format!(
        "ip link set lo up && sysctl -qw net.ipv4.ip_local_port_range='2000 65000' && nft '\
         add table ip bench; add chain ip bench output {{ type nat hook output priority -100; }}; \
         add rule ip bench output tcp dport {CAPTURED} meta mark {MARK} redirect to :{APP}; \
         add rule ip bench output tcp dport {CAPTURED} redirect to :{OUTBOUND}' && exec \"$@\""
    );
    let this = std::env::current_exe().expect("a running program has a name");
    let unshare = |command: &[&str]| {
        let mut unshare = Command::new("unshare");
        unshare.arg("--net").args(command);
        unshare
    };
    if !unshare(&["true"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return println!("skipped: a network namespace needs root");
    }
    let status = unshare(&["bash", "-c", &script, "bash"])
        .arg(this)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .status()
        .expect("unshare was there a moment ago");
    assert!(status.success(), "the bench inside the namespace: {status}");
}

fn round_trip(target: SocketAddr) {
    let mut stream = TcpStream::connect(target).expect("connects");
    stream
        .set_read_timeout(Some(STALLED))
        .expect("a time above 0");
    stream.write_all(b"?").expect("writes");
    let mut answer = [0];
    stream.read_exact(&mut answer).expect("reads");
}

fn start_app() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", APP)).expect("the namespace is new");
    let address = listener.local_addr().expect("is bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accepts");
            let mut byte = [0];
            // A client that is gone is the next one's turn.
            let _ = stream
                .read_exact(&mut byte)
                .and_then(|()| stream.write_all(&byte));
        }
    });
    address
}

/// One worker that serves one pod, whose address is the loopback's.
fn start_proxy() -> Arc<Workers> {
    let table = Table::new("node-1");
    fixture::fill(
        &table,
        Kind::MeshConfig,
        vec![("mesh".into(), fixture::mesh_config())],
    );
    for kind in Kind::ALL {
        table.complete(kind.type_url());
    }
    let telemetry = Telemetry::new();
    let supply = Supply::new(10_000, Metrics::default());
    let info = PodInfo {
        namespace: "bench".into(),
        name: "client".into(),
        service_account: "client".into(),
        owner: "client".into(),
        addresses: vec![[127, 0, 0, 1].into()],
        strict: false,
        exclude_inbound_ports: Vec::new(),
        exclude_outbound_ports: Vec::new(),
        exclude_outbound_cidrs: Vec::new(),
        probes: Vec::new(),
        zone: "".into(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime starts");
    let pods = Pods::new();
    let keys = std::env::temp_dir().join(format!("warren-bench-{}", std::process::id()));
    let (identities, pod) = runtime.block_on(async {
        let identities = Identities::new(&keys, Arc::new(NoIssuer), Arc::new(SystemTime::now));
        let identity = Identity::new("cluster.local", "bench", "client").expect("valid names");
        let limits = Limits::default().resolved(10_000);
        let pod = Pod::new(
            "client".into(),
            info,
            identity,
            &identities,
            &supply,
            &limits,
        );
        (identities, pod)
    });
    let context = Context {
        node: "node-1".into(),
        table,
        identities,
        host: Host::new(&supply),
        pods,
        access_log: AccessLog::start(Format::Off, Arc::clone(&telemetry))
            .expect("off needs nothing"),
        telemetry,
        server_configs: ServerConfigs::default(),
        connections: Arc::new(Connections::default()),
    };
    let workers = Workers::start(1, context).expect("a thread starts");
    let listen =
        |port| OwnedFd::from(TcpListener::bind(("127.0.0.1", port)).expect("the namespace is new"));
    let listeners = PodListeners {
        outbound: listen(OUTBOUND),
        inbound: listen(15006),
        hbone: listen(15008),
    };
    workers.add_pod(Arc::clone(&pod), listeners);
    std::thread::spawn(move || runtime.block_on(hand_out_sockets(&supply, &pod)));
    workers
}

/// The broker's part: fills the stock whenever it runs low.
async fn hand_out_sockets(supply: &Supply, pod: &Pod) {
    loop {
        for want in supply.wants().await {
            if !want.owner.is_empty() && !want.v6 {
                let count = pod.stock.open_request(false).unwrap_or(0);
                pod.stock
                    .fill(false, (0..count).map(|_| marked_socket()).collect());
            }
        }
    }
}

fn marked_socket() -> OwnedFd {
    let socket = Socket::new(
        Domain::IPV4,
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )
    .expect("a socket");
    socket.set_mark(MARK).expect("root may set a mark");
    socket.into()
}

/// The pod speaks to nobody in the mesh, so it needs no certificate.
struct NoIssuer;

impl Issuer for NoIssuer {
    fn reachable(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    fn issue(&self, _: &Identity, _: Vec<u8>) -> BoxFuture<'_, Result<Vec<Vec<u8>>, IssueError>> {
        Box::pin(std::future::pending())
    }
}

const STALLED: Duration = Duration::from_secs(10);
const INSIDE: &str = "WARREN_BENCH_INSIDE";
const CAPTURED: u16 = 8080;
const APP: u16 = 9090;
const OUTBOUND: u16 = 15001;
const MARK: u32 = 0x77;
