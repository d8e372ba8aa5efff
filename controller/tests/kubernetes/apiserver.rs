//! etcd and kube-apiserver on ports of their own, gone with the test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rcgen::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{PATIENCE, soon};

/// Both servers.
pub(crate) struct ApiServer {
    pub(crate) dir: TempDir,
    client: Client,
    programs: (PathBuf, PathBuf),
    ports: (u16, u16),
    etcd: Child,
    apiserver: Child,
}

impl ApiServer {
    /// `None`: the programs are not there.
    pub(crate) async fn start() -> Option<Self> {
        if std::env::var_os("WARREN_TEST_KUBE").is_none() {
            eprintln!(
                "\n\n!!! SKIPPED: only with WARREN_TEST_KUBE, as `make test-kube` sets it !!!\n\n"
            );
            return None;
        }
        let programs = program("etcd").zip(program("kube-apiserver")).expect(
            "etcd or kube-apiserver is missing: apt-get install etcd-server, tests/kube/build kube-apiserver",
        );
        let dir = TempDir::new().unwrap();
        let [client_port, peer_port, port] = ports();
        let etcd = etcd(&programs.0, dir.path(), client_port, peer_port);
        let key = KeyPair::generate().unwrap();
        for (name, text) in [
            ("sa.key", key.serialize_pem()),
            ("sa.pub", key.public_key_pem()),
        ] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        std::fs::write(dir.path().join("tokens.csv"), TOKENS).unwrap();
        let ports = (client_port, port);
        let apiserver = apiserver(&programs.1, dir.path(), ports);
        // Made by the server for itself.
        let certificate = dir.path().join("certs/apiserver.crt");
        let mut tries = 0;
        while std::fs::metadata(&certificate).map_or(0, |m| m.len()) == 0 {
            tries += 1;
            assert!(
                tries < 600,
                "kube-apiserver does not start; see its log in {:?}",
                dir.keep()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        for user in ["admin", "controller", "editor"] {
            std::fs::write(dir.path().join(user), kubeconfig(user, port, &certificate)).unwrap();
        }
        let client = client(dir.path(), "admin").await;
        let server = Self {
            dir,
            client,
            programs,
            ports,
            etcd,
            apiserver,
        };
        server.ready().await;
        server.set_up().await;
        Some(server)
    }

    /// Kills the API server; etcd keeps everything.
    pub(crate) fn kill(&mut self) {
        self.apiserver.kill().unwrap();
        self.apiserver.wait().unwrap();
    }

    /// Starts it again, on the same port.
    pub(crate) async fn restart(&mut self) {
        self.apiserver = apiserver(&self.programs.1, self.dir.path(), self.ports);
        self.ready().await;
    }

    /// Forgets all history, so that every watch that falls behind is told 410.
    pub(crate) fn compact(&self) {
        let ctl = |arguments: &[&str]| {
            let endpoint = format!("--endpoints=http://127.0.0.1:{}", self.ports.0);
            let mut command = Command::new("etcdctl");
            command
                .env("ETCDCTL_API", "3")
                .arg(endpoint)
                .args(arguments);
            let output = command.output();
            let output = output.expect("etcdctl is missing: apt-get install etcd-client");
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let status: Value =
            serde_json::from_str(&ctl(&["endpoint", "status", "-w", "json"])).unwrap();
        let revision = status[0]["Status"]["header"]["revision"].to_string();
        ctl(&["compact", &revision]);
    }

    pub(crate) async fn get(&self, path: &str) -> Option<Value> {
        match self.request("GET", path, None).await {
            Ok(value) => Some(value),
            Err(kube::Error::Api(status)) if status.code == 404 => None,
            Err(error) => panic!("GET {path}: {error}"),
        }
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Value {
        let answer = self.request("POST", path, Some(&body)).await;
        answer.unwrap_or_else(|e| panic!("POST {path} {body}: {e}"))
    }

    /// A merge patch.
    pub(crate) async fn patch(&self, path: &str, body: Value) -> Value {
        let answer = self.request("PATCH", path, Some(&body)).await;
        answer.unwrap_or_else(|e| panic!("PATCH {path} {body}: {e}"))
    }

    pub(crate) async fn delete(&self, path: &str) {
        let now = json!({ "gracePeriodSeconds": 0 });
        self.request("DELETE", path, Some(&now)).await.unwrap();
    }

    /// Waits until what is at a path is as wanted. There is nothing to wait on but time: any client may
    /// have written it.
    pub(crate) async fn until(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let last = tokio::time::Instant::now() + PATIENCE;
        loop {
            let value = self.get(path).await.unwrap_or_default();
            if wanted(&value) {
                return value;
            }
            assert!(
                tokio::time::Instant::now() < last,
                "never came to pass: {path}: {value:#}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Whether nobody is there.
    pub(crate) async fn is_away(&self) -> bool {
        let answer = self.request("GET", "/api/v1/namespaces", None).await;
        !matches!(answer, Ok(_) | Err(kube::Error::Api(_)))
    }

    /// What a user of `tokens.csv` is answered.
    pub(crate) async fn ask(
        &self,
        user: &str,
        (method, path): (&str, &str),
        body: Value,
    ) -> Result<Value, kube::Error> {
        let client = client(self.dir.path(), user).await;
        request(&client, method, path, Some(&body)).await
    }

    async fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, kube::Error> {
        request(&self.client, method, path, body).await
    }

    async fn ready(&self) {
        let ready = async {
            loop {
                let request = hyper::Request::get("/readyz").body(Vec::new()).unwrap();
                if self.client.request_text(request).await.is_ok() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let ready = tokio::time::timeout(3 * PATIENCE, ready).await;
        assert!(
            ready.is_ok(),
            "kube-apiserver is not ready; see {:?}",
            self.dir.path()
        );
    }

    /// Namespaces, and what the controller's service account may do.
    async fn set_up(&self) {
        for name in ["warren-system", "demo"] {
            let namespace = json!({ "metadata": { "name": name } });
            self.post("/api/v1/namespaces", namespace).await;
        }
        for document in RBAC.split("---\n").filter(|d| !d.trim().is_empty()) {
            let object: Value = serde_norway::from_str(document).unwrap();
            let plural = format!("{}s", object["kind"].as_str().unwrap().to_lowercase());
            let namespace = object["metadata"]["namespace"].as_str();
            let within = namespace
                .map(|n| format!("namespaces/{n}/"))
                .unwrap_or_default();
            let path = format!("/apis/rbac.authorization.k8s.io/v1/{within}{plural}");
            self.post(&path, object).await;
        }
        // The bindings are looked up in caches that follow.
        let review = json!({
            "spec": {
                "user": CONTROLLER_USER,
                "resourceAttributes": { "verb": "list", "resource": "pods" },
            },
        });
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let allowed = async {
            while self.post(path, review.clone()).await["status"]["allowed"] != true {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        soon("RBAC", allowed).await;
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for child in [&mut self.apiserver, &mut self.etcd] {
            // Killed already, perhaps.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn client(dir: &Path, user: &str) -> Client {
    let kubeconfig = Kubeconfig::read_from(dir.join(user)).unwrap();
    let options = KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options);
    Client::try_from(config.await.unwrap()).unwrap()
}

async fn request(
    client: &Client,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, kube::Error> {
    let kind = match method {
        "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    };
    let body = body.map(|b| b.to_string().into_bytes()).unwrap_or_default();
    let request = hyper::Request::builder().method(method).uri(path);
    let request = request.header("content-type", kind).body(body).unwrap();
    client.request(request).await
}

fn program(name: &str) -> Option<PathBuf> {
    let cache = match std::env::var_os("WARREN_KUBE_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".cache/warren-kube"),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = [cache.join("bin")]
        .into_iter()
        .chain(std::env::split_paths(&path));
    let mut files = directories.map(|directory| directory.join(name));
    files.find(|file| file.is_file())
}

fn ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

fn log(dir: &Path, name: &str) -> Stdio {
    let mut options = std::fs::OpenOptions::new();
    let file = options.create(true).append(true).open(dir.join(name));
    file.unwrap().into()
}

fn etcd(program: &Path, dir: &Path, client: u16, peer: u16) -> Child {
    let (client, peer) = (
        format!("http://127.0.0.1:{client}"),
        format!("http://127.0.0.1:{peer}"),
    );
    Command::new(program)
        .arg("--data-dir")
        .arg(dir.join("etcd"))
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args([
            "--initial-cluster",
            &format!("default={peer}"),
            "--unsafe-no-fsync",
        ])
        .args(["--logger", "zap", "--log-level", "warn"])
        .stderr(log(dir, "etcd.log"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn apiserver(program: &Path, dir: &Path, (etcd, port): (u16, u16)) -> Child {
    let file = |name: &str| dir.join(name).display().to_string();
    Command::new(program)
        .args(["--etcd-servers", &format!("http://127.0.0.1:{etcd}")])
        .args([
            "--bind-address",
            "127.0.0.1",
            "--advertise-address",
            "127.0.0.1",
        ])
        .args([
            "--secure-port",
            &port.to_string(),
            "--cert-dir",
            &file("certs"),
        ])
        .args([
            "--endpoint-reconciler-type",
            "none",
            "--authorization-mode",
            "RBAC",
        ])
        .args([
            "--token-auth-file",
            &file("tokens.csv"),
            "--profiling=false",
        ])
        .args(["--service-account-issuer", "https://kubernetes.default.svc"])
        .args(["--service-account-signing-key-file", &file("sa.key")])
        .args(["--service-account-key-file", &file("sa.pub")])
        .args([
            "--service-cluster-ip-range",
            "10.96.0.0/16",
            "--allow-privileged",
        ])
        // Their controllers do not run.
        .args([
            "--disable-admission-plugins",
            "ServiceAccount,TaintNodesByCondition",
        ])
        .stderr(log(dir, "apiserver.log"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn kubeconfig(user: &str, port: u16, certificate: &Path) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "certificate-authority": certificate,
        } }],
        "users": [{ "name": user, "user": { "token": format!("{user}-token") } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": user } }],
    })
    .to_string()
}

const CONTROLLER_USER: &str = "system:serviceaccount:warren-system:warren-controller";
const TOKENS: &str = "admin-token,admin,1,system:masters\n\
    controller-token,system:serviceaccount:warren-system:warren-controller,2,system:serviceaccounts\n\
    editor-token,editor,3,\n";
/// The rights of the controller, and no more.
const RBAC: &str = include_str!("rbac.yaml");
