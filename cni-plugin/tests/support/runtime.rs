//! A container runtime's side of CNI: calls a list's plugins one after the other, as libcni does.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::{Sandbox, World};

/// A network: a list of plugins.
pub struct Network {
    pub list: Value,
    directory: PathBuf,
}

/// What a plugin wrote and whether it succeeded.
#[derive(Debug)]
pub struct CniError {
    pub code: u64,
    pub text: String,
}

impl Network {
    /// The stock plugin `kind` with host-local, then Warren's, in a `version` list.
    pub fn new(world: &World, kind: &str, version: &str) -> Self {
        let directory = world.directory.clone();
        let ranges = json!([[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]]);
        let list = json!({
            "cniVersion": version,
            "name": "wct",
            "plugins": [
                {
                    "type": kind,
                    "bridge": "wct0",
                    "isGateway": true,
                    "hairpinMode": true,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": directory.join("ipam"),
                        "ranges": ranges,
                        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                    },
                },
                {
                    "type": "warren-cni",
                    "socket": directory.join("cni.sock"),
                    "excludeNamespaces": ["kube-system"],
                },
            ],
        });
        Self { list, directory }
    }

    /// The result of the last plugin.
    pub fn add(&self, pod: &Sandbox, uid: &str) -> Result<Value, CniError> {
        let mut previous: Option<Value> = None;
        for plugin in self.plugins() {
            let mut config = self.config(plugin);
            if let Some(previous) = &previous {
                config["prevResult"] = previous.clone();
            }
            match self.call("ADD", plugin, &config, pod, uid) {
                Ok(text) => {
                    let result: Value = serde_json::from_str(&text).unwrap();
                    if plugin["type"] == "warren-cni" {
                        let mut expected = previous.take().unwrap();
                        expected["cniVersion"] = self.list["cniVersion"].clone();
                        assert_eq!(result, expected, "passed on unchanged");
                    }
                    previous = Some(result);
                }
                Err(error) => {
                    self.delete(pod, uid, previous.as_ref());
                    return Err(error);
                }
            }
        }
        let result = previous.unwrap();
        std::fs::write(self.cache(pod), result.to_string()).unwrap();
        Ok(result)
    }

    pub fn check(&self, pod: &Sandbox, uid: &str) -> Result<(), CniError> {
        let previous: Value =
            serde_json::from_slice(&std::fs::read(self.cache(pod)).unwrap()).unwrap();
        for plugin in self.plugins() {
            let mut config = self.config(plugin);
            config["prevResult"] = previous.clone();
            self.call("CHECK", plugin, &config, pod, uid)?;
        }
        Ok(())
    }

    /// In reverse order; every plugin must succeed.
    pub fn delete(&self, pod: &Sandbox, uid: &str, previous: Option<&Value>) {
        for plugin in self.plugins().iter().rev() {
            let mut config = self.config(plugin);
            if let Some(previous) = previous {
                config["prevResult"] = previous.clone();
            }
            self.call("DEL", plugin, &config, pod, uid).unwrap();
        }
    }

    /// GC and STATUS of Warren's plugin.
    pub fn call_alone(
        &self,
        command: &str,
        extra: Value,
        pod: &Sandbox,
    ) -> Result<String, CniError> {
        let plugin = self.plugins().last().unwrap();
        let mut config = self.config(plugin);
        for (field, value) in extra.as_object().unwrap() {
            config[field] = value.clone();
        }
        self.call(command, plugin, &config, pod, "u")
    }

    fn plugins(&self) -> &[Value] {
        self.list["plugins"].as_array().unwrap()
    }

    fn config(&self, plugin: &Value) -> Value {
        let mut config = plugin.clone();
        config["cniVersion"] = self.list["cniVersion"].clone();
        if self.list["cniVersion"] == "1.1.0" && plugin["type"] != "warren-cni" {
            // The distribution's plugins know no newer one.
            config["cniVersion"] = "1.0.0".into();
        }
        config["name"] = self.list["name"].clone();
        config
    }

    fn cache(&self, pod: &Sandbox) -> PathBuf {
        self.directory.join(format!("{}.result", pod.name))
    }

    fn call(
        &self,
        command: &str,
        plugin: &Value,
        config: &Value,
        pod: &Sandbox,
        uid: &str,
    ) -> Result<String, CniError> {
        let stock = Path::new("/usr/lib/cni");
        let kind = plugin["type"].as_str().unwrap();
        let program = match kind {
            "warren-cni" => PathBuf::from(env!("CARGO_BIN_EXE_warren-cni")),
            _ => stock.join(kind),
        };
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME={uid};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={uid}",
            pod.name
        );
        let mut child = Command::new(program)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &pod.name)
            .env("CNI_NETNS", &pod.path)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", args)
            .env("CNI_PATH", stock)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(config.to_string().as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        if output.status.success() {
            return Ok(text);
        }
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            error["cniVersion"], self.list["cniVersion"],
            "{kind}: {text}"
        );
        assert!(kind == "warren-cni", "{kind}: {text}");
        Err(CniError {
            code: error["code"].as_u64().unwrap(),
            text,
        })
    }
}

/// The pod's addresses, IPv4 first.
pub fn addresses(result: &Value) -> Vec<std::net::IpAddr> {
    let ips = result["ips"].as_array().unwrap().iter();
    let mut addresses: Vec<std::net::IpAddr> = ips
        .map(|ip| {
            ip["address"]
                .as_str()
                .unwrap()
                .split('/')
                .next()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect();
    addresses.sort();
    addresses
}
