//! Deployments: which pods to make and which to delete, as a pure function of what there is.
//!
//! Rolling updates go with a surge of one and none unavailable, as Kubernetes' defaults (25 %) do for small
//! numbers; `strategy: Recreate` is honoured.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use tokio::sync::watch;

use super::cluster::{Key, Life, PodRecord};
use super::names::short_hash;

/// A pod of a Deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owned {
    pub(crate) name: String,
    /// Hash of the template it was made from.
    pub(crate) hash: String,
    pub(crate) ready: bool,
    pub(crate) terminating: bool,
}

/// What to do next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) create: usize,
    pub(crate) delete: Vec<String>,
}

/// The next step towards `replicas` pods of template `hash`.
pub(crate) fn next_step(replicas: usize, hash: &str, recreate: bool, pods: &[Owned]) -> Step {
    let live = || pods.iter().filter(|p| !p.terminating);
    // Not ready first: they are missed least.
    let sorted = |new: bool| {
        let mut found: Vec<&Owned> = live().filter(|p| (p.hash == hash) == new).collect();
        found.sort_by_key(|p| p.ready);
        found
    };
    let (new, old) = (sorted(true), sorted(false));
    let mut step = Step::default();
    let surplus = new.len().saturating_sub(replicas);
    step.delete
        .extend(new.iter().take(surplus).map(|p| p.name.clone()));
    if recreate {
        step.delete.extend(old.iter().map(|p| p.name.clone()));
        if pods.iter().all(|p| p.hash == hash) {
            step.create = replicas.saturating_sub(new.len());
        }
        return step;
    }
    let mut available = live().filter(|p| p.ready).count();
    for pod in &old {
        if !pod.ready {
            step.delete.push(pod.name.clone());
        } else if available > replicas {
            step.delete.push(pod.name.clone());
            available -= 1;
        }
    }
    let total = live().count() - step.delete.len();
    let missing = replicas.saturating_sub(new.len());
    step.create = missing.min((replicas + SURGE).saturating_sub(total));
    step
}

const SURGE: usize = 1;

/// How many pods are wanted.
pub(crate) fn replicas(deployment: &Deployment) -> usize {
    let replicas = deployment
        .spec
        .as_ref()
        .and_then(|s| s.replicas)
        .unwrap_or(1);
    usize::try_from(replicas).unwrap_or(0)
}

/// Whether all old pods go before new ones come.
pub(crate) fn recreates(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|s| s.strategy.as_ref());
    strategy.and_then(|s| s.type_.as_deref()) == Some("Recreate")
}

/// The template, with the annotation that `rollout restart` sets.
pub(crate) fn template(deployment: &Deployment, restarted: Option<&str>) -> PodTemplateSpec {
    let spec = deployment.spec.as_ref();
    let mut template = spec.map(|s| s.template.clone()).unwrap_or_default();
    if let Some(restarted) = restarted {
        let metadata = template.metadata.get_or_insert_default();
        let annotations = metadata.annotations.get_or_insert_default();
        annotations.insert(RESTARTED_AT.into(), restarted.into());
    }
    template
}

/// Tells templates apart.
pub(crate) fn template_hash(template: &PodTemplateSpec) -> String {
    // Typed objects have ordered maps and always serialise.
    short_hash(&serde_json::to_vec(template).unwrap_or_default())
}

/// Whether a selector's labels are all there.
pub(crate) fn selects(
    selector: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// A new pod of a Deployment, owned as the ReplicaSet controller would have it.
pub(crate) fn pod_of(
    (namespace, deployment): &Key,
    owner: &(String, String),
    template: &PodTemplateSpec,
) -> PodRecord {
    let hash = &owner.1;
    let mut pod = Pod {
        metadata: template.metadata.clone().unwrap_or_default(),
        spec: template.spec.clone(),
        ..Pod::default()
    };
    let metadata = &mut pod.metadata;
    metadata.name = Some(format!("{deployment}-{hash}-{}", random_name()));
    metadata.namespace = Some(namespace.clone());
    metadata
        .labels
        .get_or_insert_default()
        .insert("pod-template-hash".into(), hash.clone());
    metadata.owner_references = Some(vec![OwnerReference {
        api_version: "apps/v1".into(),
        kind: "ReplicaSet".into(),
        name: format!("{deployment}-{hash}"),
        uid: format!("{deployment}-{hash}"),
        controller: Some(true),
        ..OwnerReference::default()
    }]);
    PodRecord {
        manifest: pod,
        written: None,
        owner: Some(owner.clone()),
        life: Life::default(),
        stop: watch::Sender::new(None),
    }
}

/// Five characters, of those that Kubernetes uses: none that make words or look alike.
fn random_name() -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..5)
        .map(|_| char::from(LETTERS[rand::random_range(0..LETTERS.len())]))
        .collect()
}

/// The same as `kubectl rollout restart` uses.
const RESTARTED_AT: &str = "kubectl.kubernetes.io/restartedAt";

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, hash: &str, ready: bool) -> Owned {
        Owned {
            name: name.into(),
            hash: hash.into(),
            ready,
            terminating: false,
        }
    }

    fn step(create: usize, delete: &[&str]) -> Step {
        Step {
            create,
            delete: delete.iter().map(|d| (*d).into()).collect(),
        }
    }

    #[test]
    fn scales_up_and_down() {
        assert_eq!(next_step(2, "h", false, &[]), step(2, &[]));
        let pods = [
            pod("a", "h", true),
            pod("b", "h", false),
            pod("c", "h", true),
        ];
        assert_eq!(next_step(2, "h", false, &pods), step(0, &["b"]));
        assert_eq!(next_step(0, "h", false, &pods), step(0, &["b", "a", "c"]));
    }

    #[test]
    fn rolls_one_by_one_and_never_below_what_is_wanted() {
        let mut pods = vec![pod("a", "old", true), pod("b", "old", true)];
        assert_eq!(next_step(2, "new", false, &pods), step(1, &[]));
        pods.push(pod("c", "new", false));
        assert_eq!(next_step(2, "new", false, &pods), step(0, &[]));
        pods[2].ready = true;
        assert_eq!(next_step(2, "new", false, &pods), step(1, &["a"]));
        pods[0].terminating = true;
        pods.push(pod("d", "new", true));
        assert_eq!(next_step(2, "new", false, &pods), step(0, &["b"]));
    }

    #[test]
    fn a_broken_old_pod_does_not_stand_in_the_way() {
        let pods = [pod("a", "old", false)];
        assert_eq!(next_step(1, "new", false, &pods), step(1, &["a"]));
    }

    #[test]
    fn recreate_waits_for_the_old_to_be_gone() {
        let mut pods = vec![pod("a", "old", true)];
        assert_eq!(next_step(1, "new", true, &pods), step(0, &["a"]));
        pods[0].terminating = true;
        assert_eq!(next_step(1, "new", true, &pods), step(0, &[]));
        assert_eq!(next_step(1, "new", true, &[]), step(1, &[]));
    }

    #[test]
    fn a_restart_changes_the_hash() {
        let deployment = Deployment::default();
        let before = template_hash(&template(&deployment, None));
        assert_ne!(before, template_hash(&template(&deployment, Some("now"))));
    }
}
