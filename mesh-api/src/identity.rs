//! SPIFFE identities of workloads and nodes, and the server name a tunnel is opened to.
//!
//! Form: the SPIFFE ID specification, section 2; the paths are Warren's contract.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`. Cheap to clone and compare.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    uri: Arc<str>,
    domain_end: u16,
    namespace_end: u16,
}

const SCHEME: &str = "spiffe://";
const NS: &str = "/ns/";
const SA: &str = "/sa/";

impl Identity {
    /// Builds the identity of a service account. Fails on empty parts and characters that SPIFFE IDs
    /// do not allow.
    pub fn new(
        domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidIdentity> {
        format!("{SCHEME}{domain}{NS}{namespace}{SA}{service_account}").parse()
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The trust domain, without scheme.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..self.domain_end.into()]
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.uri[usize::from(self.domain_end) + NS.len()..self.namespace_end.into()]
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.namespace_end) + SA.len()..]
    }

    /// The TLS server name that selects this identity's certificate: unpadded lowercase base32 of
    /// SHA-256 of the URI, plus `.id.warren-mesh.io`.
    pub fn server_name(&self) -> String {
        let digest = Sha256::digest(self.uri.as_bytes());
        let mut name = data_encoding::BASE32_NOPAD
            .encode(&digest)
            .to_ascii_lowercase();
        name.push_str(".id.warren-mesh.io");
        name
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(uri: &str) -> Result<Self, InvalidIdentity> {
        let invalid = |why| InvalidIdentity {
            uri: uri.chars().take(300).collect(),
            why,
        };
        if uri.len() > MOST_BYTES {
            return Err(invalid("longer than 2048 bytes"));
        }
        let rest = uri
            .strip_prefix(SCHEME)
            .ok_or_else(|| invalid("does not start with spiffe://"))?;
        let mut parts = rest.split('/');
        let (domain, ns, namespace, sa, account) = match (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) {
            (Some(d), Some(n), Some(namespace), Some(s), Some(account), None) => {
                (d, n, namespace, s, account)
            }
            _ => {
                return Err(invalid(
                    "is not <trust domain>/ns/<namespace>/sa/<service account>",
                ));
            }
        };
        if ns != "ns" || sa != "sa" {
            return Err(invalid(
                "is not <trust domain>/ns/<namespace>/sa/<service account>",
            ));
        }
        if !is_domain(domain) {
            return Err(invalid(
                "has a trust domain that is empty or has characters other than a-z 0-9 . - _",
            ));
        }
        for part in [namespace, account] {
            if !is_segment(part) {
                return Err(invalid(
                    "has an empty or malformed namespace or service account",
                ));
            }
        }
        let domain_end = SCHEME.len() + domain.len();
        Ok(Self {
            uri: uri.into(),
            // In range: the length was checked above.
            domain_end: domain_end as u16,
            namespace_end: (domain_end + NS.len() + namespace.len()) as u16,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

/// `spiffe://<trust domain>/warren/node/<node>/{proxy,agent}`: what a node's process proves to the
/// controller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeIdentity {
    /// Trust domain.
    pub domain: String,
    /// The node's name.
    pub node: String,
    /// Which process.
    pub role: NodeRole,
}

/// A process of a node that speaks to the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeRole {
    /// `warren-node-proxy`
    Proxy,
    /// `warren-cni agent`
    Agent,
}

impl fmt::Display for NodeRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NodeRole::Proxy => "proxy",
            NodeRole::Agent => "agent",
        })
    }
}

impl fmt::Display for NodeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{SCHEME}{}/warren/node/{}/{}",
            self.domain, self.node, self.role
        )
    }
}

impl FromStr for NodeIdentity {
    type Err = InvalidIdentity;

    fn from_str(uri: &str) -> Result<Self, InvalidIdentity> {
        let parts: Vec<&str> = uri
            .strip_prefix(SCHEME)
            .unwrap_or_default()
            .split('/')
            .collect();
        let (domain, node, role) = match parts[..] {
            [domain, "warren", "node", node, "proxy"] => (domain, node, NodeRole::Proxy),
            [domain, "warren", "node", node, "agent"] => (domain, node, NodeRole::Agent),
            _ => ("", "", NodeRole::Proxy),
        };
        if uri.len() > MOST_BYTES || !is_domain(domain) || !is_segment(node) {
            return Err(InvalidIdentity {
                uri: uri.chars().take(300).collect(),
                why: "is not <trust domain>/warren/node/<node>/{proxy,agent}",
            });
        }
        Ok(Self {
            domain: domain.into(),
            node: node.into(),
            role,
        })
    }
}

/// A trust domain (SPIFFE ID, section 2.1), without a port or user.
fn is_domain(text: &str) -> bool {
    let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    !text.is_empty() && text.bytes().all(lower)
}

/// A segment of a path (SPIFFE ID, section 2.2).
fn is_segment(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    !matches!(text, "" | "." | "..") && text.bytes().all(allowed)
}

/// Of a URI (SPIFFE ID, section 2.3).
const MOST_BYTES: usize = 2048;

/// A URI that is not an identity of the expected form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("identity {uri:?} {why}")]
pub struct InvalidIdentity {
    uri: String,
    why: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_an_identity() {
        let id = Identity::new("cluster.local", "demo", "web").unwrap();
        assert_eq!(id.as_str(), "spiffe://cluster.local/ns/demo/sa/web");
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", "demo", "web")
        );
    }

    #[test]
    fn server_name_is_a_valid_dns_name() {
        let id = Identity::new("cluster.local", "demo", "web").unwrap();
        let name = id.server_name();
        // printf spiffe://cluster.local/ns/demo/sa/web | openssl dgst -sha256 -binary | base32
        let label = name.strip_suffix(".id.warren-mesh.io").unwrap();
        assert_eq!(label.len(), 52);
        assert!(rustls_pki_types::ServerName::try_from(name.as_str()).is_ok());
    }

    #[test]
    fn malformed_identities_are_refused() {
        for uri in [
            "",
            "spiffe://",
            "spiffe://td",
            "https://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td/sa/a/ns/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td:1/ns/a/sa/b",
            "spiffe://u@td/ns/a/sa/b",
            "spiffe://td/ns/a%2f/sa/b",
        ] {
            assert!(uri.parse::<Identity>().is_err(), "{uri}");
        }
    }

    #[test]
    fn node_identity_round_trip() {
        let id = NodeIdentity {
            domain: "td".into(),
            node: "node-1".into(),
            role: NodeRole::Agent,
        };
        assert_eq!(id.to_string().parse::<NodeIdentity>().unwrap(), id);
        assert!("spiffe://td/ns/a/sa/b".parse::<NodeIdentity>().is_err());
        let long = format!("spiffe://td/warren/node/{}/proxy", "n".repeat(2048));
        for uri in [
            "spiffe://td/warren/node//proxy",
            "spiffe://td/warren/node/../proxy",
            "spiffe://td/warren/node/a%2fb/proxy",
            "spiffe://td/warren/node/a b/proxy",
            "spiffe://td:1/warren/node/n/proxy",
            "spiffe://TD/warren/node/n/proxy",
            &long,
        ] {
            assert!(uri.parse::<NodeIdentity>().is_err(), "{uri}");
        }
    }
}
