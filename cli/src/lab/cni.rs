//! The part of a container runtime that calls CNI plugins (CNI specification 1.0.0, sections 2 to 4).
//!
//! The chain is read anew for each call from the first file of the node's `confDir`, as runtimes do, so that
//! what the node's agent inserts there counts from the next pod on. Plugins run in the node's network
//! namespace: it is the host to them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::launch::Launch;
use super::processes;
use crate::error::{Context, Error, Result};

/// Where a node's plugins and their configuration are.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// The node's network namespace.
    pub(crate) netns: PathBuf,
    pub(crate) conf_dir: PathBuf,
    /// Searched in this order.
    pub(crate) bin_dirs: Vec<PathBuf>,
}

/// A sandbox to attach, as `CNI_*` and `CNI_ARGS` describe it.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    pub(crate) container_id: String,
    pub(crate) netns: PathBuf,
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) uid: String,
}

/// What ADD left; DEL wants it back.
#[derive(Clone, Debug)]
pub(crate) struct Attached {
    plugins: Vec<Value>,
    name: String,
    version: String,
    result: Value,
}

impl Attached {
    /// Addresses of the pod, in the order of the result.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let ips = self.result.get("ips").and_then(Value::as_array);
        ips.into_iter()
            .flatten()
            .filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok())
            .collect()
    }
}

impl Chain {
    /// ADD by all plugins in order. On failure those that ran are called with DEL, as a runtime does.
    pub(crate) async fn add(&self, sandbox: &Sandbox) -> Result<Attached> {
        let (name, version, plugins) = self.read()?;
        let mut attached = Attached {
            plugins,
            name,
            version,
            result: Value::Null,
        };
        for i in 0..attached.plugins.len() {
            match self.call("ADD", sandbox, &attached, i).await {
                Ok(result) => attached.result = result,
                Err(error) => {
                    self.delete(sandbox, &attached).await;
                    return Err(error);
                }
            }
        }
        if attached.addresses().is_empty() {
            self.delete(sandbox, &attached).await;
            return Err(Error::new("CNI ADD: the result has no address"));
        }
        Ok(attached)
    }

    /// DEL by all plugins in reverse order. Failures are logged; the namespace goes anyway.
    pub(crate) async fn delete(&self, sandbox: &Sandbox, attached: &Attached) {
        for i in (0..attached.plugins.len()).rev() {
            for attempt in 0..3u32 {
                match self.call("DEL", sandbox, attached, i).await {
                    Ok(_) => break,
                    Err(error) => {
                        let (namespace, pod) = (&sandbox.namespace, &sandbox.pod);
                        tracing::warn!(%error, pod = %format_args!("{namespace}/{pod}"), "CNI DEL");
                        tokio::time::sleep(Duration::from_millis(100 << attempt)).await;
                    }
                }
            }
        }
    }

    /// Whether the chain has that plugin.
    pub(crate) fn has(&self, plugin: &str) -> bool {
        self.read().is_ok_and(|(_, _, plugins)| {
            plugins
                .iter()
                .any(|p| p.get("type").and_then(Value::as_str) == Some(plugin))
        })
    }

    async fn call(&self, verb: &str, sandbox: &Sandbox, of: &Attached, i: usize) -> Result<Value> {
        let mut config = of.plugins[i].clone();
        let plugin = config["type"].as_str().unwrap_or_default().to_owned();
        config["name"] = json!(of.name);
        config["cniVersion"] = json!(of.version);
        if !of.result.is_null() {
            config["prevResult"] = of.result.clone();
        }
        let what = format!("CNI {verb}, plugin {plugin}");
        let program = self.find(&plugin).context(&what)?;
        let launch = Launch {
            argv: vec![program.display().to_string()],
            env: self.environment(verb, sandbox),
            netns: Some(self.netns.clone()),
            ..Launch::default()
        };
        let done = processes::run(&launch, &config.to_string(), PLUGIN_LIMIT)
            .await
            .context(&what)?;
        if done.status.success() {
            if verb != "ADD" {
                return Ok(Value::Null);
            }
            return serde_json::from_str(&done.stdout).context(format!("{what}: its result"));
        }
        Err(Error::new(format!("{what}: {}", explain(&done))))
    }

    fn environment(&self, verb: &str, sandbox: &Sandbox) -> BTreeMap<String, String> {
        let Sandbox {
            container_id,
            netns,
            namespace,
            pod,
            uid,
        } = sandbox;
        let path: Vec<String> = self
            .bin_dirs
            .iter()
            .map(|d| d.display().to_string())
            .collect();
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={pod};\
             K8S_POD_INFRA_CONTAINER_ID={container_id};K8S_POD_UID={uid}"
        );
        [
            ("CNI_COMMAND", verb.to_owned()),
            ("CNI_CONTAINERID", container_id.clone()),
            ("CNI_NETNS", netns.display().to_string()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_ARGS", args),
            ("CNI_PATH", path.join(":")),
            ("PATH", super::DEFAULT_PATH.into()),
        ]
        .into_iter()
        .map(|(k, v)| (k.to_owned(), v))
        .collect()
    }

    fn find(&self, plugin: &str) -> Result<PathBuf> {
        if plugin.is_empty() || plugin.contains('/') {
            return Err(Error::new("no plugin has that name"));
        }
        let found = self
            .bin_dirs
            .iter()
            .map(|d| d.join(plugin))
            .find(|p| p.is_file());
        found.ok_or_else(|| {
            Error::new("not found; install containernetworking-plugins (`make lab` does)")
        })
    }

    /// Name, version and plugins of the first network in `conf_dir`.
    fn read(&self) -> Result<(String, String, Vec<Value>)> {
        let file = self.first_file()?;
        let what = || format!("CNI configuration {}", file.display());
        let text = std::fs::read_to_string(&file).context(what())?;
        let config: Value = serde_json::from_str(&text).context(what())?;
        let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default();
        let plugins = match config.get("plugins") {
            Some(Value::Array(plugins)) => plugins.clone(),
            // A `.conf` is its own only plugin.
            _ => vec![config.clone()],
        };
        Ok((text("name").into(), text("cniVersion").into(), plugins))
    }

    fn first_file(&self) -> Result<PathBuf> {
        let what = || format!("CNI configuration in {}", self.conf_dir.display());
        let mut files: Vec<PathBuf> = std::fs::read_dir(&self.conf_dir)
            .context(what())?
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| is_configuration(p))
            .collect();
        files.sort();
        files
            .into_iter()
            .next()
            .ok_or_else(|| Error::new(format!("{}: there is none", what())))
    }
}

fn is_configuration(path: &Path) -> bool {
    let ends = path.extension().and_then(|e| e.to_str());
    ends.is_some_and(|e| ["conf", "conflist", "json"].contains(&e))
}

/// The error as the plugin put it (section 5 of the specification), or whatever it said.
fn explain(done: &processes::Finished) -> String {
    if let Ok(error) = serde_json::from_str::<Value>(&done.stdout)
        && let Some(message) = error.get("msg").and_then(Value::as_str)
    {
        let code = error.get("code").and_then(Value::as_u64).unwrap_or(0);
        let details = error
            .get("details")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let separator = if details.is_empty() { "" } else { ": " };
        return format!("{message}{separator}{details} (code {code})");
    }
    let said = format!("{} {}", done.stdout.trim(), done.stderr.trim());
    format!("{} {}", processes::describe(done.status), said.trim())
}

/// More than the 10 s that Warren's own plugin may take.
const PLUGIN_LIMIT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_configuration_counts_and_what_others_insert_is_seen() {
        let dir = std::env::temp_dir().join(format!("warren-cni-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let chain = Chain {
            netns: PathBuf::new(),
            conf_dir: dir.clone(),
            bin_dirs: vec![dir.clone()],
        };
        assert!(
            chain
                .read()
                .unwrap_err()
                .to_string()
                .contains("there is none")
        );
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        write(
            "20-late.conf",
            r#"{"cniVersion": "0.3.1", "name": "late", "type": "ptp"}"#,
        );
        write("README", "not a configuration");
        assert!(chain.has("ptp") && !chain.has("bridge"));
        let plugins = r#"[{"type": "bridge"}, {"type": "warren-cni"}]"#;
        write(
            "10-lab.conflist",
            &format!(r#"{{"cniVersion": "1.0.0", "name": "lab", "plugins": {plugins}}}"#),
        );
        let (name, version, plugins) = chain.read().unwrap();
        assert_eq!((&*name, &*version, plugins.len()), ("lab", "1.0.0", 2));
        assert!(chain.has("warren-cni"));
        assert!(chain.find("../bridge").is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn addresses_come_without_their_prefix() {
        let result = json!({"ips": [{"address": "10.1.2.3/24"}, {"address": "fd00::3/64"}]});
        let attached = Attached {
            plugins: vec![],
            name: String::new(),
            version: String::new(),
            result,
        };
        let ips: Vec<String> = attached
            .addresses()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(ips, ["10.1.2.3", "fd00::3"]);
    }
}
