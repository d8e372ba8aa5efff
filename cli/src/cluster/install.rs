//! `warren install`: prints the objects of a mesh, for `kubectl apply -f -`.
//!
//! They are the Helm chart's own, rendered by Helm when the chart was changed (`deploy/manifests/make.py`), with marks where
//! the few options of this command go. Whoever needs more of the chart's values uses Helm.

use std::io::Write;
use std::process::ExitCode;

use mesh_api::identity::Identity;
use mesh_api::names::SYSTEM_NAMESPACE;
use sha2::{Digest, Sha256};

use crate::args::{Install, Platform};
use crate::error::{Context, Error, Result};

/// Prints them.
pub(crate) fn run(options: &Install) -> Result<ExitCode> {
    let text = manifests(options)?;
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    written.context("standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn manifests(options: &Install) -> Result<String> {
    let (template, conf_dir, bin_dir) = match (options.platform, options.ha) {
        (Platform::Gke, false) => (GKE, CONF_DIR, "/home/kubernetes/bin"),
        (Platform::Gke, true) => (GKE_HA, CONF_DIR, "/home/kubernetes/bin"),
        (Platform::Openshift, false) => {
            (OPENSHIFT, "/etc/kubernetes/cni/net.d", "/var/lib/cni/bin")
        }
        (Platform::Openshift, true) => (
            OPENSHIFT_HA,
            "/etc/kubernetes/cni/net.d",
            "/var/lib/cni/bin",
        ),
        (platform, ha) => {
            let template = if ha { DEFAULT_HA } else { DEFAULT };
            match platform {
                Platform::K3s => (template, K3S_CONF_DIR, K3S_BIN_DIR),
                _ => (template, CONF_DIR, "/opt/cni/bin"),
            }
        }
    };
    check(options)?;
    let mut text = template.to_owned();
    for (mark, value) in [
        ("__REGISTRY__", options.registry.as_str()),
        ("__TAG__", &options.tag),
        ("__LOG__", &options.log),
        ("__MODE__", options.mode.name()),
        ("__TRUST_DOMAIN__", &options.trust_domain),
        ("/__CONF_DIR__", conf_dir),
        ("/__BIN_DIR__", bin_dir),
    ] {
        text = text.replace(mark, value);
    }
    for program in ["warren-controller", "warren-cni", "warren-node-proxy"] {
        let mark = format!("__HASH_{program}__");
        text = text.replace(&mark, &config_hash(&text, program));
    }
    let mut all = namespace();
    if !options.no_crds {
        all += "---\n";
        all += CRD;
    }
    all += &text;
    if !options.no_dashboards {
        all += DASHBOARDS;
    }
    Ok(all)
}

/// What goes into YAML as it is.
fn check(options: &Install) -> Result<()> {
    let plain = |text: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || "._-/:=,@".contains(c);
        text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(known)
    };
    for (option, value) in [
        ("--registry", &options.registry),
        ("--tag", &options.tag),
        ("--log", &options.log),
    ] {
        if !plain(value) {
            return Err(Error::new(format!(
                "{option}: letters, digits and ._-/:=,@ are expected, not {value:?}"
            )));
        }
    }
    match Identity::new(&options.trust_domain, "a", "b") {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::new(
            "--trust-domain: a name of a-z, 0-9, '.', '-' and '_' is expected",
        )),
    }
}

/// Changes with a program's configuration, so that its pods are replaced: they read it at their start.
fn config_hash(text: &str, program: &str) -> String {
    let config = text.split("---\n").find(|document| {
        document.contains("kind: ConfigMap\n") && document.contains(&format!("  name: {program}\n"))
    });
    let hash = Sha256::digest(config.unwrap_or_default());
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn namespace() -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {SYSTEM_NAMESPACE}\n  labels:\n    \
         app.kubernetes.io/part-of: warren\n    pod-security.kubernetes.io/enforce: privileged\n"
    )
}

const DEFAULT: &str = include_str!("../../../deploy/manifests/default.yaml");
const DEFAULT_HA: &str = include_str!("../../../deploy/manifests/default-ha.yaml");
const GKE: &str = include_str!("../../../deploy/manifests/gke.yaml");
const GKE_HA: &str = include_str!("../../../deploy/manifests/gke-ha.yaml");
const OPENSHIFT: &str = include_str!("../../../deploy/manifests/openshift.yaml");
const OPENSHIFT_HA: &str = include_str!("../../../deploy/manifests/openshift-ha.yaml");
const DASHBOARDS: &str = include_str!("../../../deploy/manifests/dashboards.yaml");
const CRD: &str = include_str!(
    "../../../deploy/charts/warren-crds/templates/trafficpolicies.warren-mesh.io.yaml"
);
/// As `deploy/charts/warren/files/platforms.yaml`; `make charts` compares what is printed.
const CONF_DIR: &str = "/etc/cni/net.d";
const K3S_CONF_DIR: &str = "/var/lib/rancher/k3s/agent/etc/cni/net.d";
const K3S_BIN_DIR: &str = "/var/lib/rancher/k3s/data/cni";

#[cfg(test)]
mod tests {
    use clap::{Parser, ValueEnum};

    use super::*;
    use crate::args::{Command, Warren};

    fn options(arguments: &[&str]) -> Install {
        let line = ["warren", "install"].iter().chain(arguments);
        match Warren::try_parse_from(line).unwrap().command {
            Command::Install(options) => options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn no_mark_is_left_and_every_document_is_an_object() {
        for platform in Platform::value_variants() {
            for ha in [false, true] {
                let mut options = options(&[]);
                (options.platform, options.ha) = (*platform, ha);
                let text = manifests(&options).unwrap();
                // Grafana's own have small letters.
                let marks = text
                    .split("__")
                    .skip(1)
                    .filter(|mark| mark.starts_with(|c: char| c.is_ascii_uppercase()));
                assert_eq!(marks.collect::<Vec<_>>(), [""; 0], "{platform:?}");
                for document in text.split("\n---\n") {
                    let object: serde_norway::Value = serde_norway::from_str(document).unwrap();
                    assert!(object["kind"].is_string(), "{platform:?}: {document}");
                }
            }
        }
    }

    #[test]
    fn a_changed_configuration_replaces_its_programs_pods_only() {
        let hashes = |arguments: &[&str]| {
            let text = manifests(&options(arguments)).unwrap();
            let lines = text.lines().filter(|line| line.contains("config-hash"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let (before, after) = (hashes(&[]), hashes(&["--mode", "strict"]));
        assert_eq!(before.len(), 3);
        let changed = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| before != after);
        assert_eq!(changed.count(), 1, "{before:?} {after:?}");
    }

    #[test]
    fn what_would_break_the_yaml_is_refused() {
        for wrong in [
            ["--registry", "a b"],
            ["--tag", "x\ny: z"],
            ["--log", "'"],
            ["--trust-domain", "A"],
        ] {
            let error = manifests(&options(&wrong)).expect_err(wrong[1]);
            assert!(error.to_string().starts_with(wrong[0]), "{error}");
        }
    }
}
