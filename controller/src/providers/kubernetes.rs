//! A Kubernetes API server as a provider: lists and watches, kept up through everything that ends a watch.
//!
//! Of every object only what the mesh uses is kept ([`trim`]), so that memory grows with what matters and a
//! change of anything else wakes nobody. The kinds of the Gateway API and Warren's own are watched from the
//! moment that their CRD is served, and are empty before and after ([`custom`]). NetworkPolicies are beside all that:
//! no node is told of them ([`network`]).
//!
//! Invariants: nothing is shown before every kind was listed once, since enrolled pods that are not shown are
//! taken for gone. An object that cannot be read leaves its last good version in force. A watch that fails
//! leaves everything in force and is taken up again, with a new list where the API server asks for one.

mod custom;
pub mod network;
#[cfg(test)]
mod tests;
mod trim;
mod watched;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::DynamicObject;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::Instant;

pub use self::custom::Seen;
pub(crate) use self::custom::api_resource;
use self::custom::{CUSTOM_KINDS, CustomKind};
use self::network::Policy;
pub(crate) use self::watched::watched;
use super::{NamespacedName, Object, ObjectKey, Objects};
use crate::config;
use crate::metrics::{KindLabel, Metrics};

/// Why the API server cannot be spoken to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig, or what a pod is given in its place.
    #[error("provider.kubernetes: {0}")]
    Config(String),
    /// The client could not be made of it.
    #[error("provider.kubernetes: {0}")]
    Client(#[from] kube::Error),
}

/// Reads how to reach the API server, and makes the client. Nothing is sent yet.
pub async fn connect(config: &config::Kubernetes) -> Result<Client, ConnectError> {
    let mistake = |error: &dyn fmt::Display| ConnectError::Config(error.to_string());
    let mut found = match &config.kubeconfig {
        Some(path) => {
            let options = KubeConfigOptions::default();
            let kubeconfig = Kubeconfig::read_from(Path::new(path)).map_err(|e| mistake(&e))?;
            let read = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
            read.map_err(|e| mistake(&e))?
        }
        None => kube::Config::infer().await.map_err(|e| mistake(&e))?,
    };
    found.connect_timeout = Some(CONNECT_TIMEOUT);
    Ok(Client::try_from(found)?)
}

/// What the watches have brought so far, and the watches.
pub struct Reader {
    client: Client,
    metrics: Metrics,
    streams: SelectAll<BoxStream<'static, Change>>,
    /// Kinds with a CRD that are watched: their version, and what ends the watch.
    active: BTreeMap<&'static str, Active>,
    objects: Objects,
    /// Names seen since the list of a kind began; absent: no list is under way.
    listing: BTreeMap<&'static str, HashSet<(String, String)>>,
    /// Kinds whose first list is not complete.
    waiting: BTreeSet<&'static str>,
    failing: BTreeSet<&'static str>,
    /// The objects are others than those last returned.
    dirty: bool,
    /// How far pods were read: the newest version of one.
    version: u64,
    shared: Arc<Shared>,
}

/// What was read.
#[derive(Debug)]
pub struct Read {
    /// Everything that is in force; absent: the same as before.
    pub objects: Option<Objects>,
    /// How far pods were read. Versions of one kind of objects can be compared (KEP-5504).
    pub version: u64,
}

/// What other parts may look at while the reader reads.
#[derive(Debug)]
pub struct Shared {
    /// Objects that cannot be read, and why.
    mistakes: Mutex<BTreeMap<ObjectKey, String>>,
    /// Routes and policies as the API server has them.
    seen: Mutex<BTreeMap<ObjectKey, Seen>>,
    /// The versions of kinds with a CRD that are served; changes also with `seen`.
    served: watch::Sender<BTreeMap<&'static str, &'static str>>,
    /// What the first complete list still waits for.
    waiting: Mutex<Vec<&'static str>>,
    /// NetworkPolicies that may refuse a connection between pods; replaced when one changes.
    policies: Mutex<Arc<Policies>>,
}

/// NetworkPolicies by namespace and name.
pub type Policies = BTreeMap<NamespacedName, Policy>;

#[derive(Debug)]
struct Active {
    version: &'static str,
    /// Dropped, it ends the watch.
    _stop: tokio::sync::oneshot::Sender<()>,
}

/// One event of one watch.
enum Change {
    /// Of a kind that every API server has, or of one with a CRD.
    Object {
        kind: &'static str,
        event: Event<Box<Object>>,
        version: u64,
    },
    /// A custom object that is read here, as it may be mistaken.
    Custom {
        kind: &'static CustomKind,
        version: &'static str,
        event: Event<Box<DynamicObject>>,
    },
    /// The CRD of a kind.
    Definition {
        kind: &'static CustomKind,
        event: Event<Box<DynamicObject>>,
    },
    /// Its name, and the policy if it may refuse anything.
    Policy {
        event: Event<(NamespacedName, Option<Policy>)>,
    },
    Failed {
        kind: &'static str,
        error: String,
    },
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("active", &self.active)
            .field("waiting", &self.waiting)
            .finish_non_exhaustive()
    }
}

impl Reader {
    /// Starts to watch; reads nothing before it is polled.
    pub fn new(client: &Client, metrics: &Metrics) -> Self {
        let mut reader = Self {
            client: client.clone(),
            metrics: metrics.clone(),
            streams: SelectAll::new(),
            active: BTreeMap::new(),
            objects: Objects::default(),
            listing: BTreeMap::new(),
            waiting: BTreeSet::new(),
            failing: BTreeSet::new(),
            dirty: false,
            version: 0,
            shared: Arc::new(Shared {
                mistakes: Mutex::default(),
                seen: Mutex::default(),
                served: watch::Sender::default(),
                waiting: Mutex::default(),
                policies: Mutex::default(),
            }),
        };
        let all = watcher::Config::default();
        // Pods that are not bound or are finished are not for the mesh, and there may be many.
        let running = watcher::Config::default()
            .fields("spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed");
        reader.follow::<Namespace>("Namespace", all.clone(), trim::namespace);
        reader.follow::<Node>("Node", all.clone(), trim::node);
        reader.follow::<Pod>("Pod", running, trim::pod);
        reader.follow::<Service>("Service", all.clone(), trim::service);
        reader.follow::<EndpointSlice>("EndpointSlice", all.clone(), trim::slice);
        reader.follow_policies(all);
        for kind in &CUSTOM_KINDS {
            reader.follow_definition(kind);
        }
        reader.tell_waiting();
        reader
    }

    /// What other parts may look at.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Reads until every kind was listed once.
    pub async fn listed(&mut self) -> (Objects, u64) {
        while !self.waiting.is_empty() {
            self.next().await;
        }
        self.dirty = false;
        (self.objects.clone(), self.version)
    }

    /// Waits for the next changes. Cancel safe.
    pub async fn changed(&mut self) -> Read {
        let before = self.version;
        while !self.dirty && self.version == before {
            self.next().await;
        }
        // Most changes come in bunches: a rollout, a list after an outage.
        let last = Instant::now() + LONGEST_GATHERING;
        loop {
            let pause = last.min(Instant::now() + PAUSE);
            let until = if self.listing.is_empty() { pause } else { last };
            let more = tokio::time::timeout_at(until, self.next()).await.is_ok();
            if !more || Instant::now() >= last {
                break;
            }
        }
        let dirty = std::mem::take(&mut self.dirty);
        Read {
            objects: dirty.then(|| self.objects.clone()),
            version: self.version,
        }
    }

    /// Takes one event.
    async fn next(&mut self) {
        match self.streams.next().await {
            Some(change) => self.take(change),
            // The watches of CRDs never end.
            None => std::future::pending().await,
        }
    }

    fn follow<K>(&mut self, kind: &'static str, config: watcher::Config, trim: fn(K) -> Object)
    where
        K: kube::Resource<DynamicType = ()> + DeserializeOwned + Clone + fmt::Debug,
        K: Send + 'static,
    {
        self.waiting.insert(kind);
        let api = Api::<K>::all(self.client.clone());
        let stream = watched(api, config);
        let changes = stream.map(move |event| match event {
            Ok(event) => {
                let mut version = 0;
                let event = map(event, |object: K| {
                    let text = object.meta().resource_version.as_deref();
                    version = text.and_then(|v| v.parse().ok()).unwrap_or(0);
                    Box::new(trim(object))
                });
                Change::Object {
                    kind,
                    event,
                    version,
                }
            }
            Err(error) => Change::failed(kind, &error),
        });
        self.streams.push(changes.boxed());
    }

    /// Nothing waits for them: what nodes are told does not depend on them.
    fn follow_policies(&mut self, config: watcher::Config) {
        let stream = watched(Api::<NetworkPolicy>::all(self.client.clone()), config);
        let changes = stream.map(|event| match event {
            Ok(event) => Change::Policy {
                event: map(event, |policy: NetworkPolicy| {
                    let metadata = &policy.metadata;
                    let namespace = metadata.namespace.clone().unwrap_or_default();
                    let name = metadata.name.clone().unwrap_or_default();
                    ((namespace, name), Policy::of(policy))
                }),
            },
            Err(error) => Change::failed(NETWORK_POLICY, &error),
        });
        self.streams.push(changes.boxed());
    }

    fn take_policy(&mut self, event: Event<(NamespacedName, Option<Policy>)>) {
        self.works_again(NETWORK_POLICY, matches!(event, Event::Init));
        let mut policies = self.shared.policies.lock();
        match event {
            Event::Init => {
                self.listing.insert(NETWORK_POLICY, HashSet::new());
            }
            Event::InitApply((name, policy)) | Event::Apply((name, policy)) => {
                if let Some(seen) = self.listing.get_mut(NETWORK_POLICY) {
                    seen.insert(name.clone());
                }
                if policies.get(&name) != policy.as_ref() {
                    let policies = Arc::make_mut(&mut policies);
                    match policy {
                        Some(policy) => policies.insert(name, policy),
                        None => policies.remove(&name),
                    };
                }
            }
            Event::InitDone => {
                let listed = self.listing.remove(NETWORK_POLICY).unwrap_or_default();
                if policies.keys().any(|name| !listed.contains(name)) {
                    Arc::make_mut(&mut policies).retain(|name, _| listed.contains(name));
                }
            }
            Event::Delete((name, _)) => {
                if policies.contains_key(&name) {
                    Arc::make_mut(&mut policies).remove(&name);
                }
            }
        }
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::Policy { event } => self.take_policy(event),
            Change::Object {
                kind,
                event,
                version,
            } => {
                self.works_again(kind, matches!(event, Event::Init));
                match event {
                    Event::Init => self.begin(kind),
                    Event::InitApply(object) | Event::Apply(object) => self.insert(kind, *object),
                    Event::InitDone => self.end(kind),
                    Event::Delete(object) => self.remove(&object.key()),
                }
                if kind == "Pod" {
                    self.version = self.version.max(version);
                }
            }
            Change::Custom {
                kind,
                version,
                event,
            } => {
                self.works_again(kind.kind, matches!(event, Event::Init));
                match event {
                    Event::Init => self.begin(kind.kind),
                    Event::InitApply(object) | Event::Apply(object) => {
                        self.read(kind, version, *object);
                    }
                    Event::InitDone => self.end(kind.kind),
                    Event::Delete(object) => self.remove(&kind.key(&object)),
                }
            }
            Change::Definition { kind, event } => {
                self.works_again(kind.definition, matches!(event, Event::Init));
                match event {
                    Event::Init => self.begin(kind.definition),
                    Event::InitApply(definition) | Event::Apply(definition) => {
                        if let Some(seen) = self.listing.get_mut(kind.definition) {
                            seen.insert((String::new(), kind.definition.into()));
                        }
                        self.serve(kind, kind.served(&definition));
                    }
                    Event::InitDone => {
                        let listed = self.listing.remove(kind.definition);
                        if listed.is_some_and(|seen| seen.is_empty()) {
                            self.serve(kind, None);
                        }
                        self.end(kind.definition);
                    }
                    Event::Delete(_) => self.serve(kind, None),
                }
            }
            Change::Failed { kind, error } => {
                let label = KindLabel { kind: kind.into() };
                let failures = &self.metrics.watch_failures;
                failures.get_or_create_owned(&label).inc();
                if self.failing.insert(kind) {
                    tracing::warn!(
                        kind,
                        "cannot be watched, what is known stays in force: {error}"
                    );
                }
            }
        }
    }

    /// A list that begins, or is under way, says nothing yet; its end and events do.
    fn works_again(&mut self, kind: &'static str, begins: bool) {
        if !begins && self.failing.contains(kind) && !self.listing.contains_key(kind) {
            self.failing.remove(kind);
            tracing::info!(kind, "is watched again");
        }
    }

    fn begin(&mut self, kind: &'static str) {
        self.listing.insert(kind, HashSet::new());
    }

    fn end(&mut self, kind: &'static str) {
        if let Some(seen) = self.listing.remove(kind) {
            let listed = |namespace: &str, name: &str| {
                // Only looked up: the strings are not kept.
                seen.contains(&(namespace.to_owned(), name.to_owned()))
            };
            self.dirty |= self.objects.retain(kind, listed);
            self.forget(|key| key.kind == kind && !listed(&key.namespace, &key.name));
        }
        self.works_again(kind, false);
        self.waiting.remove(kind);
        self.tell_waiting();
    }

    fn insert(&mut self, kind: &'static str, object: Object) {
        let key = object.key();
        if let Some(seen) = self.listing.get_mut(kind) {
            seen.insert((key.namespace, key.name));
        }
        self.dirty |= self.objects.insert(object);
    }

    fn remove(&mut self, key: &ObjectKey) {
        self.dirty |= self.objects.retain(&key.kind, |namespace, name| {
            (namespace, name) != (&key.namespace, &key.name)
        });
        self.forget(|known| known == key);
    }

    fn forget(&self, which: impl Fn(&ObjectKey) -> bool) {
        self.shared.mistakes.lock().retain(|key, _| !which(key));
        self.shared.seen.lock().retain(|key, _| !which(key));
        let count = self.shared.mistakes.lock().len();
        self.metrics.manifest_mistakes.set(count as i64);
    }

    fn tell_waiting(&self) {
        *self.shared.waiting.lock() = self.waiting.iter().copied().collect();
    }
}

impl Shared {
    /// Objects that cannot be read, and why.
    pub fn mistakes(&self) -> BTreeMap<ObjectKey, String> {
        self.mistakes.lock().clone()
    }

    /// What the first complete list still waits for: kinds, and names of CRDs.
    pub fn waiting(&self) -> Vec<&'static str> {
        self.waiting.lock().clone()
    }

    /// Routes and policies as the API server has them, as far as `wanted` makes something of them.
    pub fn seen<T>(&self, wanted: impl FnMut((&ObjectKey, &Seen)) -> Option<T>) -> Vec<T> {
        self.seen.lock().iter().filter_map(wanted).collect()
    }

    /// The UID of a route or policy.
    pub fn uid(&self, key: &ObjectKey) -> Option<String> {
        Some(self.seen.lock().get(key)?.uid.clone())
    }

    /// NetworkPolicies that may refuse a connection between pods; the same `Arc` until one changes.
    pub fn policies(&self) -> Arc<Policies> {
        self.policies.lock().clone()
    }

    /// Changes with what is served, and with routes and policies.
    pub fn changes(&self) -> watch::Receiver<BTreeMap<&'static str, &'static str>> {
        self.served.subscribe()
    }
}

impl Change {
    fn failed(kind: &'static str, error: &watcher::Error) -> Self {
        // The cause is in the chain and says more than the head.
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            let said = cause.to_string();
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            source = cause.source();
        }
        Change::Failed { kind, error: text }
    }
}

fn map<A, B>(event: Event<A>, mut f: impl FnMut(A) -> B) -> Event<B> {
    match event {
        Event::Init => Event::Init,
        Event::InitApply(object) => Event::InitApply(f(object)),
        Event::InitDone => Event::InitDone,
        Event::Apply(object) => Event::Apply(f(object)),
        Event::Delete(object) => Event::Delete(f(object)),
    }
}

const NETWORK_POLICY: &str = "NetworkPolicy";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_GATHERING: Duration = Duration::from_millis(300);
