//! From a container of a manifest to a process: command, arguments, environment, user.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{Container, EnvVar, Pod, PodSpec};

use super::DEFAULT_PATH;
use super::launch::Launch;

/// What of a running pod its environment may refer to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place {
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) host_ip: String,
}

/// The process of a pod's first container, without namespace and mounts.
pub(crate) fn launch(pod: &Pod, place: &Place) -> Launch {
    let none = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&none);
    let Some(container) = spec.containers.first() else {
        return Launch::default();
    };
    let env = environment(pod, container, place);
    let words = container.command.iter().chain(&container.args).flatten();
    Launch {
        argv: words.map(|word| expand(word, &env)).collect(),
        env,
        hostname: pod.metadata.name.clone(),
        workdir: container.working_dir.as_ref().map(PathBuf::from),
        user: user(spec, container),
        ..Launch::default()
    }
}

/// `runAsUser` and `runAsGroup` of the container, else of the pod.
pub(crate) fn user(spec: &PodSpec, container: &Container) -> Option<(u32, u32)> {
    let own = container.security_context.as_ref();
    let pods = spec.security_context.as_ref();
    let uid = own
        .and_then(|s| s.run_as_user)
        .or(pods.and_then(|s| s.run_as_user))?;
    let gid = own
        .and_then(|s| s.run_as_group)
        .or(pods.and_then(|s| s.run_as_group))
        .unwrap_or(0);
    Some((u32::try_from(uid).ok()?, u32::try_from(gid).ok()?))
}

fn environment(pod: &Pod, container: &Container, place: &Place) -> BTreeMap<String, String> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let mut env: BTreeMap<String, String> = [
        ("PATH", DEFAULT_PATH.to_owned()),
        ("HOME", "/tmp".into()),
        ("LANG", "C.UTF-8".into()),
        ("HOSTNAME", name),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v))
    .collect();
    for variable in container.env.iter().flatten() {
        // Kubernetes: references to variables that stand before it.
        let value = value(variable, pod, place).map(|v| expand(&v, &env));
        if let Some(value) = value {
            env.insert(variable.name.clone(), value);
        }
    }
    env
}

/// `None`: it refers to something that the lab does not have.
fn value(variable: &EnvVar, pod: &Pod, place: &Place) -> Option<String> {
    let Some(from) = &variable.value_from else {
        return Some(variable.value.clone().unwrap_or_default());
    };
    let path = from.field_ref.as_ref()?.field_path.as_str();
    let spec = pod.spec.as_ref();
    let key = |map: &Option<BTreeMap<String, String>>, prefix: &str| {
        let key = path.strip_prefix(prefix)?.strip_suffix("']")?;
        map.as_ref()?.get(key).cloned()
    };
    let text = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    match path {
        "metadata.name" => pod.metadata.name.clone(),
        "metadata.namespace" => pod.metadata.namespace.clone(),
        "metadata.uid" => pod.metadata.uid.clone(),
        "spec.nodeName" => spec?.node_name.clone(),
        "spec.serviceAccountName" => spec?.service_account_name.clone(),
        "status.hostIP" => Some(place.host_ip.clone()),
        "status.podIP" => text(&place.ips).into_iter().next(),
        "status.podIPs" => Some(text(&place.ips).join(",")),
        _ => key(&pod.metadata.labels, "metadata.labels['")
            .or_else(|| key(&pod.metadata.annotations, "metadata.annotations['")),
    }
}

/// Replaces `$(NAME)`; `$$` is a dollar sign; an unknown name stays as it is (Kubernetes' rule).
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let reference = rest.strip_prefix("$(").and_then(|r| r.split_once(')'));
        if rest.starts_with("$$") {
            out.push('$');
            rest = &rest[2..];
        } else if let Some((name, after)) = reference {
            match env.get(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&rest[..name.len() + 3]),
            }
            rest = after;
        } else {
            out.push('$');
            rest = &rest[1..];
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_expanded_as_kubernetes_does() {
        let env = BTreeMap::from([("A".to_owned(), "x".to_owned())]);
        for (text, expanded) in [
            ("$(A)-$(A)", "x-x"),
            ("$$(A)", "$(A)"),
            ("$(B) $ $A $(", "$(B) $ $A $("),
            ("ä$(A)ö", "äxö"),
        ] {
            assert_eq!(expand(text, &env), expanded, "{text}");
        }
    }

    #[test]
    fn the_process_is_what_the_manifest_says() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web-1", "labels": {"app": "web"}},
            "spec": {"nodeName": "node-1", "securityContext": {"runAsUser": 7}, "containers": [{
                "name": "c", "command": ["serve", "$(PORT)"], "args": ["--ip=$(IP)"],
                "env": [
                    {"name": "PORT", "value": "80"},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                ],
            }]},
        }))
        .unwrap();
        let ips = vec!["10.0.0.1".parse().unwrap()];
        let launch = launch(
            &pod,
            &Place {
                ips,
                host_ip: String::new(),
            },
        );
        assert_eq!(launch.argv, ["serve", "80", "--ip=10.0.0.1"]);
        assert_eq!(launch.env["HOSTNAME"], "web-1");
        assert_eq!(launch.env["APP"], "web");
        assert_eq!(launch.user, Some((7, 0)));
    }
}
