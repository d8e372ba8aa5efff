//! Probes, as a kubelet makes them: from the node's namespace, so the pod sees its node's bridge address.
//!
//! While a startup probe has not succeeded, the others wait. Times and thresholds are Kubernetes' defaults.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, ExecAction, GRPCAction, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::launch::Launch;
use super::{grpc_health, netns, processes};

/// What a pod's probes need to know.
pub(crate) struct Target {
    pub(crate) container: Container,
    /// The pod's first address.
    pub(crate) address: IpAddr,
    /// Where probes come from.
    pub(crate) node_netns: PathBuf,
    /// For `exec`: a process like the container's, with another command.
    pub(crate) exec: Launch,
}

impl Target {
    /// Probes for as long as the container runs: tells when it becomes ready or not, and returns, with the
    /// reason, when it must be killed.
    pub(crate) async fn watch(&self, ready: impl Fn(bool, String)) -> String {
        let Container {
            startup_probe,
            readiness_probe,
            liveness_probe,
            ..
        } = &self.container;
        if let Some(probe) = startup_probe {
            ready(false, "waits for its startup probe".into());
            if let Err(reason) = self.started(probe).await {
                return format!("startup probe: {reason}");
            }
        }
        let readiness = async {
            match readiness_probe {
                Some(probe) => self.readiness(probe, &ready).await,
                None => {
                    // A command that cannot work ends at once, and must not have been ready.
                    tokio::time::sleep(SHOWS_LIFE).await;
                    ready(true, String::new());
                    std::future::pending().await
                }
            }
        };
        let liveness = async {
            match liveness_probe {
                Some(probe) => self.liveness(probe).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            never = readiness => never,
            reason = liveness => format!("liveness probe: {reason}"),
        }
    }

    async fn started(&self, probe: &Probe) -> Result<(), String> {
        let times = Times::of(probe);
        tokio::time::sleep(times.initial_delay).await;
        let mut failures = 0;
        loop {
            match self.attempt(probe, times.timeout).await {
                Ok(()) => return Ok(()),
                Err(reason) => failures = count(failures, times.failures, reason)?,
            }
            tokio::time::sleep(times.period).await;
        }
    }

    async fn readiness<T>(&self, probe: &Probe, ready: &impl Fn(bool, String)) -> T {
        let times = Times::of(probe);
        ready(false, "waits for its readiness probe".into());
        tokio::time::sleep(times.initial_delay).await;
        let (mut successes, mut failures) = (0, 0);
        let mut pause = FIRST_PERIOD.min(times.period);
        let mut is_ready = false;
        loop {
            match self.attempt(probe, times.timeout).await {
                Ok(()) => {
                    (successes, failures) = (successes + 1, 0);
                    if successes >= times.successes && !is_ready {
                        is_ready = true;
                        ready(true, String::new());
                    }
                }
                Err(reason) => {
                    (successes, failures) = (0, failures + 1);
                    if !is_ready {
                        ready(false, format!("readiness probe: {reason}"));
                    } else if failures >= times.failures {
                        is_ready = false;
                        ready(false, format!("readiness probe: {reason}"));
                    }
                }
            }
            // More often until it is ready for the first time, so that `up` returns soon.
            if is_ready {
                pause = times.period;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(times.period);
        }
    }

    async fn liveness(&self, probe: &Probe) -> String {
        let times = Times::of(probe);
        tokio::time::sleep(times.initial_delay).await;
        let mut failures = 0;
        loop {
            match self.attempt(probe, times.timeout).await {
                Ok(()) => failures = 0,
                Err(reason) => match count(failures, times.failures, reason) {
                    Ok(so_far) => failures = so_far,
                    Err(reason) => return reason,
                },
            }
            tokio::time::sleep(times.period).await;
        }
    }

    async fn attempt(&self, probe: &Probe, limit: Duration) -> Result<(), String> {
        let attempt = async {
            if let Some(http) = &probe.http_get {
                self.http(http).await
            } else if let Some(tcp) = &probe.tcp_socket {
                let to = self.address_of(tcp.host.as_deref(), &tcp.port)?;
                self.connect(to).await.map(drop)
            } else if let Some(grpc) = &probe.grpc {
                self.grpc(grpc).await
            } else if let Some(exec) = &probe.exec {
                self.exec(exec, limit).await
            } else {
                Ok(())
            }
        };
        let limited = tokio::time::timeout(limit, attempt).await;
        limited.unwrap_or_else(|_| Err(format!("no answer in {limit:?}")))
    }

    async fn http(&self, http: &HTTPGetAction) -> Result<(), String> {
        let to = self.address_of(http.host.as_deref(), &http.port)?;
        let path = http
            .path
            .as_deref()
            .filter(|p| !p.is_empty())
            .unwrap_or("/");
        let slash = if path.starts_with('/') { "" } else { "/" };
        let mut headers = String::new();
        let mut host = to.to_string();
        for header in http.http_headers.iter().flatten() {
            if header.name.eq_ignore_ascii_case("host") {
                host = header.value.clone();
            } else {
                headers += &format!("{}: {}\r\n", header.name, header.value);
            }
        }
        let request = format!(
            "GET {slash}{path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-probe/1.36\r\n\
             Accept: */*\r\n{headers}Connection: close\r\n\r\n"
        );
        let mut stream = self.connect(to).await?;
        let talk = async {
            stream.write_all(request.as_bytes()).await?;
            let mut head = [0; 12]; // HTTP/1.1 200
            stream.read_exact(&mut head).await?;
            // Read on, so that closing does not reset what the app still writes.
            let mut rest = Vec::new();
            stream.take(MAX_BODY).read_to_end(&mut rest).await?;
            Ok::<_, io::Error>(head)
        };
        let head = talk.await.map_err(|e| format!("GET {path}: {e}"))?;
        let status = std::str::from_utf8(&head[9..])
            .ok()
            .and_then(|s| s.parse::<u16>().ok());
        match status {
            Some(200..400) => Ok(()),
            Some(status) => Err(format!("GET {path}: status {status}")),
            None => Err(format!("GET {path}: not an HTTP answer")),
        }
    }

    async fn grpc(&self, grpc: &GRPCAction) -> Result<(), String> {
        let to = self.address_of(None, &IntOrString::Int(grpc.port))?;
        let stream = self.connect(to).await?;
        let service = grpc.service.as_deref().unwrap_or_default();
        grpc_health::check(stream, &to.to_string(), service).await
    }

    async fn exec(&self, exec: &ExecAction, limit: Duration) -> Result<(), String> {
        let argv = exec.command.clone().unwrap_or_default();
        let launch = Launch {
            argv,
            ..self.exec.clone()
        };
        let done = processes::run(&launch, "", limit)
            .await
            .map_err(|e| e.to_string())?;
        if done.status.success() {
            return Ok(());
        }
        let said = format!("{}{}", done.stdout, done.stderr);
        Err(format!(
            "{}: {}",
            processes::describe(done.status),
            said.trim()
        ))
    }

    async fn connect(&self, to: SocketAddr) -> Result<tokio::net::TcpStream, String> {
        netns::connect(&self.node_netns, to)
            .await
            .map_err(|e| format!("connect to {to}: {e}"))
    }

    fn address_of(&self, host: Option<&str>, port: &IntOrString) -> Result<SocketAddr, String> {
        let address = match host.filter(|h| !h.is_empty()) {
            Some(host) => host
                .parse()
                .map_err(|_| format!("host {host} is no address"))?,
            None => self.address,
        };
        let number = match port {
            IntOrString::Int(number) => Some(*number),
            IntOrString::String(name) => {
                let mut ports = self.container.ports.iter().flatten();
                let found = ports.find(|p| p.name.as_deref() == Some(name));
                found.map(|p| p.container_port)
            }
        };
        let port = number.and_then(|n| u16::try_from(n).ok());
        Ok(SocketAddr::new(
            address,
            port.ok_or("there is no such port")?,
        ))
    }
}

/// One failure more; an error once there are too many.
fn count(failures: u32, limit: u32, reason: String) -> Result<u32, String> {
    if failures + 1 >= limit {
        Err(reason)
    } else {
        Ok(failures + 1)
    }
}

struct Times {
    initial_delay: Duration,
    period: Duration,
    timeout: Duration,
    successes: u32,
    failures: u32,
}

impl Times {
    fn of(probe: &Probe) -> Self {
        let number = |given: Option<i32>, default: u32| {
            given
                .and_then(|n| u32::try_from(n).ok())
                .filter(|n| *n > 0)
                .unwrap_or(default)
        };
        let seconds = |given, default| Duration::from_secs(number(given, default).into());
        let delay = probe
            .initial_delay_seconds
            .and_then(|n| u64::try_from(n).ok());
        Self {
            initial_delay: Duration::from_secs(delay.unwrap_or(0)),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            successes: number(probe.success_threshold, 1),
            failures: number(probe.failure_threshold, 3),
        }
    }
}

/// How long a container without a readiness probe must have run to count as ready.
const SHOWS_LIFE: Duration = Duration::from_millis(250);
const FIRST_PERIOD: Duration = Duration::from_millis(100);
const MAX_BODY: u64 = 1 << 20;
