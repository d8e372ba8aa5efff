//! Stub until the real one lands.
#![allow(missing_docs)]
use std::sync::Arc;
use std::time::SystemTime;
use mesh_api::identity::Identity;
use rustls::RootCertStore;
use tokio::sync::watch;

#[derive(Debug)]
pub struct LocalIdentity { pub identity: Identity, pub certified: Arc<rustls::sign::CertifiedKey>, pub not_after: SystemTime, pub generation: u64 }
#[derive(Debug)]
pub struct Trust { pub roots: Arc<RootCertStore>, pub generation: u64, pub trust_domain: String }
#[derive(Debug)]
pub struct IdentityGuard;
#[derive(Debug)]
pub struct Identities;
impl Identities {
    pub fn acquire(self: &Arc<Self>, _: Identity) -> IdentityGuard { IdentityGuard }
    pub async fn ready(&self, _: &Identity) -> Arc<LocalIdentity> { std::future::pending().await }
    pub fn get(&self, _: &Identity) -> Option<Arc<LocalIdentity>> { None }
    pub fn by_server_name(&self, _: &str) -> Option<Arc<LocalIdentity>> { None }
    pub fn trust(&self) -> Option<Arc<Trust>> { None }
    pub fn changed(&self) -> watch::Receiver<u64> { watch::Sender::new(0).subscribe() }
}
