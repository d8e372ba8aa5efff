//! A private key with its certificate chain: made here, certified elsewhere, kept on a tmpfs.
//!
//! The file is PEM, key first, mode 0600, replaced by rename, so that a reader sees the old or the
//! new pair and never half of one.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, KeyPair};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::{Zeroize, Zeroizing};

use crate::tls;

/// A key that has been certified.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// What rustls signs and identifies itself with.
    pub certified: Arc<CertifiedKey>,
    /// The only URI name of the leaf.
    pub uri: String,
    /// Begin of the leaf's validity.
    pub not_before: SystemTime,
    /// End of the leaf's validity.
    pub not_after: SystemTime,
}

impl Credentials {
    /// Joins a key to the chain (leaf first) that was issued for it. Fails if they do not belong
    /// together.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, CredentialsError> {
        let leaf = chain
            .first()
            .ok_or_else(|| CredentialsError::Unusable("it holds no certificate".into()))?;
        let unusable = |e: rustls::Error| CredentialsError::Unusable(e.to_string());
        let uri = tls::uri_name(leaf).map_err(unusable)?;
        let no_validity = || CredentialsError::Unusable("its validity cannot be read".into());
        let time = |since: Duration| SystemTime::UNIX_EPOCH + since;
        let not_before = tls::not_before(leaf).map(time).ok_or_else(no_validity)?;
        let not_after = tls::not_after(leaf).map(time).ok_or_else(no_validity)?;
        let certified = CertifiedKey::from_der(chain, key, &tls::provider()).map_err(unusable)?;
        Ok(Self {
            certified: Arc::new(certified),
            uri,
            not_before,
            not_after,
        })
    }

    /// Reads what [`KeyRequest::complete`] stored. `None`: there is no such file.
    pub fn load(path: &Path) -> Result<Option<Self>, CredentialsError> {
        let text = match fs::read(path) {
            Ok(text) => Zeroizing::new(text),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CredentialsError::file(path, source)),
        };
        let unusable = |e: rustls_pki_types::pem::Error| CredentialsError::Unusable(e.to_string());
        let key = PrivateKeyDer::from_pem_slice(&text).map_err(unusable)?;
        let chain = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(unusable)?;
        Self::new(chain, key).map(Some)
    }

    /// Whether `now` is within the leaf's validity.
    pub fn valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }

    /// The moment when `share` (0 to 1) of the leaf's life is over.
    pub fn life(&self, share: f64) -> SystemTime {
        let life = self
            .not_after
            .duration_since(self.not_before)
            .unwrap_or_default();
        self.not_before + life.mul_f64(share.clamp(0.0, 1.0))
    }
}

/// A fresh P-256 key that is to be certified.
pub struct KeyRequest {
    key: KeyPair,
    /// PKCS #10, DER. Names nothing: the issuer knows who asks.
    pub csr: Vec<u8>,
}

impl KeyRequest {
    /// Makes a key and its signing request.
    pub fn new() -> Result<Self, CredentialsError> {
        let failed = |e: rcgen::Error| CredentialsError::Unusable(e.to_string());
        let key = KeyPair::generate().map_err(failed)?;
        let csr = CertificateParams::default()
            .serialize_request(&key)
            .map_err(failed)?
            .der()
            .to_vec();
        Ok(Self { key, csr })
    }

    /// Joins the key to its chain (DER, leaf first), whose URI name must be right, and, if a path is
    /// given, keeps both there.
    pub fn complete(
        self,
        chain: Vec<Vec<u8>>,
        is_for: impl FnOnce(&str) -> bool,
        path: Option<&Path>,
    ) -> Result<Credentials, CredentialsError> {
        let der = Zeroizing::new(self.key.serialize_der());
        let key = PrivateKeyDer::try_from(der.to_vec())
            .map_err(|e| CredentialsError::Unusable(e.into()))?;
        let chain: Vec<_> = chain.into_iter().map(CertificateDer::from).collect();
        let credentials = Credentials::new(chain.clone(), key)?;
        if !is_for(&credentials.uri) {
            let message = format!("it is for {}", credentials.uri);
            return Err(CredentialsError::Unusable(message));
        }
        if let Some(path) = path {
            let mut text = Zeroizing::new(pem("PRIVATE KEY", &der));
            for certificate in &chain {
                text.push_str(&pem("CERTIFICATE", certificate));
            }
            write_private(path, text.as_bytes())?;
        }
        Ok(credentials)
    }
}

impl Drop for KeyRequest {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// Writes PEM certificates, for a trust bundle.
pub fn bundle_to_pem(bundle: &[Vec<u8>]) -> String {
    bundle.iter().map(|der| pem("CERTIFICATE", der)).collect()
}

/// Reads PEM certificates.
pub fn bundle_from_pem(text: &[u8]) -> Result<Vec<Vec<u8>>, CredentialsError> {
    CertificateDer::pem_slice_iter(text)
        .map(|der| der.map(|der| der.to_vec()))
        .collect::<Result<_, _>>()
        .map_err(|e: rustls_pki_types::pem::Error| CredentialsError::Unusable(e.to_string()))
}

/// Replaces a file by one that only its owner can read. Missing directories are made, mode 0700.
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), CredentialsError> {
    let failed = |source| CredentialsError::file(path, source);
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed)?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let write = || {
        let _ = fs::remove_file(&temporary);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        failed(e)
    })
}

fn pem(label: &str, der: &[u8]) -> String {
    let mut base64 = Zeroizing::new(data_encoding::BASE64.encode(der));
    // Room for everything at once: a reallocation would leave a copy of a key behind.
    let mut text = String::with_capacity(base64.len() * 66 / 64 + 2 * label.len() + 64);
    text.push_str(&format!("-----BEGIN {label}-----\n"));
    for line in base64.as_bytes().chunks(64) {
        // Base64 is ASCII.
        text.extend(line.iter().copied().map(char::from));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    base64.zeroize();
    text
}

/// Why a key and certificate cannot be used or kept.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file system refused.
    #[error("{path}: {source}")]
    File {
        /// File name.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Malformed, or key and certificate do not belong together.
    #[error("the certificate cannot be used: {0}")]
    Unusable(String),
}

impl CredentialsError {
    fn file(path: &Path, source: io::Error) -> Self {
        Self::File {
            path: path.display().to_string(),
            source,
        }
    }
}
