//! The certificate authority: signs short-lived certificates for keys that stay on the nodes.
//!
//! Of a signing request only the public key is used, after its self-signature was checked; every name is
//! set here, by the caller's proven right to it. Who may have what is decided in [`crate::serve`].
//!
//! Rotation: `root.crt` and `root.key` are replaced in the directory. The new root joins the trust bundle at
//! once and beside the old one, but signs only when every node is known to trust it ([`Authority::promote`]).
//! The old root stays in `retired.pem`, and so in the bundle, until it expires or is removed there.

mod csr;
mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod tokens;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_api::identity::{Identity, NodeIdentity};
use mesh_api::names::CONTROLLER_NAME;
use mesh_api::tls;
use parking_lot::Mutex;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber,
};
use rustls::server::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

pub use csr::CsrError;
pub use files::CaError;
use files::{Files, Root};

/// How the authority is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where `root.crt`, `root.key` and the bundle are.
    pub directory: PathBuf,
    /// The trust domain of all identities.
    pub trust_domain: String,
    /// How long a workload's certificate is valid.
    pub leaf_lifetime: Duration,
    /// How long a node's certificate is valid.
    pub node_lifetime: Duration,
}

/// The authority. Shared behind an `Arc`.
#[derive(Debug)]
pub struct Authority {
    settings: Settings,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    signing: Arc<Root>,
    /// What the directory held when it was last read without a mistake.
    files: Files,
}

/// What a reading of the directory changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The bundle is another.
    pub bundle: bool,
    /// There is a root that does not sign yet.
    pub pending: bool,
}

/// A certificate that was signed.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, DER; the root is not included.
    pub chain: Vec<Vec<u8>>,
    /// Every root that is trusted now, DER.
    pub trust_bundle: Vec<Vec<u8>>,
}

impl Authority {
    /// Reads the directory; makes a root if it has none.
    pub fn open(settings: Settings) -> Result<Self, CaError> {
        let files = files::read(&settings.directory, &settings.trust_domain)?;
        let state = State {
            signing: files.root.clone(),
            files,
        };
        Ok(Self {
            settings,
            state: Mutex::new(state),
        })
    }

    /// Reads the directory again. A mistake leaves everything as it was.
    pub fn reload(&self) -> Result<Changed, CaError> {
        let files = files::read(&self.settings.directory, &self.settings.trust_domain)?;
        let mut state = self.state.lock();
        let changed = Changed {
            bundle: files.bundle != state.files.bundle,
            pending: files.root.der != state.signing.der,
        };
        state.files = files;
        Ok(changed)
    }

    /// Signs with the newest root from now on. To be called when every node trusts it.
    pub fn promote(&self) {
        let mut state = self.state.lock();
        state.signing = state.files.root.clone();
    }

    /// Every root that is trusted now, DER, the newest first.
    pub fn bundle(&self) -> Vec<Vec<u8>> {
        self.state.lock().files.bundle.clone()
    }

    /// End of validity of the signing root.
    pub fn root_not_after(&self) -> OffsetDateTime {
        self.state.lock().signing.not_after
    }

    /// Where the authority's files are.
    pub fn directory(&self) -> &Path {
        &self.settings.directory
    }

    /// The trust domain of all identities.
    pub fn trust_domain(&self) -> &str {
        &self.settings.trust_domain
    }

    /// Signs a workload's certificate.
    pub fn issue_workload(&self, identity: &Identity, csr: &[u8]) -> Result<Issued, CaError> {
        let key = csr::public_key(csr)?;
        self.issue_uri(identity.as_str(), &key, self.settings.leaf_lifetime)
    }

    /// Signs a node's certificate.
    pub fn issue_node(&self, identity: &NodeIdentity, csr: &[u8]) -> Result<Issued, CaError> {
        let key = csr::public_key(csr)?;
        self.issue_uri(&identity.to_string(), &key, self.settings.node_lifetime)
    }

    /// A fresh configuration of the controller's own TLS server: a new key and certificate, and the roots
    /// that clients are judged by. A client may come without a certificate, to get its first.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>, CaError> {
        let (signing, bundle) = self.signing();
        let key = KeyPair::generate().map_err(CaError::Sign)?;
        let name = SanType::DnsName(CONTROLLER_NAME.try_into().map_err(CaError::Sign)?);
        let leaf = sign(&signing, name, &key, SERVER_LIFETIME)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let roots = tls::roots(bundle.iter().map(Vec::as_slice)).map_err(CaError::Tls)?;
        let clients = tls::UriClientVerifier::new(roots, &self.settings.trust_domain, false);
        let mut config = ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(CaError::Tls)?
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![leaf], key)
            .map_err(CaError::Tls)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would not see that the bundle changed.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn issue_uri(
        &self,
        uri: &str,
        key: &impl PublicKeyData,
        lifetime: Duration,
    ) -> Result<Issued, CaError> {
        let (signing, trust_bundle) = self.signing();
        let name = SanType::URI(uri.try_into().map_err(CaError::Sign)?);
        let leaf = sign(&signing, name, key, lifetime)?;
        Ok(Issued {
            chain: vec![leaf.to_vec()],
            trust_bundle,
        })
    }

    fn signing(&self) -> (Arc<Root>, Vec<Vec<u8>>) {
        let state = self.state.lock();
        (state.signing.clone(), state.files.bundle.clone())
    }
}

/// Signs a leaf: valid from five minutes ago, as clocks differ, and never longer than its root.
fn sign(
    root: &Root,
    name: SanType,
    key: &impl PublicKeyData,
    lifetime: Duration,
) -> Result<CertificateDer<'static>, CaError> {
    let now = OffsetDateTime::now_utc();
    if now >= root.not_after {
        return Err(CaError::RootExpired(root.not_after));
    }
    let mut params = CertificateParams::default();
    // RFC 5280, 4.1.2.6: with an empty subject the name is in the alternative names alone, then critical.
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![name];
    params.not_before = now - BACKDATED;
    params.not_after = (now + lifetime).min(root.not_after);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    let leaf = params.signed_by(key, &root.issuer).map_err(CaError::Sign)?;
    Ok(leaf.der().clone())
}

/// 127 random bits: positive, as RFC 5280, 4.1.2.2 asks.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}

const BACKDATED: Duration = Duration::from_secs(5 * 60);
/// The controller's own certificate; re-issued long before.
const SERVER_LIFETIME: Duration = Duration::from_secs(24 * 3600);

#[cfg(test)]
mod tests;
