//! Keys and certificates of the workloads of this node, and the roots their peers are judged by.
//!
//! A certificate is wanted for as long as somebody holds an [`IdentityGuard`] for its identity. One
//! task per identity has it issued, keeps it on the tmpfs `secretsDir` so that a restarted proxy needs
//! no controller, and renews it at half its life with a new key.
//!
//! Invariants:
//! - keys are made here and are nowhere but in this process and in `secretsDir`, mode 0600;
//! - with the last guard, key and certificate are gone from both;
//! - a certificate is replaced only by one that was issued for the same identity; a failed renewal
//!   leaves it in place until and beyond its end. Whoever uses it checks
//!   [`LocalIdentity::not_after`]: an expired one must not be shown.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use mesh_api::client::credentials::{Credentials, CredentialsError, KeyRequest};
use mesh_api::identity::Identity;
use mesh_api::tls;
use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::sign::CertifiedKey;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::maps::SharedMap;

mod issue;
mod metrics;
mod renew;
mod slots;

pub use issue::{ControllerIssuer, IssueError, Issuer};
use metrics::Metrics;
use slots::Slots;

/// A workload's key and certificate.
#[derive(Debug)]
pub struct LocalIdentity {
    /// Whose they are.
    pub identity: Identity,
    /// What rustls signs and identifies itself with.
    pub certified: Arc<CertifiedKey>,
    /// End of the certificate's validity. It must not be used from then on.
    pub not_after: SystemTime,
    /// Unique among all certificates of this process; larger for a later one.
    pub generation: u64,
}

/// Who is believed.
#[derive(Debug)]
pub struct Trust {
    /// Roots.
    pub roots: Arc<RootCertStore>,
    /// Changes with the roots.
    pub generation: u64,
    /// The trust domain of every identity.
    pub trust_domain: String,
    bundle: Vec<Vec<u8>>,
}

/// Tells the time of the wall clock. Tests bring their own.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// The identities of this node.
pub struct Identities {
    directory: PathBuf,
    issuer: Arc<dyn Issuer>,
    clock: Clock,
    runtime: Handle,
    /// Who wants what. Also held while a certificate is put in place or wiped.
    wanted: Mutex<HashMap<Identity, Wanted>>,
    held: SharedMap<Identity, Arc<LocalIdentity>>,
    by_server_name: SharedMap<String, Arc<LocalIdentity>>,
    trust: ArcSwapOption<Trust>,
    trusted: watch::Sender<u64>,
    changed: watch::Sender<u64>,
    generation: AtomicU64,
    slots: Arc<Slots>,
    keep_files: AtomicBool,
    metrics: Metrics,
}

struct Wanted {
    guards: usize,
    /// Tells this want from an earlier one of the same identity.
    serial: u64,
    task: AbortHandle,
}

/// Keeps an identity's certificate on this node.
pub struct IdentityGuard {
    identities: Arc<Identities>,
    identity: Identity,
}

impl Identities {
    /// `directory`: on a tmpfs, made with mode 0700 if absent. Needs a tokio runtime, on which
    /// certificates are then issued and renewed.
    pub fn new(directory: &Path, issuer: Arc<dyn Issuer>, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            directory: directory.to_owned(),
            issuer,
            clock,
            runtime: Handle::current(),
            wanted: Mutex::default(),
            held: SharedMap::default(),
            by_server_name: SharedMap::default(),
            trust: ArcSwapOption::empty(),
            trusted: watch::Sender::new(0),
            changed: watch::Sender::new(0),
            generation: AtomicU64::new(0),
            slots: Slots::new(MAX_REQUESTS),
            keep_files: AtomicBool::new(false),
            metrics: Metrics::default(),
        })
    }

    /// Wants an identity's certificate until the guard is dropped. Any thread.
    pub fn acquire(self: &Arc<Self>, identity: Identity) -> IdentityGuard {
        let mut wanted = self.wanted.lock();
        if let Some(already) = wanted.get_mut(&identity) {
            already.guards += 1;
        } else {
            let serial = self.next();
            let task = renew::keep(Arc::downgrade(self), identity.clone(), serial);
            let task = self.runtime.spawn(task).abort_handle();
            wanted.insert(
                identity.clone(),
                Wanted {
                    guards: 1,
                    serial,
                    task,
                },
            );
        }
        IdentityGuard {
            identities: Arc::clone(self),
            identity,
        }
    }

    /// Waits for an acquired identity's certificate.
    pub async fn ready(&self, identity: &Identity) -> Arc<LocalIdentity> {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(held) = self.get(identity) {
                return held;
            }
            // Cannot fail: the sender is in `self`.
            let _ = changed.changed().await;
        }
    }

    /// The certificate of an identity, which may have expired.
    pub fn get(&self, identity: &Identity) -> Option<Arc<LocalIdentity>> {
        self.held.get(identity).map(|held| Arc::clone(&held))
    }

    /// The certificate a tunnel's server name selects.
    pub fn by_server_name(&self, name: &str) -> Option<Arc<LocalIdentity>> {
        self.by_server_name.get(name).map(|held| Arc::clone(&held))
    }

    /// Who is believed now. `None` until the controller, or the disk, has told.
    pub fn trust(&self) -> Option<Arc<Trust>> {
        self.trust.load_full()
    }

    /// Raised whenever a certificate or the trust changes.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Replaces the roots (DER). A bundle that cannot be used leaves the last good one.
    pub fn set_trust(&self, trust_domain: &str, bundle: &[Vec<u8>]) {
        let same = |t: &Trust| t.bundle == bundle && t.trust_domain == trust_domain;
        if self.trust.load().as_deref().is_some_and(same) {
            return;
        }
        match tls::roots(bundle.iter().map(Vec::as_slice)) {
            Ok(roots) => {
                let generation = self.next();
                tracing::info!(trust_domain, roots = bundle.len(), "trust bundle replaced");
                self.trust.store(Some(Arc::new(Trust {
                    roots,
                    generation,
                    trust_domain: trust_domain.to_owned(),
                    bundle: bundle.to_vec(),
                })));
                self.trusted.send_replace(generation);
                self.bump();
            }
            Err(error) => {
                tracing::error!(%error, "trust bundle cannot be used, keeping the last good one");
            }
        }
    }

    /// Wipes what an earlier process left for identities that nobody wants now. To be called when all
    /// pods of the node are known.
    pub fn wipe_unwanted(&self) {
        if self.keep_files.load(Ordering::Relaxed) {
            return;
        }
        let wanted = self.wanted.lock();
        let kept: Vec<PathBuf> = wanted.keys().map(|identity| self.path(identity)).collect();
        let Ok(entries) = std::fs::read_dir(&self.directory) else {
            return;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let ours = path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with(FILE_PREFIX));
            if ours && !kept.contains(&path) {
                tracing::info!(path = %path.display(), "wiping the key of an identity that left");
                remove(&path);
            }
        }
    }

    /// Whether dropped guards leave the files in place from now on: this process ends, and the next one, or
    /// another that shares the directory and serves now, goes on with them. That one knows who still needs them.
    pub fn keep_files(&self, keep: bool) {
        self.keep_files.store(keep, Ordering::Relaxed);
    }

    /// What is held, for the admin socket. No keys.
    pub fn dump(&self) -> serde_json::Value {
        let wanted: Vec<_> = self.wanted.lock().keys().cloned().collect();
        let entry = |identity: &Identity| {
            let held = self.get(identity);
            let seconds = |held: &Arc<LocalIdentity>| metrics::unix(held.not_after);
            let certificate = serde_json::json!({
                "state": self.state(identity).name(),
                "notAfter": held.as_ref().map(seconds),
                "generation": held.map(|held| held.generation),
            });
            (identity.to_string(), certificate)
        };
        wanted.iter().map(entry).collect()
    }

    /// Joins a key to the chain that was issued for it and puts both in place of the previous ones.
    /// Returns `None` if the identity is not wanted any more.
    fn install(
        &self,
        identity: &Identity,
        serial: u64,
        request: KeyRequest,
        chain: Vec<Vec<u8>>,
    ) -> Result<Option<Credentials>, CredentialsError> {
        let wanted = self.wanted.lock();
        if wanted.get(identity).is_none_or(|w| w.serial != serial) {
            return Ok(None);
        }
        let issued = request.complete(
            chain,
            |uri| uri == identity.as_str(),
            Some(&self.path(identity)),
        )?;
        self.put(identity, &issued);
        Ok(Some(issued))
    }

    /// Takes up what an earlier process left.
    fn restore(&self, identity: &Identity, serial: u64) -> Option<Credentials> {
        let wanted = self.wanted.lock();
        wanted.get(identity).filter(|w| w.serial == serial)?;
        let path = self.path(identity);
        let found = match Credentials::load(&path) {
            Ok(found) => found?,
            Err(error) => {
                tracing::warn!(%identity, %error, "kept certificate cannot be used, getting a new one");
                return None;
            }
        };
        let now = (self.clock)();
        if found.uri != identity.as_str() || found.not_after <= now {
            tracing::info!(%identity, "kept certificate has expired, getting a new one");
            return None;
        }
        self.put(identity, &found);
        Some(found)
    }

    fn put(&self, identity: &Identity, credentials: &Credentials) {
        let local = Arc::new(LocalIdentity {
            identity: identity.clone(),
            certified: Arc::clone(&credentials.certified),
            not_after: credentials.not_after,
            generation: self.next(),
        });
        self.by_server_name
            .insert(identity.server_name(), Arc::clone(&local));
        self.held.insert(identity.clone(), local);
        self.bump();
    }

    fn release(&self, identity: &Identity) {
        let mut wanted = self.wanted.lock();
        let Some(held) = wanted.get_mut(identity) else {
            return;
        };
        held.guards -= 1;
        if held.guards > 0 {
            return;
        }
        held.task.abort();
        wanted.remove(identity);
        self.held.remove(identity);
        self.by_server_name.remove(&identity.server_name());
        if !self.keep_files.load(Ordering::Relaxed) {
            remove(&self.path(identity));
        }
        self.bump();
    }

    fn state(&self, identity: &Identity) -> State {
        match self.get(identity) {
            None => State::Pending,
            Some(held) if held.not_after <= (self.clock)() => State::Expired,
            Some(_) => State::Valid,
        }
    }

    fn path(&self, identity: &Identity) -> PathBuf {
        let name = identity.server_name();
        let hash = name.split('.').next().unwrap_or_default();
        self.directory.join(format!("{FILE_PREFIX}{hash}.pem"))
    }

    fn next(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn bump(&self) {
        self.changed.send_modify(|n| *n += 1);
    }
}

impl IdentityGuard {
    /// Whose certificate is kept.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

impl Drop for IdentityGuard {
    fn drop(&mut self) {
        self.identities.release(&self.identity);
    }
}

impl std::fmt::Debug for IdentityGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("IdentityGuard")
            .field(&self.identity)
            .finish()
    }
}

/// Where an identity stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Wanted, not issued yet.
    Pending,
    Valid,
    Expired,
}

impl State {
    const ALL: [State; 3] = [State::Pending, State::Valid, State::Expired];

    /// Value of the metric label `state`.
    const fn name(self) -> &'static str {
        match self {
            State::Pending => "pending",
            State::Valid => "valid",
            State::Expired => "expired",
        }
    }
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "a workload's key cannot be removed");
        }
    }
}

const FILE_PREFIX: &str = "workload-";
/// Signing requests under way at one time.
const MAX_REQUESTS: usize = 8;

#[cfg(test)]
mod tests;
