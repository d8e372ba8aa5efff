//! The public key of a signing request.

use rcgen::{CertificateSigningRequestParams, PublicKey, PublicKeyData};
use rustls_pki_types::CertificateSigningRequestDer;

/// Why a signing request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// More bytes than any key needs.
    #[error("the signing request is larger than {MAX_SIZE} bytes")]
    TooLarge,
    /// Not PKCS #10, or not signed by the key it is for.
    #[error("the signing request cannot be used: {0}")]
    Malformed(String),
    /// The key does not fit the algorithm, or is weak.
    #[error(
        "the key of the signing request is not accepted: use ECDSA P-256 or P-384, Ed25519 or RSA from 2048 bits"
    )]
    Key,
}

/// Checks the self-signature (RFC 2986, section 4.2: proof that the asker holds the key) and takes the key.
pub(super) fn public_key(der: &[u8]) -> Result<PublicKey, CsrError> {
    if der.len() > MAX_SIZE {
        return Err(CsrError::TooLarge);
    }
    let request = CertificateSigningRequestDer::from(der);
    let params = CertificateSigningRequestParams::from_der(&request)
        .map_err(|e| CsrError::Malformed(e.to_string()))?;
    let key = params.public_key;
    // The algorithm was taken from the signature: make sure that the key is one of it.
    let (algorithm, length) = (key.algorithm(), key.der_bytes().len());
    let fits = if algorithm == &rcgen::PKCS_ECDSA_P256_SHA256 {
        length == 65
    } else if algorithm == &rcgen::PKCS_ECDSA_P384_SHA384 {
        length == 97
    } else if algorithm == &rcgen::PKCS_ED25519 {
        length == 32
    } else if algorithm == &rcgen::PKCS_RSA_SHA256 {
        // Modulus and exponent in DER.
        (256..=1100).contains(&length)
    } else {
        false
    };
    fits.then_some(key).ok_or(CsrError::Key)
}

const MAX_SIZE: usize = 16 * 1024;
