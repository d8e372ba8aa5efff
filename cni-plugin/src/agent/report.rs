//! Sends the node's report on every change and every five seconds.

use std::net::IpAddr;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use tokio::sync::watch;
use tokio::time::Instant;

use super::node::Node;

/// Who wants a report, and which was delivered.
#[derive(Debug)]
pub(super) struct Reporter {
    wanted: watch::Sender<u64>,
    delivered: watch::Sender<u64>,
}

impl Default for Reporter {
    fn default() -> Self {
        Self {
            wanted: watch::Sender::new(0),
            delivered: watch::Sender::new(0),
        }
    }
}

impl Reporter {
    /// Waits until a report that was made after this call has been answered.
    pub(super) async fn delivered(&self) {
        let mut number = 0;
        self.wanted.send_modify(|wanted| {
            *wanted += 1;
            number = *wanted;
        });
        let mut delivered = self.delivered.subscribe();
        // Cannot fail: `self` holds the sender.
        let _ = delivered.wait_for(|delivered| *delivered >= number).await;
    }

    /// Never ends.
    pub(super) async fn run(&self, node: &Node) {
        let mut wanted = self.wanted.subscribe();
        let mut broker = node.broker().changes();
        let mut connected = node.control().connected();
        let mut failing = false;
        let mut last = None;
        let mut due = Instant::now();
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                // Neither sender goes before this.
                _ = wanted.changed() => {}
                _ = broker.changed() => {}
                () = node.changed().notified() => {}
            }
            let number = *wanted.borrow_and_update();
            let addresses = interface_addresses();
            let report = node.report(&addresses);
            node.broker().set_interface_addresses(addresses);
            let asked = number > *self.delivered.borrow();
            if !asked && last.as_ref() == Some(&report) && Instant::now() < due {
                continue;
            }
            match node.control().report(report.clone()).await {
                Ok(()) => {
                    failing = false;
                    last = Some(report);
                    self.delivered.send_replace(number);
                    due = Instant::now() + INTERVAL;
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(
                            error,
                            "the controller did not take this node's report; trying on"
                        );
                    }
                    failing = true;
                    last = None;
                    // Changes are in the next attempt; none is made before.
                    tokio::select! {
                        () = tokio::time::sleep(PAUSE) => {}
                        changed = connected.changed() => if changed.is_err() {
                            tokio::time::sleep(PAUSE).await;
                        },
                    }
                    due = Instant::now();
                }
            }
        }
    }
}

/// Addresses of all interfaces that are not loopback. kube-proxy's IPVS mode puts every Service's address on an
/// interface of its own, from which nothing is ever sent.
fn interface_addresses() -> Vec<IpAddr> {
    let interfaces = match getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            tracing::warn!(%error, "the node's addresses cannot be read");
            return Vec::new();
        }
    };
    let mut addresses: Vec<IpAddr> = interfaces
        .filter(|interface| interface.interface_name != "kube-ipvs0")
        .filter_map(|interface| {
            let address = interface.address?;
            match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
                (_, Some(v6)) => Some(IpAddr::V6(v6.ip())),
                _ => None,
            }
        })
        .filter(|address| !address.is_loopback())
        .collect();
    addresses.sort();
    addresses.dedup();
    if addresses.len() > MOST_ADDRESSES {
        let found = addresses.len();
        tracing::warn!(
            found,
            "the node has too many addresses; probes from some of them are not known as such"
        );
        addresses.truncate(MOST_ADDRESSES);
    }
    addresses
}

/// They travel to the proxies in one packet.
const MOST_ADDRESSES: usize = 2048;
/// Between attempts that failed.
const PAUSE: Duration = Duration::from_secs(1);
const INTERVAL: Duration = Duration::from_secs(5);
