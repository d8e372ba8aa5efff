//! What a workload consumes in the proxy, counted and bounded.
//!
//! Every pod has one [`Account`]. A resource is charged by taking a guard and given back when the guard
//! drops, so a counter can only be as wrong as a leaked guard. Over a limit means a refused connection
//! (or a reset stream) of that workload alone, and a count in `warren_workload_refusals_total`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use mesh_api::errors::ProxyError;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Connections of the node's own probes, and requests in them, that go beyond a pod's limits at once: a pod whose
/// callers use up its budget is not unhealthy, and restarting it would make room for the same callers.
pub const PROBES: usize = 16;

/// Upper bounds for one workload (pod). 0 connections: four fifths of the descriptor limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Captured connections of the pod, both directions, that are open at once. Default 0: four fifths
    /// of the descriptor limit of the process.
    pub connections: usize,
    /// Tunnel streams to the pod that are open at once. Default 0: as `connections`.
    pub streams: usize,
    /// Bytes the proxy holds because the pod, or a peer of the pod, does not read. Default 64 MiB.
    pub buffered_bytes: usize,
    /// Sockets in the pod's namespace that are in use at once. Default 0: as `connections`.
    pub sockets: usize,
    /// HTTP requests of the pod, and to it, that are in flight at once. Default 0: as `connections`.
    pub requests: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 0,
            streams: 0,
            buffered_bytes: 64 << 20,
            sockets: 0,
            requests: 0,
        }
    }
}

impl Limits {
    /// Replaces "0" by what it stands for under the process's descriptor limit.
    pub fn resolved(&self, descriptor_limit: u64) -> Self {
        let automatic = usize::try_from(descriptor_limit / 5 * 4)
            .unwrap_or(usize::MAX)
            .max(16);
        let or_automatic = |value: usize| if value == 0 { automatic } else { value };
        let connections = or_automatic(self.connections);
        let or_connections = |value: usize| if value == 0 { connections } else { value };
        Self {
            connections,
            streams: or_connections(self.streams),
            buffered_bytes: self.buffered_bytes,
            sockets: or_connections(self.sockets),
            requests: or_connections(self.requests),
        }
    }
}

/// What is charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A captured connection.
    Connection,
    /// A tunnel stream to the pod.
    Stream,
    /// Bytes held for a peer that does not read.
    BufferedBytes,
    /// A socket in the pod's namespace.
    Socket,
    /// An HTTP request in flight.
    Request,
}

impl Resource {
    /// Every resource, in the order of the account's counters.
    pub const ALL: [Resource; 5] = [
        Self::Connection,
        Self::Stream,
        Self::BufferedBytes,
        Self::Socket,
        Self::Request,
    ];

    /// Value of the metric label `resource`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connection => "connections",
            Self::Stream => "streams",
            Self::BufferedBytes => "buffered_bytes",
            Self::Socket => "sockets",
            Self::Request => "requests",
        }
    }
}

/// The account of one workload.
#[derive(Debug)]
pub struct Account {
    namespace: Arc<str>,
    pod: Arc<str>,
    used: [AtomicUsize; 5],
    limits: [usize; 5],
    refused: [AtomicU64; 5],
    malformed: Mutex<BTreeMap<&'static str, u64>>,
}

impl Account {
    /// An account with nothing charged. `limits` must be resolved.
    pub fn new(namespace: Arc<str>, pod: Arc<str>, limits: &Limits) -> Arc<Self> {
        let Limits {
            connections,
            streams,
            buffered_bytes,
            sockets,
            requests,
        } = *limits;
        Arc::new(Self {
            namespace,
            pod,
            used: Default::default(),
            limits: [connections, streams, buffered_bytes, sockets, requests],
            refused: Default::default(),
            malformed: Mutex::default(),
        })
    }

    /// Namespace of the pod.
    pub fn namespace(&self) -> &Arc<str> {
        &self.namespace
    }

    /// Name of the pod.
    pub fn pod(&self) -> &Arc<str> {
        &self.pod
    }

    /// What is charged now.
    pub fn used(&self, resource: Resource) -> usize {
        self.used[resource as usize].load(Ordering::Relaxed)
    }

    /// The upper bound.
    pub fn limit(&self, resource: Resource) -> usize {
        self.limits[resource as usize]
    }

    /// How often the bound was met.
    pub fn refused(&self, resource: Resource) -> u64 {
        self.refused[resource as usize].load(Ordering::Relaxed)
    }

    /// Counts what the pod sent that was no valid HTTP, or an attack, by reason.
    pub fn malformed(&self, reason: &'static str, times: u64) {
        if times > 0 {
            *self.malformed.lock().entry(reason).or_default() += times;
        }
    }

    /// How often bytes of the pod were no valid HTTP, by reason.
    pub fn malformed_counts(&self) -> BTreeMap<&'static str, u64> {
        self.malformed.lock().clone()
    }

    /// Charges one unit until the guard drops.
    pub fn charge(self: &Arc<Self>, resource: Resource) -> Result<Charge, ProxyError> {
        self.charge_for(resource, false)
    }

    /// Charges one unit, which for one of the node's probes may go beyond the limit, see [`PROBES`].
    pub fn charge_for(
        self: &Arc<Self>,
        resource: Resource,
        probe: bool,
    ) -> Result<Charge, ProxyError> {
        let beyond = if probe { PROBES } else { 0 };
        let mut charge = self.open_charge(resource);
        charge.add_within(1, self.limit(resource).saturating_add(beyond))?;
        Ok(charge)
    }

    /// A guard with nothing charged yet.
    pub fn open_charge(self: &Arc<Self>, resource: Resource) -> Charge {
        Charge {
            account: Arc::clone(self),
            resource,
            amount: 0,
        }
    }
}

/// An amount charged to an account; given back on drop.
#[derive(Debug)]
pub struct Charge {
    account: Arc<Account>,
    resource: Resource,
    amount: usize,
}

impl Charge {
    /// Charges more. On [`ProxyError::WorkloadLimit`] nothing was charged.
    pub fn add(&mut self, amount: usize) -> Result<(), ProxyError> {
        self.add_within(amount, self.account.limit(self.resource))
    }

    fn add_within(&mut self, amount: usize, limit: usize) -> Result<(), ProxyError> {
        let index = self.resource as usize;
        let before = self.account.used[index].fetch_add(amount, Ordering::Relaxed);
        if before.saturating_add(amount) > limit {
            self.account.used[index].fetch_sub(amount, Ordering::Relaxed);
            self.account.refused[index].fetch_add(1, Ordering::Relaxed);
            return Err(ProxyError::WorkloadLimit);
        }
        self.amount += amount;
        Ok(())
    }

    /// Charges this much instead. On [`ProxyError::WorkloadLimit`] what was charged stays.
    pub fn resize(&mut self, amount: usize) -> Result<(), ProxyError> {
        if amount > self.amount {
            return self.add(amount - self.amount);
        }
        self.release(self.amount - amount);
        Ok(())
    }

    /// Gives back a part; at most what was charged.
    pub fn release(&mut self, amount: usize) {
        let amount = amount.min(self.amount);
        self.amount -= amount;
        self.account.used[self.resource as usize].fetch_sub(amount, Ordering::Relaxed);
    }

    /// Whose it is.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// What this guard holds.
    pub fn amount(&self) -> usize {
        self.amount
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.release(self.amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(limits: Limits) -> Arc<Account> {
        Account::new("demo".into(), "web".into(), &limits)
    }

    #[test]
    fn over_the_limit_is_refused_and_counted_and_the_rest_given_back() {
        let account = account(Limits {
            connections: 2,
            streams: 1,
            buffered_bytes: 10,
            sockets: 1,
            requests: 1,
        });
        let first = account.charge(Resource::Connection).unwrap();
        let second = account.charge(Resource::Connection).unwrap();
        assert_eq!(
            account.charge(Resource::Connection).unwrap_err(),
            ProxyError::WorkloadLimit
        );
        assert_eq!(
            (
                account.used(Resource::Connection),
                account.refused(Resource::Connection)
            ),
            (2, 1)
        );
        drop(first);
        assert!(account.charge(Resource::Connection).is_ok());
        drop(second);
        assert_eq!(account.used(Resource::Connection), 0);
        assert_eq!(account.refused(Resource::Stream), 0);
    }

    #[test]
    fn probes_go_beyond_the_limit_but_not_without_bound() {
        let account = account(Limits {
            requests: 1,
            ..Limits::default()
        });
        let _full = account.charge(Resource::Request).unwrap();
        let probe = || account.charge_for(Resource::Request, true);
        let mut probes: Vec<Charge> = (0..PROBES).map(|_| probe().unwrap()).collect();
        assert!(probe().is_err() && account.charge(Resource::Request).is_err());
        probes.pop();
        assert!(account.charge(Resource::Request).is_err());
        assert!(probe().is_ok());
    }

    #[test]
    fn buffered_bytes_grow_and_shrink() {
        let account = account(Limits {
            buffered_bytes: 10,
            ..Limits::default()
        });
        let mut held = account.open_charge(Resource::BufferedBytes);
        held.add(8).unwrap();
        assert!(held.add(3).is_err());
        held.release(100);
        assert_eq!(
            (held.amount(), account.used(Resource::BufferedBytes)),
            (0, 0)
        );
        held.add(10).unwrap();
        drop(held);
        assert_eq!(account.used(Resource::BufferedBytes), 0);
    }

    #[test]
    fn automatic_limits_leave_room() {
        let limits = Limits::default().resolved(20_000);
        assert_eq!(
            (limits.connections, limits.streams, limits.sockets),
            (16_000, 16_000, 16_000)
        );
        let limits = Limits {
            connections: 5,
            ..Limits::default()
        }
        .resolved(20_000);
        assert_eq!((limits.connections, limits.streams), (5, 5));
    }
}
