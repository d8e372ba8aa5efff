//! The root in a Secret, and the trust bundle in the ConfigMap that nodes mount.
//!
//! The Secret (`kubernetes.io/tls`: `tls.crt`, `tls.key`) is the user's or cert-manager's, or made by whichever
//! replica comes first: created, never overwritten, so that all replicas sign with one root. Of `tls.crt` the
//! first certificate is the root. The ConfigMap `warren-trust-bundle` has `bundle.pem` (all that is trusted)
//! and `retired.pem` (roots that were replaced), written by the leader, and the user's `bundle-extra.pem`.

use std::collections::BTreeMap;

use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, PartialObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client};
use mesh_api::names::SYSTEM_NAMESPACE;
use rustls_pki_types::CertificateDer;
use serde_json::json;

use super::root::{self, CaError, Roots, content};
use crate::providers::kubernetes::watched;

/// Where root and bundle are in a cluster.
pub struct RootSecret {
    client: Client,
    name: String,
    trust_domain: String,
}

/// Tells when one of the two may be another than before.
pub struct Changes(SelectAll<BoxStream<'static, ()>>);

/// What was read.
#[derive(Debug)]
pub struct Read {
    /// What is kept.
    pub roots: Roots,
    /// What the ConfigMap must be changed to; absent: it is as it should be.
    pub bundle: Option<Bundle>,
}

/// A change of the ConfigMap.
#[derive(Debug)]
pub struct Bundle {
    data: BTreeMap<&'static str, String>,
    /// Of what was read; absent: there is none.
    resource_version: Option<String>,
}

impl std::fmt::Debug for RootSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RootSecret")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Changes {
    /// Waits for the next time. Cancel safe.
    pub async fn next(&mut self) {
        if self.0.next().await.is_none() {
            // Watches do not end.
            std::future::pending().await
        }
    }
}

impl RootSecret {
    /// Reads nothing yet.
    pub fn new(client: &Client, name: &str, trust_domain: &str) -> Self {
        Self {
            client: client.clone(),
            name: name.into(),
            trust_domain: trust_domain.into(),
        }
    }

    /// Starts to watch.
    pub fn watch(&self) -> Changes {
        let client = || self.client.clone();
        let secrets = Api::<PartialObjectMeta<Secret>>::namespaced(client(), SYSTEM_NAMESPACE);
        let maps = Api::<PartialObjectMeta<ConfigMap>>::namespaced(client(), SYSTEM_NAMESPACE);
        let mut changes = SelectAll::new();
        changes.push(touched(watched(secrets, only(&self.name))));
        changes.push(touched(watched(maps, only(BUNDLE))));
        Changes(changes)
    }

    /// Reads both; makes the Secret if it is absent.
    pub async fn read(&self) -> Result<Read, CaError> {
        let secret = self.secret().await?;
        let data = secret.data.unwrap_or_default();
        let entry = |key: &'static str| {
            let place = format!("Secret {SYSTEM_NAMESPACE}/{}: {key}", self.name);
            match data.get(key) {
                Some(ByteString(bytes)) => Ok((place, bytes.as_slice())),
                None => Err(content(&place, "is missing")),
            }
        };
        let ((cert_place, cert), (key_place, key)) = (entry("tls.crt")?, entry("tls.key")?);
        let root = root::load((&cert_place, cert), (&key_place, key), &self.trust_domain)?;

        let map = self
            .maps()
            .get_opt(BUNDLE)
            .await
            .map_err(|e| self.api(BUNDLE, e))?;
        let resource_version = map
            .as_ref()
            .and_then(|m| m.metadata.resource_version.clone());
        let data = map.and_then(|m| m.data).unwrap_or_default();
        let certificates = |key: &str| -> Result<Vec<CertificateDer<'static>>, CaError> {
            let place = format!("ConfigMap {SYSTEM_NAMESPACE}/{BUNDLE}: {key}");
            let text = data.get(key).map(String::as_bytes).unwrap_or_default();
            root::certificates(&place, text)
        };
        let before = certificates("bundle.pem")?;
        let kept = certificates("retired.pem")?;
        let retired = root::retire(&kept, before.first(), &root);
        if retired.is_some() {
            tracing::info!("the root was replaced; the old one stays trusted");
        }
        let retired = retired.unwrap_or(kept);
        let retired_pem = root::pem(&retired);
        let roots = Roots::new(root, certificates("bundle-extra.pem")?, retired);
        let wanted = BTreeMap::from([
            ("bundle.pem", roots.bundle_pem()),
            ("retired.pem", retired_pem),
        ]);
        let same =
            |(key, text): (&&str, &String)| data.get(*key).map_or("", String::as_str) == text;
        let bundle = (!wanted.iter().all(same)).then_some(Bundle {
            data: wanted,
            resource_version,
        });
        Ok(Read { roots, bundle })
    }

    /// Writes the ConfigMap. Refused by the API server if it is another than what was read.
    pub async fn write(&self, bundle: &Bundle) -> Result<(), CaError> {
        let written = match &bundle.resource_version {
            None => {
                let owned = |(k, v): (&&str, &String)| ((*k).to_owned(), v.clone());
                let map = ConfigMap {
                    metadata: ObjectMeta {
                        name: Some(BUNDLE.into()),
                        labels: Some(labels()),
                        ..ObjectMeta::default()
                    },
                    data: Some(bundle.data.iter().map(owned).collect()),
                    ..ConfigMap::default()
                };
                self.maps().create(&PostParams::default(), &map).await
            }
            Some(version) => {
                let patch = json!({
                    "metadata": { "resourceVersion": version },
                    "data": bundle.data,
                });
                let params = PatchParams::default();
                self.maps()
                    .patch(BUNDLE, &params, &Patch::Merge(patch))
                    .await
            }
        };
        written.map_err(|e| self.api(BUNDLE, e))?;
        tracing::info!("the trust bundle was written to ConfigMap {BUNDLE}");
        Ok(())
    }

    async fn secret(&self) -> Result<Secret, CaError> {
        let secrets = Api::<Secret>::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let api = |e| self.api(&self.name, e);
        if let Some(secret) = secrets.get_opt(&self.name).await.map_err(api)? {
            return Ok(secret);
        }
        let made = root::make(&self.trust_domain)?;
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some(labels()),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/tls".into()),
            data: Some(BTreeMap::from([
                ("tls.crt".into(), ByteString(made.certificate.into())),
                ("tls.key".into(), ByteString(made.key.into())),
            ])),
            ..Secret::default()
        };
        match secrets.create(&PostParams::default(), &secret).await {
            Ok(secret) => {
                tracing::info!(
                    "made a root certificate, Secret {SYSTEM_NAMESPACE}/{}",
                    self.name
                );
                Ok(secret)
            }
            // Another replica was faster: its root it is.
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                secrets.get(&self.name).await.map_err(api)
            }
            Err(error) => Err(api(error)),
        }
    }

    fn maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE)
    }

    fn api(&self, object: &str, source: kube::Error) -> CaError {
        CaError::Api {
            object: format!("{SYSTEM_NAMESPACE}/{object}"),
            source: Box::new(source),
        }
    }
}

fn only(name: &str) -> watcher::Config {
    watcher::Config::default().fields(&format!("metadata.name={name}"))
}

fn touched<T: Send + 'static>(
    stream: impl futures::Stream<Item = watcher::Result<watcher::Event<T>>> + Send + 'static,
) -> BoxStream<'static, ()> {
    let told = stream.filter_map(|event| async {
        match event {
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => None,
            Ok(_) => Some(()),
            Err(error) => {
                tracing::debug!("root or trust bundle cannot be watched: {error}");
                None
            }
        }
    });
    told.boxed()
}

fn labels() -> BTreeMap<String, String> {
    let label = |key: &str, value: &str| (format!("app.kubernetes.io/{key}"), value.to_owned());
    BTreeMap::from([
        label("part-of", "warren"),
        label("managed-by", "warren-controller"),
    ])
}

/// The ConfigMap that nodes mount.
const BUNDLE: &str = "warren-trust-bundle";
