use hyper::Method;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::fake_api::{Answer, Asked, client, failure};

/// An API server's collections, as a test sets them: what a list answers, and the open watches.
#[derive(Clone, Default)]
struct Cluster(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    lists: BTreeMap<String, Vec<Value>>,
    watches: BTreeMap<String, mpsc::Sender<Value>>,
    /// Collections whose next watch begins with its expiry.
    expired: BTreeSet<String>,
    /// Collections whose next watch is refused as expired.
    refused: BTreeSet<String>,
    down: bool,
}

impl Cluster {
    fn answer(&self, asked: &Asked) -> Answer {
        assert_eq!(asked.method, Method::GET, "{asked:?}");
        let (path, query) = asked.target.split_once('?').unwrap();
        // CRDs are watched one by one.
        let name = query
            .split('&')
            .find_map(|p| p.strip_prefix("fieldSelector=metadata.name%3D"));
        let collection = match name.filter(|_| path.contains("customresourcedefinitions")) {
            Some(name) => name.to_owned(),
            None => path.rsplit('/').next().unwrap().to_owned(),
        };
        let mut state = self.0.lock();
        if state.down {
            return failure(503, "ServiceUnavailable");
        }
        if query.contains("watch=true") {
            if state.refused.remove(&collection) {
                return failure(410, "Expired");
            }
            let (sender, events) = mpsc::channel(16);
            if state.expired.remove(&collection) {
                // As an API server says it: in a watch that begins and ends with it.
                sender.try_send(expired()).unwrap();
                return Answer::Watch(events);
            }
            state.watches.insert(collection, sender);
            return Answer::Watch(events);
        }
        let items = state.lists.get(&collection).cloned().unwrap_or_default();
        let list = json!({
            "apiVersion": "v1", "kind": "List", "metadata": { "resourceVersion": "1" }, "items": items,
        });
        Answer::Json(200, list)
    }

    fn set(&self, collection: &str, items: &[Value]) {
        self.0
            .lock()
            .lists
            .insert(collection.into(), items.to_vec());
    }

    async fn event(&self, collection: &str, kind: &str, object: Value) {
        let sender = self.0.lock().watches.get(collection).cloned();
        let event = json!({ "type": kind, "object": object });
        sender
            .expect("no watch")
            .send(event)
            .await
            .expect("the watch is closed");
    }

    /// Ends the watches of a collection.
    fn hang_up(&self, collection: &str) {
        assert!(self.0.lock().watches.remove(collection).is_some());
    }

    fn reader(&self) -> Reader {
        let cluster = self.clone();
        let (client, _) = client(move |asked| cluster.answer(asked));
        Reader::new(&client, &Metrics::default())
    }
}

fn expired() -> Value {
    let status = json!({ "kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "" });
    json!({ "type": "ERROR", "object": status })
}

fn pod(name: &str, version: u64) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "demo", "uid": name, "resourceVersion": version.to_string(),
            "labels": { "app": "x" }, "annotations": { "a": "b", "warren-mesh.io/enrolled": "{}" }, "managedFields": [{}],
        },
        "spec": {
            "nodeName": "node-1", "serviceAccountName": "web",
            "containers": [{ "name": "c", "image": "x", "env": [{ "name": "SECRET" }] }],
        },
        "status": { "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }] },
    })
}

fn definition(name: &str, served: bool) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": name, "resourceVersion": "2" },
        "spec": { "versions": [{ "name": "v1", "served": served, "schema": {} }] },
        "status": { "conditions": [{ "type": "Established", "status": "True" }] },
    })
}

fn route(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": { "name": name, "namespace": "demo", "resourceVersion": "3", "generation": 1 },
        "spec": spec, "status": { "parents": [] },
    })
}

const ROUTES: &str = "httproutes.gateway.networking.k8s.io";

fn names(objects: &Objects) -> Vec<&str> {
    objects.pods.keys().map(|(_, name)| name.as_str()).collect()
}

async fn until(reader: &mut Reader, wanted: impl Fn(&Reader) -> bool) {
    let reached = async {
        while !wanted(reader) {
            reader.next().await;
        }
    };
    let limit = std::time::Duration::from_secs(20);
    assert!(
        tokio::time::timeout(limit, reached).await.is_ok(),
        "never came to pass"
    );
}

#[tokio::test]
async fn what_is_not_used_is_not_kept_and_wakes_nobody() {
    let cluster = Cluster::default();
    cluster.set("pods", &[pod("a", 5)]);
    let mut reader = cluster.reader();
    let (objects, version) = reader.listed().await;
    assert_eq!(version, 5);
    let kept = &objects.pods[&("demo".to_owned(), "a".to_owned())];
    assert_eq!(kept.metadata.annotations.as_ref().unwrap().len(), 1);
    assert_eq!(kept.metadata.labels.as_ref().unwrap()["app"], "x");
    assert!(kept.metadata.managed_fields.is_none());
    let spec = kept.spec.as_ref().unwrap();
    assert!(spec.containers[0].image.is_none() && spec.containers[0].env.is_none());
    assert_eq!(spec.service_account_name.as_deref(), Some("web"));
}

/// The taint of its node depends on it.
#[tokio::test]
async fn of_agents_and_nodes_it_is_kept_whether_they_are_ready() {
    let cluster = Cluster::default();
    let of = |kind, ready| json!([{ "type": kind, "status": "True" }, { "type": "Ready", "status": ready }]);
    let mut agent = pod("a", 5);
    agent["metadata"]["namespace"] = json!("warren-system");
    agent["spec"]["serviceAccountName"] = json!("warren-cni");
    agent["status"]["conditions"] = of("PodScheduled", "False");
    cluster.set("pods", &[agent]);
    let node = json!({
        "metadata": { "name": "node-1", "resourceVersion": "6" },
        "status": { "conditions": of("MemoryPressure", "Unknown") },
    });
    cluster.set("nodes", &[node]);
    let mut reader = cluster.reader();
    let (objects, _) = reader.listed().await;
    let kept = &objects.pods[&("warren-system".to_owned(), "a".to_owned())];
    let conditions = kept.status.as_ref().unwrap().conditions.as_ref().unwrap();
    assert_eq!((conditions.len(), &*conditions[0].status), (1, "False"));
    let kept = objects.nodes["node-1"].status.as_ref().unwrap();
    let conditions = kept.conditions.as_ref().unwrap();
    assert_eq!((conditions.len(), &*conditions[0].status), (1, "Unknown"));
}

#[tokio::test]
async fn events_change_what_is_in_force() {
    let cluster = Cluster::default();
    cluster.set("pods", &[pod("a", 5)]);
    let mut reader = cluster.reader();
    reader.listed().await;
    is_watched(&mut reader, &cluster, "pods").await;
    let mut other = pod("a", 6);
    other["status"]["conditions"] = json!([{ "type": "Ready", "status": "True" }]);
    cluster.event("pods", "MODIFIED", other).await;
    let read = reader.changed().await;
    assert!(read.objects.is_none(), "a condition is not used");
    assert_eq!(read.version, 6);
    cluster.event("pods", "ADDED", pod("b", 7)).await;
    cluster.event("pods", "DELETED", pod("a", 8)).await;
    until(&mut reader, |r| names(&r.objects) == ["b"]).await;
}

/// Waits until the collection is watched.
async fn is_watched(reader: &mut Reader, cluster: &Cluster, collection: &str) {
    while !cluster.0.lock().watches.contains_key(collection) {
        // Only drives the watches.
        let _ = tokio::time::timeout(std::time::Duration::from_millis(10), reader.next()).await;
    }
}

#[tokio::test]
async fn a_watch_that_ends_expires_or_fails_is_taken_up_again() {
    let cluster = Cluster::default();
    cluster.set("pods", &[pod("a", 5), pod("b", 5)]);
    let mut reader = cluster.reader();
    reader.listed().await;
    is_watched(&mut reader, &cluster, "pods").await;

    // Expired: listed anew, and what went away meanwhile is gone.
    cluster.set("pods", &[pod("b", 5), pod("c", 9)]);
    cluster.0.lock().expired.insert("pods".into());
    cluster.hang_up("pods");
    until(&mut reader, |r| names(&r.objects) == ["b", "c"]).await;

    // The same, said by a refusal.
    is_watched(&mut reader, &cluster, "pods").await;
    cluster.set("pods", &[pod("c", 9), pod("f", 9)]);
    cluster.0.lock().refused.insert("pods".into());
    cluster.hang_up("pods");
    until(&mut reader, |r| names(&r.objects) == ["c", "f"]).await;

    // Expired in the middle of a watch.
    is_watched(&mut reader, &cluster, "pods").await;
    cluster.set("pods", &[pod("d", 10)]);
    cluster
        .event("pods", "ERROR", expired()["object"].clone())
        .await;
    until(&mut reader, |r| names(&r.objects) == ["d"]).await;

    // Away: everything stays in force, and what happened is found out afterwards.
    is_watched(&mut reader, &cluster, "pods").await;
    cluster.0.lock().down = true;
    cluster.hang_up("pods");
    while reader.failing.is_empty() {
        reader.next().await;
    }
    assert_eq!(names(&reader.objects), ["d"]);
    cluster.set("pods", &[pod("e", 20)]);
    cluster.0.lock().expired.insert("pods".into());
    cluster.0.lock().down = false;
    until(&mut reader, |r| names(&r.objects) == ["e"]).await;
    assert!(reader.failing.is_empty());
}

#[tokio::test]
async fn a_kind_is_watched_while_its_definition_is_served() {
    let cluster = Cluster::default();
    let mut reader = cluster.reader();
    reader.listed().await;
    is_watched(&mut reader, &cluster, ROUTES).await;
    cluster.set(
        "httproutes",
        &[route("r", json!({ "parentRefs": [{ "name": "web" }] }))],
    );
    cluster
        .event(ROUTES, "ADDED", definition(ROUTES, true))
        .await;
    until(&mut reader, |r| r.objects.http_routes.len() == 1).await;
    let seen = reader.shared().seen(|(_, seen)| Some(seen.clone()));
    assert_eq!(seen[0].resource.api_version, "gateway.networking.k8s.io/v1");

    cluster
        .event(ROUTES, "MODIFIED", definition(ROUTES, false))
        .await;
    until(&mut reader, |r| r.objects.http_routes.is_empty()).await;
    assert!(reader.shared().seen(|_| Some(())).is_empty());
    let sender = cluster.0.lock().watches.get("httproutes").cloned();
    if let Some(sender) = sender {
        // Ended, or about to: nobody reads it any more.
        while !sender.is_closed() {
            let _ = tokio::time::timeout(std::time::Duration::from_millis(10), reader.next()).await;
        }
    }
}

#[tokio::test]
async fn nothing_is_shown_before_everything_was_listed() {
    let cluster = Cluster::default();
    cluster.set(ROUTES, &[definition(ROUTES, true)]);
    cluster.set(
        "httproutes",
        &[route("r", json!({ "parentRefs": [{ "name": "web" }] }))],
    );
    let (objects, _) = cluster.reader().listed().await;
    assert_eq!(
        objects.http_routes.len(),
        1,
        "routes that come later would be missing for a moment"
    );
}

#[tokio::test]
async fn an_object_that_cannot_be_read_leaves_its_last_good_version() {
    let cluster = Cluster::default();
    cluster.set(ROUTES, &[definition(ROUTES, true)]);
    let good = json!({ "parentRefs": [{ "name": "web", "port": 80 }] });
    cluster.set(
        "httproutes",
        &[route("r", good), route("bad", json!({ "rules": 5 }))],
    );
    let mut reader = cluster.reader();
    let (objects, _) = reader.listed().await;
    assert_eq!(
        objects.http_routes.len(),
        1,
        "a mistake costs its own object and nothing else"
    );
    is_watched(&mut reader, &cluster, "httproutes").await;
    let broken = json!({ "parentRefs": [{ "name": "web", "port": "http" }] });
    cluster
        .event("httproutes", "MODIFIED", route("r", broken))
        .await;
    until(&mut reader, |r| r.shared().mistakes().len() == 2).await;
    let mistakes = reader.shared().mistakes();
    let text: Vec<String> = mistakes
        .iter()
        .map(|(key, m)| format!("{key}: {m}"))
        .collect();
    assert!(
        text[0].starts_with("HTTPRoute demo/bad: spec.rules: "),
        "{text:?}"
    );
    assert!(
        text[1].starts_with("HTTPRoute demo/r: spec.parentRefs[0].port: "),
        "{text:?}"
    );
    let kept = &reader.objects.http_routes[&("demo".to_owned(), "r".to_owned())];
    assert_eq!(kept.spec.parent_refs[0].port, Some(80));
    cluster
        .event("httproutes", "DELETED", route("bad", Value::Null))
        .await;
    until(&mut reader, |r| r.shared().mistakes().len() == 1).await;
}

fn network_policy(name: &str, ingress: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "name": name, "namespace": "demo", "uid": name, "resourceVersion": "4", "managedFields": [{}] },
        "spec": { "podSelector": { "matchLabels": { "app": "x" } }, "policyTypes": ["Ingress"], "ingress": ingress },
    })
}

#[tokio::test]
async fn policies_are_kept_as_far_as_they_refuse_and_nothing_waits_for_them() {
    let cluster = Cluster::default();
    let (open, closed) = (json!([{}]), json!([]));
    let items = [
        network_policy("deny", closed.clone()),
        network_policy("open", open.clone()),
    ];
    cluster.set("networkpolicies", &items);
    let mut reader = cluster.reader();
    assert!(!reader.waiting.contains("NetworkPolicy"));
    let names = |reader: &Reader| -> Vec<String> {
        let policies = reader.shared().policies();
        policies.keys().map(|(_, name)| name.clone()).collect()
    };
    until(&mut reader, |r| names(r) == ["deny"]).await;
    is_watched(&mut reader, &cluster, "networkpolicies").await;
    let before = reader.shared().policies();
    cluster
        .event(
            "networkpolicies",
            "MODIFIED",
            network_policy("open", closed.clone()),
        )
        .await;
    until(&mut reader, |r| names(r) == ["deny", "open"]).await;
    assert!(!Arc::ptr_eq(&before, &reader.shared().policies()));
    cluster
        .event("networkpolicies", "MODIFIED", network_policy("open", open))
        .await;
    until(&mut reader, |r| names(r) == ["deny"]).await;
    cluster
        .event(
            "networkpolicies",
            "DELETED",
            network_policy("deny", closed.clone()),
        )
        .await;
    until(&mut reader, |r| names(r).is_empty()).await;

    // What went away while nobody looked.
    cluster
        .event(
            "networkpolicies",
            "ADDED",
            network_policy("deny", closed.clone()),
        )
        .await;
    until(&mut reader, |r| names(r) == ["deny"]).await;
    cluster.set("networkpolicies", &[network_policy("other", closed)]);
    cluster.0.lock().expired.insert("networkpolicies".into());
    cluster.hang_up("networkpolicies");
    until(&mut reader, |r| names(r) == ["other"]).await;
}
