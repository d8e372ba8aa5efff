//! The user's manifests: read by the command, checked there and again by the daemon, all mistakes at once.
//!
//! The format is the controller's own (`warren_controller::providers::directory`). Checked here is what only
//! the lab cannot do: run images, other nodes than its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::PodSpec;
use serde::{Deserialize, Serialize};
use warren_controller::providers::directory::{
    Document, Mistake, Object, ObjectKey, manifest_files, parse_text,
};

use super::deployments::selects;
use crate::error::{Context, Error, Result};

/// A file as the user gave it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Source {
    pub(crate) file: PathBuf,
    pub(crate) text: String,
}

/// Reads files, directories and `-`.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in paths {
        let what = || format!("manifest {}", path.display());
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .context("standard input")?;
            sources.push(Source {
                file: "standard input".into(),
                text,
            });
        } else if path.is_dir() {
            let files = manifest_files(path).context(what())?;
            if files.is_empty() {
                return Err(Error::new(format!(
                    "{}: no *.yaml, *.yml or *.json in it",
                    what()
                )));
            }
            for file in files {
                let text = std::fs::read_to_string(&file).context(file.display())?;
                sources.push(Source { file, text });
            }
        } else {
            let text = std::fs::read_to_string(path).context(what())?;
            sources.push(Source {
                file: path.clone(),
                text,
            });
        }
    }
    Ok(sources)
}

/// What manifests may refer to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub(crate) nodes: BTreeSet<String>,
    pub(crate) namespaces: BTreeSet<String>,
}

/// Parses and checks. The error lists every mistake of every document.
pub(crate) fn parse(sources: &[Source], known: &Known) -> Result<Vec<Document>> {
    let (documents, mut mistakes) = parse_leniently(sources);
    let mut namespaces = known.namespaces.clone();
    for document in &documents {
        if let Object::Namespace(namespace) = &document.object {
            namespaces.extend(namespace.metadata.name.clone());
        }
    }
    let mut seen: BTreeMap<ObjectKey, String> = BTreeMap::new();
    for document in &documents {
        let mut report = |field: &str, message: String| mistakes.push(at(document, field, message));
        let key = document.object.key();
        let place = format!("{}:{}", document.file.display(), document.line);
        if let Some(first) = seen.insert(key.clone(), place) {
            report(
                "",
                format!("is already described at {first}; remove one of them"),
            );
        }
        if !key.namespace.is_empty() && !namespaces.contains(&key.namespace) {
            let namespace = &key.namespace;
            report(
                "metadata.namespace",
                format!("there is no Namespace {namespace}; add one"),
            );
        }
        check(&document.object, known, &mut report);
    }
    if mistakes.is_empty() {
        return Ok(documents);
    }
    mistakes.sort();
    mistakes.dedup();
    let lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    Err(Error::new(format!(
        "nothing was changed:\n  {}",
        lines.join("\n  ")
    )))
}

/// Parses without checking what documents refer to: `delete` needs only their names.
pub(crate) fn parse_names(sources: &[Source]) -> Result<Vec<ObjectKey>> {
    let (documents, mistakes) = parse_leniently(sources);
    match mistakes.first() {
        None => Ok(documents.iter().map(|d| d.object.key()).collect()),
        Some(_) => {
            let lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
            Err(Error::new(format!(
                "nothing was deleted:\n  {}",
                lines.join("\n  ")
            )))
        }
    }
}

fn parse_leniently(sources: &[Source]) -> (Vec<Document>, Vec<Mistake>) {
    let (mut documents, mut mistakes) = (Vec::new(), Vec::new());
    for source in sources {
        let parsed = parse_text(&source.file, &source.text);
        documents.extend(parsed.documents);
        mistakes.extend(parsed.mistakes);
        mistakes.extend(unknown_kinds(source));
    }
    (documents, mistakes)
}

/// The parser skips kinds that Warren does not use. A person who typed `Sevrice` must hear of it.
fn unknown_kinds(source: &Source) -> Vec<Mistake> {
    let kinds = source.text.lines().enumerate().filter_map(|(i, line)| {
        let kind = line.strip_prefix("kind:")?.split('#').next()?.trim();
        let kind = kind.trim_matches(|c| c == '"' || c == '\'');
        // What is no word at all is the parser's to report.
        let word = !kind.is_empty() && kind.bytes().all(|b| b.is_ascii_alphanumeric());
        let known = [&KINDS[..], &EXTRA_KINDS, &IGNORED_KINDS];
        let unknown = !known.iter().any(|kinds| kinds.contains(&kind));
        (word && unknown).then_some((i + 1, kind))
    });
    kinds
        .map(|(line, kind)| Mistake {
            file: source.file.clone(),
            line,
            object: None,
            field: "kind".into(),
            message: format!(
                "the lab has no {kind}; it has {}",
                [&KINDS[..], &EXTRA_KINDS].concat().join(", ")
            ),
        })
        .collect()
}

/// Routes and policies: handed on to the controller.
pub(crate) const EXTRA_KINDS: [&str; 6] = [
    "HTTPRoute",
    "GRPCRoute",
    "TLSRoute",
    "TCPRoute",
    "XBackendTrafficPolicy",
    "TrafficPolicy",
];
const KINDS: [&str; 8] = [
    "Namespace",
    "ServiceAccount",
    "Pod",
    "Deployment",
    "Service",
    "EndpointSlice",
    "Node",
    "List",
];
/// Kinds that ordinary manifests hold and that mean nothing without a cluster.
const IGNORED_KINDS: [&str; 9] = [
    "ConfigMap",
    "Secret",
    "Role",
    "RoleBinding",
    "ClusterRole",
    "ClusterRoleBinding",
    "PodDisruptionBudget",
    "HorizontalPodAutoscaler",
    "NetworkPolicy",
];

fn at(document: &Document, field: &str, message: String) -> Mistake {
    Mistake {
        file: document.file.to_path_buf(),
        line: document.line,
        object: Some(document.object.key()),
        field: field.into(),
        message,
    }
}

fn check(object: &Object, known: &Known, report: &mut impl FnMut(&str, String)) {
    match object {
        Object::Namespace(_) if object.key().name == mesh_api::names::SYSTEM_NAMESPACE => {
            report(
                "metadata.name",
                "is the mesh's own namespace; choose another".into(),
            );
        }
        Object::Node(_) => report("", "the lab makes its own nodes; see `up --nodes`".into()),
        Object::Pod(pod) => match &pod.spec {
            Some(spec) => check_spec(spec, "spec", known, report),
            None => report("spec", "expected what runs in the pod".into()),
        },
        Object::Deployment(deployment) => {
            let Some(spec) = &deployment.spec else {
                return report("spec", "expected what runs in the pods".into());
            };
            let none = BTreeMap::new();
            let template = spec.template.metadata.as_ref();
            let labels = template.and_then(|m| m.labels.as_ref()).unwrap_or(&none);
            let selector = spec.selector.match_labels.as_ref().unwrap_or(&none);
            if selector.is_empty() || !selects(selector, labels) {
                report(
                    "spec.selector.matchLabels",
                    "must match the template's labels".into(),
                );
            }
            match &spec.template.spec {
                Some(pod) => check_spec(pod, "spec.template.spec", known, report),
                None => report(
                    "spec.template.spec",
                    "expected what runs in the pods".into(),
                ),
            }
        }
        Object::ServiceAccount(_)
        | Object::Namespace(_)
        | Object::Service(_)
        | Object::EndpointSlice(_)
        | Object::HttpRoute(_)
        | Object::GrpcRoute(_)
        | Object::TlsRoute(_)
        | Object::TcpRoute(_)
        | Object::BackendTrafficPolicy(_)
        | Object::TrafficPolicy(_) => {}
    }
}

fn check_spec(spec: &PodSpec, at: &str, known: &Known, report: &mut impl FnMut(&str, String)) {
    if let Some(node) = spec
        .node_name
        .as_deref()
        .filter(|n| !known.nodes.contains(*n))
    {
        let nodes = known.nodes.len();
        report(
            &format!("{at}.nodeName"),
            format!("there is no node {node}; the lab has node-1 to node-{nodes}"),
        );
    }
    if spec.host_network == Some(true) {
        report(
            &format!("{at}.hostNetwork"),
            "the lab has no pods on the host's network".into(),
        );
    }
    let Some(container) = spec.containers.first() else {
        return report(&format!("{at}.containers"), "expected at least one".into());
    };
    if container.command.as_ref().is_none_or(Vec::is_empty) {
        report(
            &format!("{at}.containers[0].command"),
            "expected a command: the lab runs programs of this machine, not images".into(),
        );
    }
    for (field, probe) in [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ] {
        let http = probe.as_ref().and_then(|p| p.http_get.as_ref());
        if http
            .and_then(|h| h.scheme.as_deref())
            .is_some_and(|s| s != "HTTP")
        {
            report(
                &format!("{at}.containers[0].{field}.httpGet.scheme"),
                "the lab's probes speak HTTP only".into(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Document>> {
        let known = Known {
            nodes: ["node-1".to_owned()].into(),
            namespaces: ["default".to_owned()].into(),
        };
        parse(
            &[Source {
                file: "a.yaml".into(),
                text: text.into(),
            }],
            &known,
        )
    }

    #[test]
    fn every_mistake_is_reported_with_its_place() {
        let error = parsed(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: gone}\n\
             spec: {nodeName: node-9, containers: [{name: c}]}\n\
             ---\napiVersion: v1\nkind: Node\nmetadata: {name: n}\n\
             ---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n\
             spec: {selector: {matchLabels: {app: x}}, template: {metadata: {labels: {app: y}}, \
             spec: {containers: [{name: c, command: [a]}]}}}\n",
        )
        .unwrap_err()
        .to_string();
        for part in [
            "a.yaml:1: Pod gone/a: metadata.namespace",
            "spec.nodeName: there is no node node-9",
            "spec.containers[0].command",
            "Node n: the lab makes its own nodes",
            "Deployment default/d: spec.selector.matchLabels",
        ] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }

    #[test]
    fn a_namespace_of_the_same_manifests_will_do() {
        let good = parsed(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: new}\n\
             spec: {containers: [{name: c, command: [sleep]}]}\n\
             ---\napiVersion: v1\nkind: Namespace\nmetadata: {name: new}\n\
             ---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
             metadata: {name: r, namespace: new}\nspec: {}\n",
        );
        assert_eq!(good.unwrap().len(), 3);
    }
}
