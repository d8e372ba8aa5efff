//! Kinds that come with a CRD: watched in the newest version that is served and known, as long as one is.

use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::watcher;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Active, Change, Reader, map, watched};
use crate::providers::field::{Step, display};
use crate::providers::gateway::Custom;
use crate::providers::object::KINDS;
use crate::providers::{Object, ObjectKey};

/// One of them.
#[derive(Debug)]
pub(super) struct CustomKind {
    pub(super) kind: &'static str,
    /// Name of the CRD: `<plural>.<group>`.
    pub(super) definition: &'static str,
    /// Absent: only whether it is served is of interest.
    read: Option<Read>,
}

/// Makes an object of its metadata, version and spec.
type Read = fn(ObjectMeta, &str, Value) -> Result<Object, String>;

/// A route or policy as the API server has it, for who writes its status.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// `metadata.uid`
    pub uid: String,
    /// `metadata.resourceVersion`
    pub resource_version: String,
    /// `metadata.generation`
    pub generation: Option<i64>,
    /// `status`, whoever wrote it.
    pub status: Value,
    /// How it is reached.
    pub resource: Arc<ApiResource>,
}

impl CustomKind {
    pub(super) fn key(&self, object: &DynamicObject) -> ObjectKey {
        ObjectKey {
            kind: self.kind.into(),
            namespace: object.metadata.namespace.clone().unwrap_or_default(),
            name: object.metadata.name.clone().unwrap_or_default(),
        }
    }

    /// The version to watch, `<group>/<version>`: the first of those known that a CRD serves.
    pub(super) fn served(&self, definition: &DynamicObject) -> Option<&'static str> {
        let established = definition.data["status"]["conditions"]
            .as_array()?
            .iter()
            .any(|c| c["type"] == "Established" && c["status"] == "True");
        let versions = definition.data["spec"]["versions"].as_array()?;
        let serves = |version: &str| {
            let name = version.rsplit('/').next();
            let same = |v: &&Value| v["name"].as_str() == name;
            versions
                .iter()
                .find(same)
                .is_some_and(|v| v["served"] == true)
        };
        let known = KINDS
            .iter()
            .find(|k| k.0 == self.kind)
            .map_or(&XMESH[..], |k| k.1);
        known.iter().copied().find(|v| established && serves(v))
    }

    fn resource(&self, version: &str) -> ApiResource {
        let (plural, _) = self.definition.split_once('.').unwrap_or_default();
        api_resource(version, self.kind, plural)
    }
}

/// `version`: `<group>/<version>`.
pub(crate) fn api_resource(version: &str, kind: &str, plural: &str) -> ApiResource {
    let (group, number) = version.rsplit_once('/').unwrap_or(("", version));
    ApiResource {
        group: group.into(),
        version: number.into(),
        api_version: version.into(),
        kind: kind.into(),
        plural: plural.into(),
    }
}

impl Reader {
    /// Watches the CRD of a kind, and by that the kind.
    pub(super) fn follow_definition(&mut self, kind: &'static CustomKind) {
        self.waiting.insert(kind.definition);
        let api = Api::<DynamicObject>::all_with(self.client.clone(), &definitions());
        let config =
            watcher::Config::default().fields(&format!("metadata.name={}", kind.definition));
        let changes = watched(api, config).map(move |event| match event {
            Ok(event) => Change::Definition {
                kind,
                event: map(event, Box::new),
            },
            Err(error) => Change::failed(kind.definition, &error),
        });
        self.streams.push(changes.boxed());
    }

    /// A kind is served in this version from now on, or not at all.
    pub(super) fn serve(&mut self, kind: &'static CustomKind, version: Option<&'static str>) {
        if self.active.get(kind.kind).map(|a| a.version) == version {
            return;
        }
        // Ends the watch of the version before.
        self.active.remove(kind.kind);
        self.listing.remove(kind.kind);
        self.failing.remove(kind.kind);
        match version {
            Some(version) => {
                tracing::info!(
                    kind = kind.kind,
                    version,
                    "is served, and watched from now on"
                );
                let (stop, stopped) = tokio::sync::oneshot::channel();
                let active = Active {
                    version,
                    _stop: stop,
                };
                self.active.insert(kind.kind, active);
                if kind.read.is_some() {
                    self.waiting.insert(kind.kind);
                    let resource = kind.resource(version);
                    let api = Api::<DynamicObject>::all_with(self.client.clone(), &resource);
                    let stream = watched(api, watcher::Config::default()).take_until(stopped);
                    let changes = stream.map(move |event| match event {
                        Ok(event) => Change::Custom {
                            kind,
                            version,
                            event: map(event, Box::new),
                        },
                        Err(error) => Change::failed(kind.kind, &error),
                    });
                    self.streams.push(changes.boxed());
                }
            }
            None => {
                tracing::info!(kind = kind.kind, "is not served any more");
                self.waiting.remove(kind.kind);
                self.dirty |= self.objects.retain(kind.kind, |_, _| false);
                self.forget(|key| key.kind == kind.kind);
            }
        }
        self.tell_waiting();
        let served = self.active.iter().map(|(kind, a)| (*kind, a.version));
        self.shared.served.send_replace(served.collect());
    }

    /// Takes a custom object. One that cannot be read leaves its last good version in force.
    pub(super) fn read(
        &mut self,
        kind: &'static CustomKind,
        version: &'static str,
        object: DynamicObject,
    ) {
        let Some(read) = kind.read else { return };
        let key = kind.key(&object);
        if let Some(seen) = self.listing.get_mut(kind.kind) {
            seen.insert((key.namespace.clone(), key.name.clone()));
        }
        let DynamicObject {
            metadata, mut data, ..
        } = object;
        let seen = Seen {
            uid: metadata.uid.clone().unwrap_or_default(),
            resource_version: metadata.resource_version.clone().unwrap_or_default(),
            generation: metadata.generation,
            status: data["status"].take(),
            resource: Arc::new(kind.resource(version)),
        };
        self.shared.seen.lock().insert(key.clone(), seen);
        let metadata = ObjectMeta {
            name: metadata.name,
            namespace: metadata.namespace,
            generation: metadata.generation,
            creation_timestamp: metadata.creation_timestamp,
            ..ObjectMeta::default()
        };
        match read(metadata, version, data["spec"].take()) {
            Ok(object) => {
                self.dirty |= self.objects.insert(object);
                if self.shared.mistakes.lock().remove(&key).is_some() {
                    tracing::info!("{key}: is repaired");
                }
            }
            Err(mistake) => {
                let old = self
                    .shared
                    .mistakes
                    .lock()
                    .insert(key.clone(), mistake.clone());
                if old.as_ref() != Some(&mistake) {
                    tracing::warn!("{key}: {mistake}; its last good version stays in force");
                }
            }
        }
        let count = self.shared.mistakes.lock().len();
        self.metrics.manifest_mistakes.set(count as i64);
        self.shared.served.send_modify(|_| {});
    }
}

fn custom<S: DeserializeOwned>(
    kind: &str,
    metadata: ObjectMeta,
    version: &str,
    spec: Value,
) -> Result<Arc<Custom<S>>, String> {
    let spec = serde_path_to_error::deserialize(spec).map_err(|error| {
        let steps = error.path().iter().filter_map(|segment| match segment {
            serde_path_to_error::Segment::Seq { index } => Some(Step::Index(*index)),
            serde_path_to_error::Segment::Map { key } => Some(Step::Key(key.clone())),
            serde_path_to_error::Segment::Enum { .. } | serde_path_to_error::Segment::Unknown => {
                None
            }
        });
        let path: Vec<Step> = [Step::from("spec")].into_iter().chain(steps).collect();
        format!("{}: {}", display(&path), error.inner())
    })?;
    Ok(Arc::new(Custom {
        api_version: version.into(),
        kind: kind.into(),
        metadata,
        spec,
        status: None,
    }))
}

fn definitions() -> ApiResource {
    api_resource(
        "apiextensions.k8s.io/v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
    )
}

/// Not read from anywhere, only written.
const XMESH: [&str; 1] = ["gateway.networking.x-k8s.io/v1alpha1"];

/// All of them.
pub(super) static CUSTOM_KINDS: [CustomKind; 7] = [
    CustomKind {
        kind: "HTTPRoute",
        definition: "httproutes.gateway.networking.k8s.io",
        read: Some(|m, v, s| custom("HTTPRoute", m, v, s).map(Object::HttpRoute)),
    },
    CustomKind {
        kind: "GRPCRoute",
        definition: "grpcroutes.gateway.networking.k8s.io",
        read: Some(|m, v, s| custom("GRPCRoute", m, v, s).map(Object::GrpcRoute)),
    },
    CustomKind {
        kind: "TLSRoute",
        definition: "tlsroutes.gateway.networking.k8s.io",
        read: Some(|m, v, s| custom("TLSRoute", m, v, s).map(Object::TlsRoute)),
    },
    CustomKind {
        kind: "TCPRoute",
        definition: "tcproutes.gateway.networking.k8s.io",
        read: Some(|m, v, s| custom("TCPRoute", m, v, s).map(Object::TcpRoute)),
    },
    CustomKind {
        kind: "XBackendTrafficPolicy",
        definition: "xbackendtrafficpolicies.gateway.networking.x-k8s.io",
        read: Some(|m, v, s| {
            custom("XBackendTrafficPolicy", m, v, s).map(Object::BackendTrafficPolicy)
        }),
    },
    CustomKind {
        kind: "TrafficPolicy",
        definition: "trafficpolicies.warren-mesh.io",
        read: Some(|m, v, s| custom("TrafficPolicy", m, v, s).map(Object::TrafficPolicy)),
    },
    CustomKind {
        kind: "XMesh",
        definition: "xmeshes.gateway.networking.x-k8s.io",
        read: None,
    },
];
