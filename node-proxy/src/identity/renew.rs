//! The life of one identity's certificate: taken from the tmpfs or issued, renewed at half its life.

use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use mesh_api::client::backoff::Backoff;
use mesh_api::client::credentials::{Credentials, KeyRequest};
use mesh_api::identity::Identity;
use mesh_api::tls::{PeerRole, verify_chain};
use rand::Rng;
use rustls_pki_types::UnixTime;

use super::{Identities, IssueError};

/// Runs until it is aborted with the last guard.
pub(super) async fn keep(identities: Weak<Identities>, identity: Identity, serial: u64) {
    let Some(all) = identities.upgrade() else {
        return;
    };
    let mut held = all.restore(&identity, serial);
    drop(all);
    let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
    let mut warned = false;
    loop {
        // The guards hold `Identities`; it is gone only when the last guard is being dropped.
        let Some(all) = identities.upgrade() else {
            return;
        };
        if let Some(held) = &held {
            due(&all, held).await;
        }
        all.issuer.reachable().await;
        let outcome = request(&all, &identity, serial, held.is_none()).await;
        match &outcome {
            Ok(_) => all.metrics.issued("ok"),
            Err(error) => all.metrics.issued(error.name()),
        }
        let delay = match outcome {
            Ok(None) => return,
            Ok(Some(issued)) => {
                tracing::info!(%identity, renewed = held.is_some(), "certificate issued");
                let now = (all.clock)();
                let lasting = issued.life(0.55) > now && is_trusted(&all, &issued, now);
                if lasting {
                    backoff.reset();
                    warned = false;
                } else {
                    tracing::warn!(%identity, "the certificate issued is to be renewed already: check the clocks and that the trust bundle holds the issuing root");
                }
                held = Some(issued);
                backoff.delay()
            }
            Err(error) => {
                let expired = held.as_ref().is_some_and(|h| h.not_after <= (all.clock)());
                if expired && !std::mem::replace(&mut warned, true) {
                    tracing::error!(%identity, "certificate has expired and is not renewed: connections of this workload are refused");
                }
                if matches!(error, IssueError::Unreachable(_)) {
                    // `reachable` then waits for the controller to come back.
                    backoff.reset();
                }
                let delay = backoff.delay();
                tracing::warn!(%identity, %error, ?delay, "no certificate, retrying");
                delay
            }
        };
        drop(all);
        tokio::time::sleep(delay).await;
    }
}

async fn request(
    all: &Arc<Identities>,
    identity: &Identity,
    serial: u64,
    first_time: bool,
) -> Result<Option<Credentials>, IssueError> {
    let _slot = all.slots.take(first_time).await;
    let failed = |e: mesh_api::client::credentials::CredentialsError| {
        IssueError::Refused(format!("what it issued is no use: {e}"))
    };
    let request = KeyRequest::new().map_err(failed)?;
    let chain = all.issuer.issue(identity, request.csr.clone()).await?;
    all.install(identity, serial, request, chain)
        .map_err(failed)
}

/// Waits until a certificate is to be renewed: half its life, give or take a tenth of that, or at once
/// when its issuer is not trusted any more.
async fn due(all: &Identities, held: &Credentials) {
    let at = held.life(rand::rng().random_range(0.45..=0.55));
    let mut trusted = all.trusted.subscribe();
    loop {
        trusted.mark_unchanged();
        let now = (all.clock)();
        if now >= at || !is_trusted(all, held, now) {
            return;
        }
        let left = at.duration_since(now).unwrap_or_default();
        tokio::select! {
            // The wall clock may jump: it is looked at again before long.
            () = tokio::time::sleep(left.min(CLOCK_CHECK)) => {}
            changed = trusted.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// Whether peers that trust what we trust accept the certificate.
fn is_trusted(all: &Identities, held: &Credentials, now: SystemTime) -> bool {
    let Some(trust) = all.trust() else {
        return true;
    };
    let Some((leaf, rest)) = held.certified.cert.split_first() else {
        return false;
    };
    let since = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let now = UnixTime::since_unix_epoch(since);
    verify_chain(&trust.roots, PeerRole::Client, leaf, rest, now).is_ok()
}

const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(150);
const CLOCK_CHECK: Duration = Duration::from_secs(60);
