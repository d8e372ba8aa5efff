//! Addresses that are asked for one by one, where the controller does not send every Service.
//!
//! Services that routes send to are asked for by name, for as long as a route does.
//!
//! Bounded: the address that was used longest ago gives way to a new one, and one that nobody has used
//! for a while is given up. Each is a subscription `address/<ip>`, so an answer stays current.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use mesh_api::client::delta::Subscriptions;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Kind;

pub(super) struct Demand {
    asked: Mutex<HashMap<IpAddr, Asked>>,
    /// Services asked for by `namespace/name`.
    named: Mutex<BTreeSet<String>>,
    subscriptions: watch::Sender<Subscriptions>,
}

struct Asked {
    used: Instant,
    /// The controller said that no Service has it.
    absent: bool,
}

impl Demand {
    pub(super) fn new() -> Self {
        let wildcard = |name: &str| BTreeSet::from([name.to_owned()]);
        let subscriptions = Kind::ALL
            .map(|kind| match kind {
                Kind::MeshConfig => (kind.type_url(), wildcard("mesh")),
                _ => (kind.type_url(), wildcard("*")),
            })
            .into();
        Self {
            asked: Mutex::default(),
            named: Mutex::default(),
            subscriptions: watch::Sender::new(subscriptions),
        }
    }

    pub(super) fn subscriptions(&self) -> watch::Receiver<Subscriptions> {
        self.subscriptions.subscribe()
    }

    /// Subscribes to an address.
    pub(super) fn ask(&self, address: IpAddr) {
        let mut asked = self.asked.lock();
        let used = Instant::now();
        if let Some(known) = asked.get_mut(&address) {
            known.used = used;
            return;
        }
        let oldest = match asked.len() < MAX_ASKED {
            true => None,
            false => asked
                .iter()
                .min_by_key(|(_, a)| a.used)
                .map(|(address, _)| *address),
        };
        if let Some(oldest) = oldest {
            asked.remove(&oldest);
        }
        asked.insert(
            address,
            Asked {
                used,
                absent: false,
            },
        );
        self.subscribe(&[address], oldest.as_slice());
    }

    /// Subscribes to exactly these Services by name. Of too many the last by name are left out.
    pub(super) fn name(&self, mut wanted: BTreeSet<String>) {
        if let Some(first_left_out) = wanted.iter().nth(MAX_NAMED).cloned() {
            let left_out = wanted.split_off(&first_left_out);
            tracing::error!(
                count = left_out.len(),
                "routes send to more Services than this node asks for; the rest is answered with 500"
            );
        }
        let mut named = self.named.lock();
        if *named == wanted {
            return;
        }
        self.subscriptions.send_modify(|subscriptions| {
            let names = subscriptions.entry(Kind::Service.type_url()).or_default();
            for gone in named.difference(&wanted) {
                names.remove(gone);
            }
            names.extend(wanted.iter().cloned());
        });
        *named = wanted;
    }

    /// Notes that an address is used, if it was asked for.
    pub(super) fn touch(&self, address: IpAddr) {
        if let Some(known) = self.asked.lock().get_mut(&address) {
            known.used = Instant::now();
        }
    }

    pub(super) fn is_absent(&self, address: IpAddr) -> bool {
        self.asked.lock().get(&address).is_some_and(|a| a.absent)
    }

    /// The controller sent Services that were asked for by these names.
    pub(super) fn found<'a>(&self, names: impl Iterator<Item = &'a str>) {
        self.answered(names, false);
    }

    /// The controller said that there is nothing by these names.
    pub(super) fn absent<'a>(&self, names: impl Iterator<Item = &'a str>) {
        self.answered(names, true);
    }

    /// Gives up what has not been used for [`UNUSED`].
    pub(super) fn expire(&self, now: Instant) {
        let mut asked = self.asked.lock();
        let unused: Vec<IpAddr> = asked
            .iter()
            .filter(|(_, a)| now.duration_since(a.used) > UNUSED)
            .map(|(address, _)| *address)
            .collect();
        for address in &unused {
            asked.remove(address);
        }
        if !unused.is_empty() {
            self.subscribe(&[], &unused);
        }
    }

    /// Addresses, and whether a Service has them.
    pub(super) fn dump(&self) -> serde_json::Value {
        let asked = self.asked.lock();
        asked
            .iter()
            .map(|(address, a)| (address.to_string(), serde_json::Value::Bool(!a.absent)))
            .collect()
    }

    fn answered<'a>(&self, names: impl Iterator<Item = &'a str>, absent: bool) {
        let mut names = names.filter_map(address_of).peekable();
        if names.peek().is_none() {
            return;
        }
        let mut asked = self.asked.lock();
        for address in names {
            if let Some(known) = asked.get_mut(&address) {
                known.absent = absent;
            }
        }
    }

    fn subscribe(&self, add: &[IpAddr], remove: &[IpAddr]) {
        self.subscriptions.send_modify(|subscriptions| {
            let names = subscriptions.entry(Kind::Service.type_url()).or_default();
            names.extend(add.iter().map(name_of));
            for address in remove {
                names.remove(&name_of(address));
            }
        });
    }
}

fn name_of(address: &IpAddr) -> String {
    format!("{PREFIX}{address}")
}

fn address_of(name: &str) -> Option<IpAddr> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

const PREFIX: &str = "address/";
/// Addresses asked for at one time.
pub(super) const MAX_ASKED: usize = 1024;
/// Services asked for by name at one time.
pub(super) const MAX_NAMED: usize = 4096;
/// After this time without use an address is given up.
pub(super) const UNUSED: Duration = Duration::from_secs(600);
