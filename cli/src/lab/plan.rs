//! The addresses of a lab. Everything is in namespaces, so labs could all have the same; different ranges
//! for labs that run side by side are easier on the reader of a capture.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | fabric: `.1` the bridge, `.2` the controller, `.10 + n` node n | `10.201.<slot>.0/24` | `fd57:7261:<slot>::/64` |
//! | pods of node n, `.1` the node's bridge | `10.<202 + slot>.<n>.0/24` | `fd57:7261:<slot>:<n>::/64` |
//! | Services | `10.<96 + slot>.0.0/16` | `fd57:7261:<slot>:ffff::/112` |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The address plan of the lab in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    slot: u8,
}

/// An IPv4 and an IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Pair {
    pub(crate) fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// Labs with ranges of their own; the next one shares those of the first.
pub(crate) const SLOTS: u8 = 16;

impl Plan {
    pub(crate) fn new(slot: u8) -> Self {
        Self { slot: slot % SLOTS }
    }

    /// The bridge of the fabric.
    pub(crate) fn fabric(self) -> Pair {
        self.on_fabric(1)
    }

    pub(crate) fn controller(self) -> Pair {
        self.on_fabric(2)
    }

    /// Node `n`, from 1 to 200.
    pub(crate) fn node(self, n: u8) -> Pair {
        self.on_fabric(n.saturating_add(10))
    }

    /// The bridge that the pods of node `n` are on: their gateway, and where probes come from.
    pub(crate) fn gateway(self, n: u8) -> Pair {
        Pair {
            v4: Ipv4Addr::new(10, 202 + self.slot, n, 1),
            v6: self.v6(n.into(), 1),
        }
    }

    /// Pod subnets of node `n`.
    pub(crate) fn pod_subnets(self, n: u8) -> [String; 2] {
        [
            format!("10.{}.{n}.0/24", 202 + self.slot),
            format!("{}/64", self.v6(n.into(), 0)),
        ]
    }

    /// The `i`-th cluster IP.
    pub(crate) fn cluster_ip(self, i: u16) -> Pair {
        let [high, low] = i.to_be_bytes();
        Pair {
            v4: Ipv4Addr::new(10, 96 + self.slot, high, low),
            v6: self.v6(0xffff, i),
        }
    }

    fn on_fabric(self, host: u8) -> Pair {
        Pair {
            v4: Ipv4Addr::new(10, 201, self.slot, host),
            v6: self.v6(0, host.into()),
        }
    }

    fn v6(self, subnet: u16, host: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd57, 0x7261, self.slot.into(), subnet, 0, 0, 0, host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labs_side_by_side_do_not_overlap() {
        let (a, b) = (Plan::new(0), Plan::new(1));
        assert_eq!(a.node(1).v4.to_string(), "10.201.0.11");
        assert_eq!(a.node(1).v6.to_string(), "fd57:7261::b");
        assert_eq!(a.pod_subnets(2), ["10.202.2.0/24", "fd57:7261:0:2::/64"]);
        assert_eq!(b.pod_subnets(2), ["10.203.2.0/24", "fd57:7261:1:2::/64"]);
        assert_eq!(b.cluster_ip(258).v4.to_string(), "10.97.1.2");
        assert_eq!(Plan::new(SLOTS), a);
        assert_eq!(Plan::new(15).gateway(200).v4.to_string(), "10.217.200.1");
    }
}
