//! Who may talk to a pod of this node.
//!
//! Pure decisions on what the table and the pod say; the callers count, log and refuse.

use std::net::IpAddr;

use mesh_api::errors::ProxyError;
use mesh_api::identity::Identity;
use mesh_api::proto::mesh::EnrolmentState;

use crate::table::Workload;

/// Why plaintext was let through, for `warren_plaintext_allowed_total` and the connection's labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plaintext {
    /// The caller is not in the mesh, and the mode is permissive.
    Unmeshed,
    /// Caller or callee is being enrolled or un-enrolled: not every node knows yet.
    Enrolling,
    /// The user excluded this destination at the caller.
    Excluded,
}

impl Plaintext {
    /// Value of the label `reason`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unmeshed => "unmeshed",
            Self::Enrolling => "enrolling",
            Self::Excluded => "excluded",
        }
    }
}

/// Judges a plaintext connection to a pod.
///
/// `caller`: the table's entry for the source address, if any. `callee`: the table's entry for the pod
/// itself; a pod that is not published yet accepts plaintext, since nobody could have used a tunnel.
pub fn plaintext(
    caller: Option<&Workload>,
    callee: Option<&Workload>,
    strict: bool,
    destination: (IpAddr, u16),
) -> Result<Plaintext, ProxyError> {
    let Some(caller) = caller else {
        return if strict {
            Err(ProxyError::PlaintextRefused)
        } else {
            Ok(Plaintext::Unmeshed)
        };
    };
    let (address, port) = destination;
    if caller.exclude_outbound_ports.contains(&port)
        || caller
            .exclude_outbound_cidrs
            .iter()
            .any(|net| net.contains(&address))
    {
        return if strict {
            Err(ProxyError::PlaintextRefused)
        } else {
            Ok(Plaintext::Excluded)
        };
    }
    // Only when both are enforced does every node know of both: until then a connection opened in good
    // faith may still be on its way.
    let enforced = |workload: &Workload| workload.state == EnrolmentState::Enforced;
    if enforced(caller) && callee.is_some_and(enforced) {
        return Err(ProxyError::PlaintextRefused);
    }
    Ok(Plaintext::Enrolling)
}

/// Judges the source address that a tunnel's peer claims for a stream.
pub fn source(caller: &Workload, peer: &Identity) -> Result<(), ProxyError> {
    if caller.identity == *peer {
        Ok(())
    } else {
        Err(ProxyError::SourceMismatch)
    }
}

/// Judges a connection from one pod of this node to another, which no tunnel proves anything about: the same
/// must hold as on the wire.
///
/// `published`: the table's entry for the called address; `served`: who is served there. `claimed`: the
/// table's entry for the source address, which is not to be believed: a privileged pod may send from any.
pub fn local(
    published: &Workload,
    served: &Identity,
    claimed: Option<&Workload>,
    caller: &Identity,
    callers_own_address: bool,
) -> Result<(), ProxyError> {
    if published.identity != *served {
        return Err(ProxyError::NotLocal);
    }
    match claimed {
        // The table need not have heard yet that the address has passed to it.
        _ if callers_own_address => Ok(()),
        Some(claimed) => source(claimed, caller),
        None => Err(ProxyError::UnknownSource),
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::proto::mesh::TunnelKind;

    use super::*;

    fn workload(account: &str, state: EnrolmentState) -> Workload {
        Workload {
            uid: "u".into(),
            identity: Identity::new("cluster.local", "demo", account).unwrap(),
            name: account.into(),
            owner: account.into(),
            addresses: vec![],
            node: "node-1".into(),
            node_addresses: vec![],
            state,
            tunnel: TunnelKind::Warren,
            exclude_inbound_ports: vec![],
            exclude_outbound_ports: vec![],
            exclude_outbound_cidrs: vec![],
        }
    }

    fn judge(
        caller: Option<&Workload>,
        callee: Option<&Workload>,
        strict: bool,
    ) -> Result<Plaintext, ProxyError> {
        plaintext(caller, callee, strict, ("10.0.0.2".parse().unwrap(), 80))
    }

    #[test]
    fn callers_outside_the_mesh_depend_on_the_mode() {
        let web = workload("web", EnrolmentState::Enforced);
        assert_eq!(judge(None, Some(&web), false), Ok(Plaintext::Unmeshed));
        assert_eq!(
            judge(None, Some(&web), true),
            Err(ProxyError::PlaintextRefused)
        );
    }

    #[test]
    fn plaintext_between_meshed_pods_is_refused_once_every_node_knows_both() {
        use EnrolmentState::{Enforced, Leaving, Tunnel};
        for (caller, callee, refused) in [
            (Enforced, Enforced, true),
            (Tunnel, Enforced, false),
            (Enforced, Tunnel, false),
            (Leaving, Enforced, false),
            (Enforced, Leaving, false),
        ] {
            let (caller, callee) = (workload("client", caller), workload("web", callee));
            let judged = judge(Some(&caller), Some(&callee), false);
            let expected = if refused {
                Err(ProxyError::PlaintextRefused)
            } else {
                Ok(Plaintext::Enrolling)
            };
            assert_eq!(judged, expected, "{:?} -> {:?}", caller.state, callee.state);
        }
        let caller = workload("client", Enforced);
        assert_eq!(
            judge(Some(&caller), None, false),
            Ok(Plaintext::Enrolling),
            "callee not published yet"
        );
    }

    #[test]
    fn what_the_user_excluded_passes_in_permissive_mode_only() {
        let web = workload("web", EnrolmentState::Enforced);
        let mut client = workload("client", EnrolmentState::Enforced);
        client.exclude_outbound_ports = vec![80];
        assert_eq!(
            judge(Some(&client), Some(&web), false),
            Ok(Plaintext::Excluded)
        );
        assert_eq!(
            judge(Some(&client), Some(&web), true),
            Err(ProxyError::PlaintextRefused)
        );
        client.exclude_outbound_ports = vec![81];
        assert_eq!(
            judge(Some(&client), Some(&web), false),
            Err(ProxyError::PlaintextRefused)
        );
        client.exclude_outbound_cidrs = vec!["10.0.0.0/24".parse().unwrap()];
        assert_eq!(
            judge(Some(&client), Some(&web), false),
            Ok(Plaintext::Excluded)
        );
    }

    #[test]
    fn a_source_must_be_the_peers_own() {
        let client = workload("client", EnrolmentState::Enforced);
        assert_eq!(source(&client, &client.identity.clone()), Ok(()));
        let other = workload("other", EnrolmentState::Enforced).identity;
        assert_eq!(source(&client, &other), Err(ProxyError::SourceMismatch));
    }

    #[test]
    fn pods_of_one_node_are_judged_as_on_the_wire() {
        let web = workload("web", EnrolmentState::Enforced);
        let client = workload("client", EnrolmentState::Enforced);
        let (web_is, client_is) = (web.identity.clone(), client.identity.clone());
        let judge = |served, claimed, own| local(&web, served, claimed, &client_is, own);
        assert_eq!(judge(&web_is, Some(&client), true), Ok(()));
        assert_eq!(judge(&web_is, None, true), Ok(()));
        assert_eq!(judge(&web_is, Some(&web), true), Ok(()), "a stale entry");
        assert_eq!(
            judge(&client_is, Some(&client), true),
            Err(ProxyError::NotLocal),
            "the address has passed to another identity"
        );
        assert_eq!(
            judge(&web_is, Some(&web), false),
            Err(ProxyError::SourceMismatch)
        );
        assert_eq!(judge(&web_is, None, false), Err(ProxyError::UnknownSource));
    }
}
