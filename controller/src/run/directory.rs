//! The parts that keep up with a directory of manifests, and with roots in another.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Common, Foundation, Health, Parts, Provider, RootSource, RunError, rotate};
use crate::ca::tokens::TokenFile;
use crate::ca::{CaError, Roots, files};
use crate::config::Config;
use crate::enrolment::Store;
use crate::hub::{Hub, Keeper};
use crate::metrics::{Metrics, Outcome};
use crate::providers::Objects;
use crate::providers::directory::Reader;
use crate::watch::{Changes, Watch};

/// What is watched.
pub(super) struct Following {
    reader: Reader,
    manifests: Watch,
    roots: RootFiles,
}

/// Reads everything for the first time: manifests, roots, tokens, state.
pub(super) fn open(
    config: &Config,
    metrics: &Metrics,
    (manifests, ca, tokens, state): (&Path, &Path, &Path, &Path),
) -> Result<Foundation, RunError> {
    let mut roots = RootFiles {
        watch: Watch::new(ca),
        directory: ca.to_owned(),
        trust_domain: config.trust_domain.clone(),
    };
    let kept = roots.read_now()?;
    // The directory may have been made just now.
    roots.watch = Watch::new(ca);
    let (store, stored) = Store::open(state)?;
    let watch = Watch::new(manifests);
    let mut reader = Reader::new(manifests);
    let objects = read(&mut reader, &Changes::Unknown, metrics);
    let objects = objects.map_err(|source| RunError::Provider {
        path: manifests.display().to_string(),
        source,
    })?;
    Ok(Foundation {
        objects,
        roots: kept,
        keeper: Keeper::File(store, stored),
        tokens: Arc::new(TokenFile::new(tokens.to_owned())),
        provider: Provider::Directory(Box::new(Following {
            reader,
            manifests: watch,
            roots,
        })),
    })
}

impl Following {
    pub(super) fn start(self, parts: &mut Parts, common: &Common) {
        let (hub, health) = (common.hub.clone(), common.health.clone());
        *health.mistakes.lock() = mistakes(&self.reader);
        parts.add(
            "manifests",
            provide(self.reader, self.manifests, hub, health),
        );
        parts.add("certificate authority", rotate(common.clone(), self.roots));
    }
}

fn read(reader: &mut Reader, changes: &Changes, metrics: &Metrics) -> std::io::Result<Objects> {
    let read = reader.read(changes);
    let result = match &read {
        Err(_) => "failed",
        Ok(_) if reader.mistakes().is_empty() => "ok",
        Ok(_) => "mistakes",
    };
    metrics
        .reloads
        .get_or_create_owned(&Outcome { result })
        .inc();
    metrics
        .manifest_mistakes
        .set(reader.mistakes().len() as i64);
    read
}

async fn provide(mut reader: Reader, mut watch: Watch, hub: Arc<Hub>, health: Arc<Health>) {
    loop {
        let changes = watch.changed().await;
        match read(&mut reader, &changes, hub.metrics()) {
            Ok(objects) => {
                health.set("manifests", None);
                *health.mistakes.lock() = mistakes(&reader);
                hub.set_objects(objects);
            }
            Err(error) => {
                health.set("manifests", Some("the manifests cannot be read".into()));
                tracing::error!("manifests cannot be read, the last ones stay in force: {error}");
            }
        }
    }
}

fn mistakes(reader: &Reader) -> Vec<String> {
    reader.mistakes().iter().map(ToString::to_string).collect()
}

/// Roots in a directory.
struct RootFiles {
    watch: Watch,
    directory: PathBuf,
    trust_domain: String,
}

impl RootFiles {
    fn read_now(&self) -> Result<Roots, CaError> {
        files::read(&self.directory, &self.trust_domain)
    }
}

impl RootSource for RootFiles {
    async fn changed(&mut self) {
        self.watch.changed().await;
    }

    async fn read(&mut self) -> Result<Roots, CaError> {
        self.read_now()
    }
}
