//! TLSRoutes, by the server name of the ClientHello, and TCPRoutes. Both have one rule.

use std::collections::HashMap;
use std::sync::Arc;

use super::Rule;
use super::compile::Rank;

/// The TLSRoutes of a group. Exact names go before wildcards, longer wildcards before shorter ones, then the older
/// route (TLSRouteSpec.hostnames).
#[derive(Debug, Default)]
pub struct TlsRoutes {
    exact: HashMap<Box<str>, Arc<Rule>>,
    /// By what follows `*`, with the dot.
    wildcard: HashMap<Box<str>, Arc<Rule>>,
    /// Without hostnames.
    any: Option<Arc<Rule>>,
}

impl TlsRoutes {
    pub(super) fn new(mut routes: Vec<(&[String], Rank, Arc<Rule>)>) -> Self {
        routes.sort_by(|(_, a, _), (_, b, _)| a.cmp(b));
        let mut set = Self::default();
        for (hostnames, _, rule) in routes {
            if hostnames.is_empty() {
                set.any.get_or_insert_with(|| Arc::clone(&rule));
            }
            for hostname in hostnames {
                let hostname = hostname.to_ascii_lowercase();
                let (map, name) = match hostname.strip_prefix('*') {
                    Some(suffix) => (&mut set.wildcard, suffix),
                    None => (&mut set.exact, hostname.as_str()),
                };
                map.entry(name.into()).or_insert_with(|| Arc::clone(&rule));
            }
        }
        set
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &Arc<Rule>> {
        self.exact
            .values()
            .chain(self.wildcard.values())
            .chain(&self.any)
    }

    /// The rule for a connection. A wildcard stands for one or more labels. `None`: the connection is rejected.
    pub fn find(&self, sni: Option<&str>) -> Option<&Arc<Rule>> {
        let Some(sni) = sni else {
            return self.any.as_ref();
        };
        let name = sni.strip_suffix('.').unwrap_or(sni).to_ascii_lowercase();
        if let Some(rule) = self.exact.get(name.as_str()) {
            return Some(rule);
        }
        if name.len() > MAX_NAME {
            return self.any.as_ref();
        }
        let mut suffixes = name.match_indices('.').filter(|(at, _)| *at > 0);
        suffixes
            .find_map(|(at, _)| self.wildcard.get(&name[at..]))
            .or(self.any.as_ref())
    }
}

/// The TCPRoutes of a group: the oldest one's rule is in force.
#[derive(Debug)]
pub struct TcpRoutes {
    rule: Arc<Rule>,
}

impl TcpRoutes {
    pub(super) fn new(routes: Vec<(Rank, Arc<Rule>)>) -> Option<Self> {
        let oldest = routes.into_iter().min_by(|(a, _), (b, _)| a.cmp(b))?;
        Some(Self { rule: oldest.1 })
    }

    /// The rule for every connection.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.rule
    }
}

/// Length of a DNS name (RFC 1035, 2.3.4). A longer one has more labels than are worth looking up.
const MAX_NAME: usize = 255;
