//! The files that the mesh's processes are started with: configurations, tokens, the CNI chain, the trust
//! bundle.
//!
//! Invariant: what the proxy may write or must keep secret is its user's; everything else is root's.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use mesh_api::names::{CONTROLLER_PORT, PROXY_UID};
use serde_json::{Value, json};

use super::daemon::{Lab, random_hex};
use super::mesh::Node;
use super::names::{LABS, short_hash};
use crate::args::ConfigPart;
use crate::error::{Context, Result};

/// Directories, tokens and the CNI configuration of a node.
pub(crate) fn prepare_node(lab: &Lab, node: &Node) -> Result<()> {
    let dir = lab.paths.node(&node.name);
    for (sub, mode) in [
        ("cni/net.d", 0o755),
        ("cni/bin", 0o755),
        ("cni/data", 0o755),
        ("run", 0o755),
        ("agent/state", 0o700),
        ("proxy/state", 0o700),
        ("proxy/run", 0o700),
    ] {
        make_dir(&dir.join(sub), mode)?;
    }
    let secrets = lab.paths.secrets().join(&node.name);
    make_dir(&secrets, 0o700)?;
    for of_proxy in [dir.join("proxy/state"), dir.join("proxy/run"), secrets] {
        give_to_proxy(&of_proxy)?;
    }
    let conflist = dir.join("cni/net.d/10-lab.conflist");
    std::fs::write(&conflist, network_configuration(lab, node)).context(conflist.display())?;
    if !lab.spec.mesh {
        return Ok(());
    }
    let mut tokens = std::fs::read_to_string(lab.paths.tokens()).unwrap_or_default();
    for role in ["agent", "proxy"] {
        let token = random_hex(32);
        let file = dir.join(role).join("token");
        write_secret(&file, &token)?;
        if role == "proxy" {
            give_to_proxy(&file)?;
        }
        tokens += &format!("{} {role} {token}\n", node.name);
    }
    make_dir(&lab.paths.controller(), 0o755)?;
    write_secret(&lab.paths.tokens(), &tokens)
}

/// What a cluster's network add-on would have put there: the stock bridge plugin, dual-stack.
fn network_configuration(lab: &Lab, node: &Node) -> String {
    let [v4, v6] = lab.plan.pod_subnets(node.number);
    json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "dataDir": lab.paths.node(&node.name).join("cni/data"),
                "ranges": [[{"subnet": v4}], [{"subnet": v6}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        }],
    })
    .to_string()
}

pub(crate) fn controller_access(lab: &Lab, token: &Path) -> Value {
    json!({
        "address": format!("{}:{CONTROLLER_PORT}", lab.plan.controller().v4),
        "trustBundle": lab.paths.trust_bundle(),
        "tokenFile": token,
    })
}

/// Writes a configuration with the user's overlays on top.
pub(crate) fn write_config(
    lab: &Lab,
    part: ConfigPart,
    mut config: Value,
    file: &Path,
) -> Result<()> {
    for (of, overlay) in &lab.spec.overlays {
        if *of == part {
            merge(&mut config, overlay);
        }
    }
    let text = serde_norway::to_string(&config).context(file.display())?;
    std::fs::write(file, text).context(file.display())
}

/// Lays one tree over another: maps are merged, anything else is replaced.
fn merge(under: &mut Value, over: &Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                merge(under.entry(key).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over.clone(),
    }
}

/// Where the root is.
pub(crate) fn ca_dir(lab: &Lab) -> PathBuf {
    lab.spec.ca.clone().unwrap_or_else(|| lab.paths.ca())
}

/// Copies the CA's bundle to where nodes mount it, if it has changed. The CA's own directory may be closed
/// to the proxies' user.
pub(crate) fn copy_bundle(lab: &Lab) -> Result<()> {
    let from = ca_dir(lab).join("bundle.pem");
    let bundle = std::fs::read(&from).context(from.display())?;
    let to = lab.paths.trust_bundle();
    if bundle.is_empty() || std::fs::read(&to).is_ok_and(|old| old == bundle) {
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        make_dir(parent, 0o755)?;
    }
    let draft = to.with_extension("new");
    std::fs::write(&draft, &bundle).context(draft.display())?;
    std::fs::rename(&draft, &to).context(to.display())?;
    tracing::info!(bundle = short_hash(&bundle), "trust bundle");
    Ok(())
}

pub(crate) fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    std::fs::create_dir_all(dir).context(dir.display())?;
    // The user's own CA directory keeps its mode.
    if dir.starts_with(LABS) {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(dir, mode).context(dir.display())?;
    }
    Ok(())
}

fn write_secret(file: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    options.create(true).truncate(true).write(true).mode(0o600);
    let mut opened = options.open(file).context(file.display())?;
    opened.write_all(text.as_bytes()).context(file.display())
}

fn give_to_proxy(path: &Path) -> Result<()> {
    chown(path, Some(PROXY_UID), Some(PROXY_UID)).context(path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_replace_leaves_and_keep_the_rest() {
        let mut config = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge(&mut config, &json!({"a": {"c": 3, "e": {"f": 4}}, "d": []}));
        assert_eq!(
            config,
            json!({"a": {"b": 1, "c": 3, "e": {"f": 4}}, "d": []})
        );
    }
}
