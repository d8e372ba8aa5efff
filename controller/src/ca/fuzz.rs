//! Signing requests: what is not signed by its own key is refused, whatever else is right with it.

use std::sync::OnceLock;

use rcgen::{CertificateParams, KeyPair, PublicKeyData};

use super::csr::public_key;

/// What is accepted was signed as it stands: the part that the signature is about is one that was really signed, and the
/// key that comes out is the key in it.
pub(crate) fn csr(bytes: &[u8]) {
    let Ok(key) = public_key(bytes) else {
        return;
    };
    let signed = signed_part(bytes).expect("an accepted request is DER");
    let genuine = genuine()
        .iter()
        .find(|request| signed_part(&request.der) == Some(signed))
        .expect("signed by nobody, accepted all the same");
    assert_eq!(key.der_bytes(), genuine.key);
}

struct Genuine {
    der: Vec<u8>,
    key: Vec<u8>,
}

/// Made once for each process: keys are random.
fn genuine() -> &'static [Genuine] {
    static GENUINE: OnceLock<Vec<Genuine>> = OnceLock::new();
    GENUINE.get_or_init(|| {
        let algorithms = [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
            &rcgen::PKCS_RSA_SHA256,
        ];
        let of = |algorithm| {
            let key = KeyPair::generate_for(algorithm).expect("a supported algorithm");
            let request = CertificateParams::default().serialize_request(&key);
            Genuine {
                der: request.expect("an empty request").der().to_vec(),
                key: key.der_bytes().to_vec(),
            }
        };
        algorithms.into_iter().map(of).collect()
    })
}

/// CertificationRequestInfo (RFC 2986, section 4), tag and length included.
fn signed_part(der: &[u8]) -> Option<&[u8]> {
    let inner = &der[header(der)?.0..];
    let (head, length) = header(inner)?;
    inner.get(..head + length)
}

/// Sizes of a DER element's header and content.
fn header(der: &[u8]) -> Option<(usize, usize)> {
    let first = *der.get(1)?;
    if first < 0x80 {
        return Some((2, first.into()));
    }
    let digits = der.get(2..2 + usize::from(first & 0x7f))?;
    let length = digits
        .iter()
        .fold(0usize, |n, digit| n << 8 | usize::from(*digit));
    Some((2 + digits.len(), length))
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    genuine()
        .iter()
        .map(|request| request.der.clone())
        .collect()
}
