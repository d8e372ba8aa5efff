//! The authority's directory: `root.crt`, `root.key`, `bundle-extra.pem`, `retired.pem` and `bundle.pem`.
//!
//! `root.crt` and `root.key` are the user's, or made here once. `bundle-extra.pem` is the user's.
//! `retired.pem` (roots that were replaced) and `bundle.pem` (all that is trusted; nodes mount it) are
//! written here; a root is taken out of trust by removing it from `retired.pem`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_api::tls;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::csr::CsrError;
use crate::enrolment::replace;

/// What the authority's directory holds.
#[derive(Debug)]
pub(super) struct Files {
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
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file holds something else than it should.
    #[error("certificate authority: {path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected.
        message: String,
    },
    /// The request is bad.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The root can sign no more.
    #[error("the root certificate expired at {0}; replace root.crt and root.key")]
    RootExpired(OffsetDateTime),
    /// The signature failed.
    #[error("a certificate could not be signed: {0}")]
    Sign(rcgen::Error),
    /// The TLS library refused what was made.
    #[error("the controller's TLS server could not be set up: {0}")]
    Tls(rustls::Error),
}

/// Reads the directory, makes a root if there is none, and brings `retired.pem` and `bundle.pem` up to date.
pub(super) fn read(dir: &Path, trust_domain: &str) -> Result<Files, CaError> {
    std::fs::create_dir_all(dir).map_err(io(dir))?;
    let (cert_path, key_path) = (dir.join("root.crt"), dir.join("root.key"));
    let root = match (read_text(&cert_path)?, read_text(&key_path)?) {
        (Some(cert), Some(key)) => load(&cert_path, &cert, &key_path, &key, trust_domain)?,
        (None, None) => make(&cert_path, &key_path, trust_domain)?,
        (Some(_), None) => {
            return Err(file(
                &key_path,
                "is missing, but root.crt is there; add the key of that root",
            ));
        }
        (None, Some(_)) => {
            return Err(file(
                &cert_path,
                "is missing, but root.key is there; add its certificate",
            ));
        }
    };
    let bundle_path = dir.join("bundle.pem");
    let before = certificates(&bundle_path)?;
    let retired = retire(dir, before.first(), &root)?;
    let extra = certificates(&dir.join("bundle-extra.pem"))?;
    let now = now();
    let mut bundle: Vec<CertificateDer<'static>> = vec![root.der.clone()];
    for der in extra.into_iter().chain(retired) {
        let expired = tls::not_after(&der).is_none_or(|end| end.as_secs() <= now.as_secs());
        if !expired && !bundle.contains(&der) {
            bundle.push(der);
        }
    }
    if bundle != before {
        write(&bundle_path, &pem(&bundle), 0o644)?;
    }
    Ok(Files {
        root: Arc::new(root),
        bundle: bundle.iter().map(|der| der.to_vec()).collect(),
    })
}

/// Keeps the root that was first in the bundle so far, if it is another than today's.
fn retire(
    dir: &Path,
    last: Option<&CertificateDer<'static>>,
    root: &Root,
) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let path = dir.join("retired.pem");
    let mut retired = certificates(&path)?;
    if let Some(last) = last
        && *last != root.der
        && !retired.contains(last)
    {
        tracing::info!(
            "the root was replaced; the old one stays trusted, see {}",
            path.display()
        );
        retired.push(last.clone());
        write(&path, &pem(&retired), 0o644)?;
    }
    Ok(retired)
}

fn load(
    cert_path: &Path,
    cert: &str,
    key_path: &Path,
    key: &str,
    trust_domain: &str,
) -> Result<Root, CaError> {
    let der = CertificateDer::from_pem_slice(cert.as_bytes())
        .map_err(|e| file(cert_path, format!("expected a certificate in PEM: {e}")))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| {
        file(
            key_path,
            format!("expected an unencrypted private key in PEM: {e}"),
        )
    })?;
    let key = KeyPair::try_from(&key).map_err(|e| {
        file(
            key_path,
            format!("expected an ECDSA, Ed25519 or RSA key: {e}"),
        )
    })?;
    root(cert_path, der, key, trust_domain)
}

/// Joins a certificate to its key and makes sure that what they sign will be accepted.
fn root(
    path: &Path,
    der: CertificateDer<'static>,
    key: KeyPair,
    trust_domain: &str,
) -> Result<Root, CaError> {
    let public = key.public_key_raw();
    if !der.windows(public.len()).any(|part| part == public) {
        return Err(file(path, "root.key is not the key of this certificate"));
    }
    let issuer = Issuer::from_ca_cert_der(&der, key)
        .map_err(|e| file(path, format!("cannot be used as a root: {e}")))?;
    let not_after = tls::not_after(&der)
        .and_then(|end| OffsetDateTime::from_unix_timestamp(end.as_secs() as i64).ok())
        .ok_or_else(|| file(path, "its validity cannot be read"))?;
    let root = Root {
        der,
        issuer,
        not_after,
    };
    let usages = root.issuer.key_usages();
    if !usages.is_empty() && !usages.contains(&KeyUsagePurpose::KeyCertSign) {
        return Err(file(
            path,
            "its key usage does not allow it to sign certificates",
        ));
    }
    let store = tls::roots([root.der.as_ref()]).map_err(|e| file(path, e.to_string()))?;
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
        file(
            path,
            format!("a certificate signed by it is not accepted: {e}"),
        )
    })?;
    if judge(&root.der).is_ok() {
        return Err(file(path, "is not a CA certificate (basic constraints)"));
    }
    Ok(root)
}

/// Makes a root. Each has a subject of its own: with equal subjects, verifiers that look for the issuer by
/// name could try the wrong one first, and some give up then.
fn make(cert_path: &Path, key_path: &Path, trust_domain: &str) -> Result<Root, CaError> {
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
    // The key first: a certificate without key would stop the next start.
    write(key_path, &key.serialize_pem(), 0o600)?;
    write(cert_path, &cert.pem(), 0o644)?;
    tracing::info!("made a root certificate, {}", cert_path.display());
    root(cert_path, cert.der().clone(), key, trust_domain)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let Some(text) = read_text(path)? else {
        return Ok(Vec::new());
    };
    CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| file(path, format!("expected certificates in PEM: {e}")))
}

fn pem(certificates: &[CertificateDer<'_>]) -> String {
    use data_encoding::BASE64;
    let mut text = String::new();
    for der in certificates {
        let body = BASE64.encode(der);
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in body.as_bytes().chunks(64) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

fn read_text(path: &Path) -> Result<Option<String>, CaError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io(path)(e)),
    }
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    replace(path, text.as_bytes(), mode).map_err(io(path))
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> CaError {
    let path = path.to_owned();
    move |source| CaError::Io {
        path: path.clone(),
        source,
    }
}

fn file(path: &Path, message: impl Into<String>) -> CaError {
    CaError::File {
        path: path.to_owned(),
        message: message.into(),
    }
}

fn now() -> UnixTime {
    UnixTime::now()
}

const ROOT_LIFETIME: time::Duration = time::Duration::days(3650);
