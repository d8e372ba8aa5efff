//! TLS of tunnels: configurations, what a resumed session must still satisfy, and reasons of failures.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_api::errors::ProxyError;
use mesh_api::identity::Identity;
use mesh_api::names::{ALPN_HBONE, ALPN_WARREN, ALPN_WARREN_2};
use mesh_api::tls::{
    PeerRole, UriClientVerifier, UriServerVerifier, not_after, uri_name, verify_chain,
};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert, ServerSessionMemoryCache};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, CommonState, Error, HandshakeKind,
    ServerConfig,
};
use rustls_pki_types::UnixTime;

use crate::identity::{LocalIdentity, Trust};
use crate::maps::SharedMap;

/// What kind of peer a tunnel is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `warren/2` or `warren/1` at the node's address.
    Warren,
    /// HBONE at the pod's address.
    Hbone,
}

impl Kind {
    /// ALPN, what is preferred first.
    fn protocols(self) -> Vec<Vec<u8>> {
        match self {
            Self::Warren => vec![ALPN_WARREN_2.into(), ALPN_WARREN.into()],
            Self::Hbone => vec![ALPN_HBONE.into()],
        }
    }
}

const SESSIONS: usize = 256;

/// The provider of tunnels: AES-128-GCM first, since both of its peers in the handshake prefer it on every
/// machine with AES instructions; the post-quantum hybrid X25519MLKEM768 is the first key exchange.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = Arc::unwrap_or_clone(mesh_api::tls::provider());
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The configuration of one pool: proves `local`, demands `callee`. Sessions are remembered in it, so they
/// die with it at the next renewal or change of the trust bundle.
pub fn client_config(
    local: &LocalIdentity,
    trust: &Trust,
    callee: &Identity,
    kind: Kind,
) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(UriServerVerifier::new(
            Arc::clone(&trust.roots),
            callee.as_str(),
        ))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(
            &local.certified,
        ))));
    config.alpn_protocols = kind.protocols();
    match kind {
        Kind::Warren => config.resumption = Resumption::in_memory_sessions(4),
        Kind::Hbone => {
            config.resumption = Resumption::disabled();
            config.enable_sni = false;
        }
    }
    Ok(config)
}

/// Server configurations by identity; one is replaced, and its sessions forgotten, when its certificate
/// or the trust bundle changes.
#[derive(Debug, Default)]
pub struct ServerConfigs {
    by_identity: SharedMap<(Identity, Kind), Cached>,
}

#[derive(Debug)]
struct Cached {
    generations: (u64, u64),
    config: Arc<ServerConfig>,
}

impl ServerConfigs {
    /// The configuration to prove `local` with.
    pub fn get(
        &self,
        local: &LocalIdentity,
        trust: &Trust,
        kind: Kind,
    ) -> Result<Arc<ServerConfig>, Error> {
        let key = (local.identity.clone(), kind);
        let generations = (local.generation, trust.generation);
        if let Some(cached) = self.by_identity.get(&key)
            && cached.generations == generations
        {
            return Ok(Arc::clone(&cached.config));
        }
        let config = Arc::new(server_config(
            Arc::new(SingleCertAndKey::from(Arc::clone(&local.certified))),
            trust,
            kind,
        )?);
        self.by_identity.insert(
            key,
            Cached {
                generations,
                config: Arc::clone(&config),
            },
        );
        Ok(config)
    }

    /// A configuration that refuses every handshake with an alert, for a server name that is none of this
    /// node's.
    pub fn refusing(&self, trust: &Trust) -> Result<Arc<ServerConfig>, Error> {
        Ok(Arc::new(server_config(
            Arc::new(NoCertificate),
            trust,
            Kind::Warren,
        )?))
    }

    /// Forgets identities that have left the node.
    pub fn retain(&self, is_local: impl Fn(&Identity) -> bool) {
        self.by_identity
            .retain(|(identity, _), _| is_local(identity));
    }
}

fn server_config(
    resolver: Arc<dyn ResolvesServerCert>,
    trust: &Trust,
    kind: Kind,
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(UriClientVerifier::new(
            Arc::clone(&trust.roots),
            &trust.trust_domain,
            true,
        ))
        .with_cert_resolver(resolver);
    config.alpn_protocols = kind.protocols();
    config.session_storage = match kind {
        Kind::Warren => ServerSessionMemoryCache::new(SESSIONS),
        Kind::Hbone => Arc::new(rustls::server::NoServerSessionStorage {}),
    };
    Ok(config)
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesServerCert for NoCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        None
    }
}

/// A peer whose certificates have been verified, in this handshake or the one that is resumed.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The URI name it proved.
    pub identity: Identity,
    /// End of the validity of its certificate.
    pub not_after: SystemTime,
    /// The session was resumed.
    pub resumed: bool,
    /// It takes large heads before the body of a message.
    pub large_heads: bool,
}

/// Reads the peer off a finished handshake. A resumed session proves what the peer showed in an earlier
/// one: that must still hold now, under the roots trusted now.
pub fn peer(state: &CommonState, role: PeerRole, trust: &Trust) -> Result<Peer, Error> {
    let chain = state.peer_certificates().unwrap_or_default();
    let leaf = chain.first().ok_or(Error::NoCertificatesPresented)?;
    let resumed = state.handshake_kind() == Some(HandshakeKind::Resumed);
    if resumed {
        verify_chain(&trust.roots, role, leaf, &chain[1..], UnixTime::now())?;
    }
    let identity = uri_name(leaf)?
        .parse()
        .map_err(|_| Error::InvalidCertificate(CertificateError::NotValidForName))?;
    let end = not_after(leaf).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
    Ok(Peer {
        identity,
        not_after: SystemTime::UNIX_EPOCH + end,
        resumed,
        large_heads: state.alpn_protocol() == Some(ALPN_WARREN_2),
    })
}

/// Why a handshake failed: the row of the error table, and the finer `result` of the handshake metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the connections that wait for the tunnel.
    pub error: ProxyError,
    /// For `warren_tunnel_handshakes_total` and the log.
    pub result: &'static str,
}

impl Refusal {
    /// Nobody refused anything: the peer's process ended meanwhile, as one does that a newer one has replaced.
    pub fn is_lost(&self) -> bool {
        matches!(self.result, "connection_lost" | "closed")
    }
}

/// Classifies the error of a handshake (rustls wraps its own in `io::Error`).
pub fn refusal(error: &io::Error) -> Refusal {
    match error.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
        Some(error) => tls_refusal(error),
        None => Refusal {
            error: ProxyError::TunnelHandshake,
            result: "connection_lost",
        },
    }
}

/// Classifies a TLS error.
pub fn tls_refusal(error: &Error) -> Refusal {
    use ProxyError::{CertificateExpired, TunnelHandshake, TunnelIdentity};
    let (error, result) = match error {
        Error::InvalidCertificate(reason) => match reason {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                (CertificateExpired, "peer_expired")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                (CertificateExpired, "peer_not_valid_yet")
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                (TunnelHandshake, "peer_unknown_ca")
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                (TunnelIdentity, "peer_wrong_identity")
            }
            _ => (TunnelHandshake, "peer_bad_certificate"),
        },
        Error::NoCertificatesPresented => (TunnelHandshake, "peer_no_certificate"),
        Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateExpired => (CertificateExpired, "refused_expired"),
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                (TunnelHandshake, "refused_unknown_ca")
            }
            AlertDescription::AccessDenied | AlertDescription::UnrecognisedName => {
                (TunnelIdentity, "refused_no_identity")
            }
            AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
                (TunnelHandshake, "refused_bad_certificate")
            }
            AlertDescription::CertificateRequired => (TunnelHandshake, "refused_no_certificate"),
            AlertDescription::NoApplicationProtocol => (TunnelHandshake, "refused_protocol"),
            _ => (TunnelHandshake, "refused_other"),
        },
        Error::NoApplicationProtocol => (TunnelHandshake, "protocol"),
        Error::PeerIncompatible(_) => (TunnelHandshake, "incompatible"),
        _ => (TunnelHandshake, "malformed"),
    };
    Refusal { error, result }
}

#[cfg(test)]
mod tests;
