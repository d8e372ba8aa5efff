//! Verification of SPIFFE peers: a chain to a trusted root, and exactly one URI name.
//!
//! The rules of X.509-SVIDs (SPIFFE X509-SVID specification, section 5): one URI SAN; the leaf is no CA
//! (webpki refuses a CA as end entity); the extended key usage fits the role.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::EndEntityCert;

/// The crypto provider of every TLS configuration: aws-lc-rs, the X25519MLKEM768 hybrid first.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The roots of a trust bundle. Fails if a certificate cannot be parsed or there is none.
pub fn roots<'a>(bundle: impl IntoIterator<Item = &'a [u8]>) -> Result<Arc<RootCertStore>, Error> {
    let mut store = RootCertStore::empty();
    for der in bundle {
        store.add(CertificateDer::from_slice(der).into_owned())?;
    }
    if store.is_empty() {
        return Err(Error::General("the trust bundle is empty".into()));
    }
    Ok(Arc::new(store))
}

/// The one URI name of a certificate.
pub fn uri_name(leaf: &CertificateDer<'_>) -> Result<String, Error> {
    let cert = EndEntityCert::try_from(leaf)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let mut names = cert.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name.to_owned()),
        _ => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
    }
}

/// Which end of a connection a certificate was shown by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRole {
    /// The peer dialled.
    Client,
    /// The peer was dialled.
    Server,
}

/// Checks chain, validity and key usage of a peer's certificates against `roots` at time `now`.
pub fn verify_chain(
    roots: &RootCertStore,
    role: PeerRole,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), Error> {
    let cert = EndEntityCert::try_from(leaf)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let usage = match role {
        PeerRole::Client => webpki::KeyUsage::client_auth(),
        PeerRole::Server => webpki::KeyUsage::server_auth(),
    };
    cert.verify_for_usage(
        algorithms().all,
        &roots.roots,
        intermediates,
        now,
        usage,
        None,
        None,
    )
    .map(|_| ())
    .map_err(|e| {
        Error::InvalidCertificate(match e {
            webpki::Error::CertExpired { .. } => CertificateError::Expired,
            webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
            webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
            webpki::Error::InvalidSignatureForPublicKey => CertificateError::BadSignature,
            webpki::Error::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
            other => CertificateError::Other(rustls::OtherError(Arc::new(other))),
        })
    })
}

/// When a certificate's validity ends, in seconds since the epoch.
pub fn not_after(leaf: &CertificateDer<'_>) -> Option<Duration> {
    // webpki tells the end of validity only through its error for a certificate judged after it. A root
    // store is not needed for that: validity is checked before the path is built.
    let cert = EndEntityCert::try_from(leaf).ok()?;
    let never = UnixTime::since_unix_epoch(Duration::from_secs(u32::MAX.into()) * 60);
    match cert.verify_for_usage(
        algorithms().all,
        &[],
        &[],
        never,
        webpki::KeyUsage::client_auth(),
        None,
        None,
    ) {
        Err(webpki::Error::CertExpired { not_after, .. }) => {
            Some(Duration::from_secs(not_after.as_secs()))
        }
        _ => None,
    }
}

/// When a certificate's validity begins, in seconds since the epoch.
pub fn not_before(leaf: &CertificateDer<'_>) -> Option<Duration> {
    // As above: the error for a certificate judged at the epoch tells it.
    let cert = EndEntityCert::try_from(leaf).ok()?;
    let epoch = UnixTime::since_unix_epoch(Duration::ZERO);
    match cert.verify_for_usage(
        algorithms().all,
        &[],
        &[],
        epoch,
        webpki::KeyUsage::client_auth(),
        None,
        None,
    ) {
        Err(webpki::Error::CertNotValidYet { not_before, .. }) => {
            Some(Duration::from_secs(not_before.as_secs()))
        }
        _ => None,
    }
}

/// Verifies a server by the URI name it must prove, not by DNS name.
#[derive(Debug)]
pub struct UriServerVerifier {
    roots: Arc<RootCertStore>,
    uri: String,
}

impl UriServerVerifier {
    /// `uri`: the whole SPIFFE URI that the server must prove.
    pub fn new(roots: Arc<RootCertStore>, uri: impl Into<String>) -> Arc<Self> {
        Arc::new(Self {
            roots,
            uri: uri.into(),
        })
    }
}

impl ServerCertVerifier for UriServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_chain(&self.roots, PeerRole::Server, leaf, intermediates, now)?;
        if uri_name(leaf)? != self.uri {
            return Err(Error::InvalidCertificate(CertificateError::NotValidForName));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// Verifies a client: a chain to a root and one URI name in the trust domain. Who may do what is
/// decided later, from that name.
#[derive(Debug)]
pub struct UriClientVerifier {
    roots: Arc<RootCertStore>,
    prefix: String,
    mandatory: bool,
}

impl UriClientVerifier {
    /// `mandatory`: a client without certificate is refused in the handshake.
    pub fn new(roots: Arc<RootCertStore>, trust_domain: &str, mandatory: bool) -> Arc<Self> {
        Arc::new(Self {
            roots,
            prefix: format!("spiffe://{trust_domain}/"),
            mandatory,
        })
    }
}

impl ClientCertVerifier for UriClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        verify_chain(&self.roots, PeerRole::Client, leaf, intermediates, now)?;
        if !uri_name(leaf)?.starts_with(&self.prefix) {
            return Err(Error::InvalidCertificate(CertificateError::NotValidForName));
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}

#[cfg(test)]
mod tests;
