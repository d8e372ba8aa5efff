//! Which replica is the leader: the holder of the Lease `warren-controller`.
//!
//! As other controllers do it: the holder renews, the others take over when they have seen no renewal for the
//! whole duration by their own clocks. A leader that cannot renew stops to lead well before that. Two leaders
//! for a moment would do no harm, as everything they write is compared and written with a version.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use mesh_api::names::SYSTEM_NAMESPACE;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::metrics::Metrics;

/// Takes part in the election for as long as it is polled; `leads` says how it stands.
pub async fn elect(
    client: Client,
    replica: String,
    metrics: Metrics,
    leads: watch::Sender<bool>,
    mut stop: watch::Receiver<bool>,
) {
    let mut candidate = Candidate {
        leases: Api::namespaced(client, SYSTEM_NAMESPACE),
        replica,
        seen: None,
    };
    let mut renewed = Instant::now();
    let mut clock = tokio::time::interval(RETRY);
    loop {
        let leading = *leads.borrow();
        match candidate.attempt().await {
            Ok(leading) => {
                renewed = Instant::now();
                tell(&leads, &metrics, leading);
            }
            Err(error) if leading && renewed.elapsed() >= RENEW_DEADLINE => {
                tracing::warn!("the Lease cannot be renewed: {error}");
                tell(&leads, &metrics, false);
            }
            Err(error) => tracing::debug!("the Lease cannot be read or written: {error}"),
        }
        tokio::select! {
            _ = clock.tick() => {}
            // An error means that the sender is gone.
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    if *leads.borrow() {
        tell(&leads, &metrics, false);
        if let Err(error) = candidate.resign().await {
            tracing::debug!("the Lease was not given back: {error}");
        }
    }
}

fn tell(leads: &watch::Sender<bool>, metrics: &Metrics, leading: bool) {
    metrics.leader.set(leading.into());
    leads.send_if_modified(|led| {
        let changed = *led != leading;
        if changed {
            let what = if leading {
                "leads now"
            } else {
                "leads no more"
            };
            tracing::info!("this replica {what}");
        }
        *led = leading;
        changed
    });
}

struct Candidate {
    leases: Api<Lease>,
    replica: String,
    /// Another's renewal, and when it was seen first.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Candidate {
    /// Takes or renews the Lease if that is right. True: it is this replica's.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let now = MicroTime(Timestamp::now());
        let mut mine = LeaseSpec {
            holder_identity: Some(self.replica.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(0),
            ..LeaseSpec::default()
        };
        let Some(mut lease) = self.leases.get_opt(NAME).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(NAME.into()),
                    ..ObjectMeta::default()
                },
                spec: Some(mine),
            };
            let created = self.leases.create(&PostParams::default(), &lease).await;
            return taken(created);
        };
        let held = lease.spec.take().unwrap_or_default();
        let holder = held.holder_identity.as_deref().unwrap_or_default();
        if holder == self.replica {
            mine.acquire_time = held.acquire_time;
            mine.lease_transitions = held.lease_transitions;
        } else {
            if !holder.is_empty() && !self.is_over(&held) {
                return Ok(false);
            }
            mine.lease_transitions = Some(held.lease_transitions.unwrap_or(0) + 1);
        }
        lease.spec = Some(mine);
        // With the version that was read: of two, one is refused.
        taken(
            self.leases
                .replace(NAME, &PostParams::default(), &lease)
                .await,
        )
    }

    fn is_over(&mut self, held: &LeaseSpec) -> bool {
        let now = Instant::now();
        match &self.seen {
            Some((seen, since)) if seen == held => now >= *since + DURATION,
            _ => {
                self.seen = Some((held.clone(), now));
                false
            }
        }
    }

    async fn resign(&mut self) -> Result<(), kube::Error> {
        let mut lease = self.leases.get(NAME).await?;
        if let Some(spec) = &mut lease.spec
            && spec.holder_identity.as_ref() == Some(&self.replica)
        {
            spec.holder_identity = None;
            self.leases
                .replace(NAME, &PostParams::default(), &lease)
                .await?;
        }
        Ok(())
    }
}

fn taken(written: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

const NAME: &str = "warren-controller";
const DURATION: Duration = Duration::from_secs(15);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests;
