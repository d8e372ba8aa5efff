use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

use tempfile::TempDir;

use super::*;

fn directory(dir: &TempDir) -> PathBuf {
    dir.path().join("ca")
}

fn open(dir: &TempDir) -> Result<Authority, CaError> {
    let settings = settings();
    let roots = files::read(&directory(dir), &settings.trust_domain)?;
    Ok(Authority::new(settings, roots))
}

fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".into(),
        leaf_lifetime: Duration::from_secs(24 * 3600),
        node_lifetime: Duration::from_secs(3600),
    }
}

/// Roots as a user's own tools make them, in every key format there is: by openssl, once a run.
fn testdata(name: &str) -> String {
    static MADE: LazyLock<TempDir> = LazyLock::new(|| {
        let dir = TempDir::new().unwrap();
        let config = "[req]\ndistinguished_name=dn\n[dn]\n[root]\nbasicConstraints=critical,CA:TRUE\n\
                      keyUsage=critical,keyCertSign,cRLSign\n[leaf]\nbasicConstraints=CA:FALSE\n";
        std::fs::write(dir.path().join("openssl.cnf"), config).unwrap();
        let openssl = |command: &str| {
            let output = Command::new("openssl")
                .args(command.split(' '))
                .current_dir(dir.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "openssl {command}: {output:?}");
        };
        openssl("genrsa -traditional -out rsa.key 2048");
        openssl("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out ec-p384.key");
        openssl("ecparam -name prime256v1 -genkey -noout -out ec-sec1.key");
        let request = "req -x509 -config openssl.cnf -days 3650";
        for name in ["rsa", "ec-p384", "ec-sec1"] {
            openssl(&format!(
                "{request} -extensions root -key {name}.key -subj /C=DE/O=Firm/CN={name} -out {name}.crt"
            ));
        }
        openssl(&format!(
            "{request} -extensions leaf -key rsa.key -subj /CN=leaf -out not-a-ca.crt"
        ));
        dir
    });
    std::fs::read_to_string(MADE.path().join(name)).unwrap()
}

fn open_with(cert: &str, key: &str) -> Result<(TempDir, Authority), CaError> {
    let dir = TempDir::new().unwrap();
    std::fs::create_dir(directory(&dir)).unwrap();
    std::fs::write(directory(&dir).join("root.crt"), cert).unwrap();
    std::fs::write(directory(&dir).join("root.key"), key).unwrap();
    open(&dir).map(|authority| (dir, authority))
}

fn csr() -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    CertificateParams::default()
        .serialize_request(&key)
        .unwrap()
        .der()
        .to_vec()
}

fn identity() -> Identity {
    "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap()
}

fn verify(issued: &Issued) {
    let roots = tls::roots(issued.trust_bundle.iter().map(Vec::as_slice)).unwrap();
    let leaf = CertificateDer::from(issued.chain[0].clone());
    let now = rustls_pki_types::UnixTime::now();
    for role in [tls::PeerRole::Client, tls::PeerRole::Server] {
        tls::verify_chain(&roots, role, &leaf, &[], now).unwrap();
    }
    assert_eq!(tls::uri_name(&leaf).unwrap(), identity().as_str());
}

#[test]
fn a_root_is_made_once_and_its_key_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = TempDir::new().unwrap();
    let authority = open(&dir).unwrap();
    verify(&authority.issue_workload(&identity(), &csr()).unwrap());
    let mode = |name: &str| {
        let path = directory(&dir).join(name);
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(
        (mode("root.key"), mode("root.crt"), mode("bundle.pem")),
        (0o600, 0o644, 0o644)
    );
    let again = open(&dir).unwrap();
    assert_eq!(again.bundle(), authority.bundle());
    // Another directory, another subject: equal ones confuse who looks for an issuer by name.
    let other = TempDir::new().unwrap();
    let other = open(&other).unwrap();
    let subject = |a: &Authority| {
        let der = CertificateDer::from(a.bundle().remove(0));
        webpki::anchor_from_trusted_cert(&der)
            .unwrap()
            .subject
            .to_vec()
    };
    assert_ne!(subject(&authority), subject(&other));
}

#[test]
fn roots_of_users_are_used_as_they_are() {
    for name in ["ec-sec1", "ec-p384", "rsa"] {
        let (cert, key) = (
            testdata(&format!("{name}.crt")),
            testdata(&format!("{name}.key")),
        );
        let (dir, authority) = open_with(&cert, &key).unwrap();
        verify(&authority.issue_workload(&identity(), &csr()).unwrap());
        authority.server_config().unwrap();
        assert_eq!(
            std::fs::read_to_string(directory(&dir).join("root.crt")).unwrap(),
            cert
        );
        assert_eq!(
            std::fs::read_to_string(directory(&dir).join("root.key")).unwrap(),
            key
        );
    }
}

#[test]
fn an_unusable_root_is_refused_with_the_reason() {
    let (ec, rsa) = (testdata("ec-sec1.crt"), testdata("rsa.key"));
    for (cert, key, expected) in [
        (
            ec.as_str(),
            rsa.as_str(),
            "root.crt: the private key is not that of this certificate",
        ),
        (
            &testdata("not-a-ca.crt"),
            &rsa,
            "root.crt: is not a CA certificate",
        ),
        (
            &expired(&rsa),
            &rsa,
            "the root certificate expired at 2021-01-01",
        ),
        ("", &rsa, "root.crt: expected a certificate in PEM"),
        (
            &ec,
            "",
            "root.key: expected an unencrypted private key in PEM",
        ),
    ] {
        let error = open_with(cert, key).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}\n{expected}");
    }
    for (present, missing) in [("root.crt", "root.key"), ("root.key", "root.crt")] {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir(directory(&dir)).unwrap();
        std::fs::write(directory(&dir).join(present), "x").unwrap();
        let error = open(&dir).unwrap_err().to_string();
        assert!(error.contains(&format!("{missing}: is missing")), "{error}");
    }
}

fn expired(key: &str) -> String {
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    params
        .self_signed(&KeyPair::from_pem(key).unwrap())
        .unwrap()
        .pem()
}

#[test]
fn a_leaf_never_outlives_its_root() {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(3600);
    let cert = params.self_signed(&key).unwrap();
    let (_dir, authority) = open_with(&cert.pem(), &key.serialize_pem()).unwrap();
    let issued = authority.issue_workload(&identity(), &csr()).unwrap();
    let leaf = CertificateDer::from(issued.chain[0].clone());
    assert_eq!(tls::not_after(&leaf), tls::not_after(cert.der()));
}

#[test]
fn extra_roots_are_trusted_and_do_not_sign() {
    let dir = TempDir::new().unwrap();
    let authority = open(&dir).unwrap();
    let extra = testdata("rsa.crt") + &testdata("ec-p384.crt") + &testdata("rsa.crt");
    std::fs::write(directory(&dir).join("bundle-extra.pem"), extra).unwrap();
    let reload = || authority.take(files::read(&directory(&dir), "cluster.local").unwrap());
    let changed = reload();
    assert_eq!(
        changed,
        Changed {
            bundle: true,
            pending: false
        }
    );
    assert_eq!(authority.bundle().len(), 3);
    verify(&authority.issue_workload(&identity(), &csr()).unwrap());
    assert_eq!(
        reload(),
        Changed {
            bundle: false,
            pending: false
        }
    );
}

#[test]
fn keys_of_all_good_kinds_are_certified_and_weak_ones_are_not() {
    let dir = TempDir::new().unwrap();
    let authority = open(&dir).unwrap();
    let request = |key: &KeyPair| CertificateParams::default().serialize_request(key).unwrap();
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
    ] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let issued = authority.issue_workload(&identity(), request(&key).der());
        assert!(issued.is_ok(), "{issued:?}");
    }
    let rsa = KeyPair::from_pem(&testdata("rsa.key")).unwrap();
    authority
        .issue_workload(&identity(), request(&rsa).der())
        .unwrap();
}
