//! Certificates for peers that the tests play: good ones under the lab's own root, and bad ones.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

/// A certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

/// Files of a peer's certificate.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// PEM chain.
    pub certificate: PathBuf,
    /// PEM key.
    pub key: PathBuf,
}

impl Authority {
    /// A new root.
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key can be made");
        let certificate = params
            .self_signed(&key)
            .expect("a root can be signed")
            .pem();
        Self {
            issuer: Issuer::new(params, key),
            certificate,
        }
    }

    /// Writes `root.crt` and `root.key`, as `warren lab up --ca` wants them.
    pub fn write(&self, directory: &Path) {
        std::fs::create_dir_all(directory).expect("the scenario's directory can be written");
        let write = |name: &str, text: &str| {
            std::fs::write(directory.join(name), text)
                .expect("the scenario's directory can be written");
        };
        write("root.crt", &self.certificate);
        write("root.key", &self.issuer.key().serialize_pem());
    }

    /// A certificate of the workload `spiffe://<domain>/ns/<namespace>/sa/<account>`, valid for an hour.
    pub fn workload(&self, directory: &Path, uri: &str) -> Leaf {
        let now = OffsetDateTime::now_utc();
        self.leaf(
            directory,
            uri,
            (now - Duration::minutes(5), now + Duration::hours(1)),
        )
    }

    /// The same, expired a minute ago.
    pub fn expired(&self, directory: &Path, uri: &str) -> Leaf {
        let now = OffsetDateTime::now_utc();
        self.leaf(
            directory,
            uri,
            (now - Duration::hours(2), now - Duration::minutes(1)),
        )
    }

    fn leaf(
        &self,
        directory: &Path,
        uri: &str,
        (from, to): (OffsetDateTime, OffsetDateTime),
    ) -> Leaf {
        let mut params = CertificateParams::default();
        let uri = uri.try_into().expect("a SPIFFE URI is ASCII");
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        (params.not_before, params.not_after) = (from, to);
        let key = KeyPair::generate().expect("a key can be made");
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("a leaf can be signed");
        std::fs::create_dir_all(directory).expect("the scenario's directory can be written");
        let files = Leaf {
            certificate: directory.join("leaf.crt"),
            key: directory.join("leaf.key"),
        };
        std::fs::write(&files.certificate, certificate.pem())
            .expect("the scenario's directory can be written");
        std::fs::write(&files.key, key.serialize_pem())
            .expect("the scenario's directory can be written");
        files
    }
}
