//! A root with its key, from whatever it is kept in, and the bundle of all roots that are trusted.

use mesh_api::tls;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use sha2::{Digest, Sha256};
use std::fmt::Display;
use std::sync::Arc;
use time::OffsetDateTime;

use super::csr::CsrError;

/// The root that signs, or is to, and everything that is trusted.
#[derive(Debug)]
pub struct Roots {
    pub(super) root: Arc<Root>,
    /// DER, the newest root first, no repetitions.
    pub(super) bundle: Vec<Vec<u8>>,
}

/// A root with its key.
pub(super) struct Root {
    pub(super) der: CertificateDer<'static>,
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) not_after: OffsetDateTime,
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// Why the authority cannot work or will not sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The file system refused.
    #[error("certificate authority: {path}: {source}")]
    Io {
        /// File or directory.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file, or an entry of a Secret, holds something else than it should.
    #[error("certificate authority: {place}: {message}")]
    Content {
        /// The file or entry.
        place: String,
        /// What was expected.
        message: String,
    },
    /// The API server refused or cannot be reached.
    #[error("certificate authority: {object}: {source}")]
    Api {
        /// The Secret or ConfigMap.
        object: String,
        /// What it said.
        source: Box<kube::Error>,
    },
    /// The request is bad.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The root can sign no more.
    #[error("the root certificate expired at {0}; replace it")]
    RootExpired(OffsetDateTime),
    /// The signature failed.
    #[error("a certificate could not be signed: {0}")]
    Sign(rcgen::Error),
    /// The TLS library refused what was made.
    #[error("the controller's TLS server could not be set up: {0}")]
    Tls(rustls::Error),
}

/// Reads a root. Places say in mistakes where the text is from.
pub(super) fn load(
    (cert_place, cert): (&dyn Display, &[u8]),
    (key_place, key): (&dyn Display, &[u8]),
    trust_domain: &str,
) -> Result<Root, CaError> {
    let der = CertificateDer::from_pem_slice(cert)
        .map_err(|e| content(cert_place, format!("expected a certificate in PEM: {e}")))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| {
        content(
            key_place,
            format!("expected an unencrypted private key in PEM: {e}"),
        )
    })?;
    let key = KeyPair::try_from(&key).map_err(|e| {
        content(
            key_place,
            format!("expected an ECDSA, Ed25519 or RSA key: {e}"),
        )
    })?;
    root(cert_place, der, key, trust_domain)
}

/// Joins a certificate to its key and makes sure that what they sign will be accepted.
fn root(
    place: &dyn Display,
    der: CertificateDer<'static>,
    key: KeyPair,
    trust_domain: &str,
) -> Result<Root, CaError> {
    let public = key.public_key_raw();
    if !der.windows(public.len()).any(|part| part == public) {
        return Err(content(
            place,
            "the private key is not that of this certificate",
        ));
    }
    let issuer = Issuer::from_ca_cert_der(&der, key)
        .map_err(|e| content(place, format!("cannot be used as a root: {e}")))?;
    let not_after = tls::not_after(&der)
        .and_then(|end| OffsetDateTime::from_unix_timestamp(end.as_secs() as i64).ok())
        .ok_or_else(|| content(place, "its validity cannot be read"))?;
    let root = Root {
        der,
        issuer,
        not_after,
    };
    let usages = root.issuer.key_usages();
    if !usages.is_empty() && !usages.contains(&KeyUsagePurpose::KeyCertSign) {
        return Err(content(
            place,
            "its key usage does not allow it to sign certificates",
        ));
    }
    let store = tls::roots([root.der.as_ref()]).map_err(|e| content(place, e.to_string()))?;
    let judge = |leaf: &CertificateDer<'_>| {
        tls::verify_chain(&store, tls::PeerRole::Client, leaf, &[], now())
    };
    // A leaf of its own must verify: an algorithm that is not supported or a name that cannot be
    // repeated exactly would be noticed only by every node otherwise.
    let trial = KeyPair::generate().map_err(CaError::Sign)?;
    let name = format!("spiffe://{trust_domain}/warren/trial");
    let name = SanType::URI(name.as_str().try_into().map_err(CaError::Sign)?);
    let leaf = super::sign(&root, name, &trial, std::time::Duration::from_secs(60))?;
    judge(&leaf).map_err(|e| {
        content(
            place,
            format!("a certificate signed by it is not accepted: {e}"),
        )
    })?;
    if judge(&root.der).is_ok() {
        return Err(content(
            place,
            "is not a CA certificate (basic constraints)",
        ));
    }
    Ok(root)
}

/// Makes a root. Each has a subject of its own: with equal subjects, verifiers that look for the issuer by
/// name could try the wrong one first, and some give up then.
pub(super) fn make(trust_domain: &str) -> Result<Made, CaError> {
    let key = KeyPair::generate().map_err(CaError::Sign)?;
    let fingerprint: String = Sha256::digest(key.public_key_raw())[..8]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Warren root {fingerprint}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(super::serial());
    let now = OffsetDateTime::now_utc();
    params.not_before = now - super::BACKDATED;
    params.not_after = now + ROOT_LIFETIME;
    let cert = params.self_signed(&key).map_err(CaError::Sign)?;
    Ok(Made {
        certificate: cert.pem(),
        key: key.serialize_pem(),
    })
}

/// A new root, PEM.
pub(super) struct Made {
    pub(super) certificate: String,
    pub(super) key: String,
}

impl Roots {
    /// What is trusted beside the root: what the user adds, and what was replaced; not what has expired.
    pub(super) fn new(
        root: Root,
        extra: Vec<CertificateDer<'static>>,
        retired: Vec<CertificateDer<'static>>,
    ) -> Self {
        let mut bundle: Vec<CertificateDer<'static>> = vec![root.der.clone()];
        for der in extra.into_iter().chain(retired) {
            let expired = tls::not_after(&der).is_none_or(|end| end.as_secs() <= now().as_secs());
            if !expired && !bundle.contains(&der) {
                bundle.push(der);
            }
        }
        Self {
            root: Arc::new(root),
            bundle: bundle.iter().map(|der| der.to_vec()).collect(),
        }
    }

    /// The whole bundle, PEM.
    pub(super) fn bundle_pem(&self) -> String {
        pem(&self.bundle)
    }
}

/// Certificates in PEM.
pub(super) fn certificates(
    place: &dyn Display,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, CaError> {
    CertificateDer::pem_slice_iter(text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| content(place, format!("expected certificates in PEM: {e}")))
}

/// The roots that were replaced: those so far, and the one that was first in the bundle until now if it is
/// another than today's. `None`: nothing to add.
pub(super) fn retire(
    retired: &[CertificateDer<'static>],
    last: Option<&CertificateDer<'static>>,
    root: &Root,
) -> Option<Vec<CertificateDer<'static>>> {
    let last = last.filter(|last| **last != root.der && !retired.contains(last))?;
    Some(retired.iter().chain([last]).cloned().collect())
}

pub(super) fn pem(certificates: &[impl AsRef<[u8]>]) -> String {
    use data_encoding::BASE64;
    let mut text = String::new();
    for der in certificates {
        let body = BASE64.encode(der.as_ref());
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in body.as_bytes().chunks(64) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

pub(super) fn content(place: &dyn Display, message: impl Into<String>) -> CaError {
    CaError::Content {
        place: place.to_string(),
        message: message.into(),
    }
}

fn now() -> UnixTime {
    UnixTime::now()
}

const ROOT_LIFETIME: time::Duration = time::Duration::days(3650);
