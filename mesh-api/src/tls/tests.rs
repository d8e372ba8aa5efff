use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use time::{Duration as Days, OffsetDateTime};

use super::*;

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

fn ca(name: &str) -> Ca {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.distinguished_name.push(DnType::CommonName, name);
    let der = params.self_signed(&key).unwrap().der().clone();
    Ca {
        issuer: Issuer::new(params, key),
        der,
    }
}

fn leaf(ca: &Ca, uris: &[&str], from: i64, to: i64) -> CertificateDer<'static> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = uris
        .iter()
        .map(|u| SanType::URI((*u).try_into().unwrap()))
        .collect();
    let now = OffsetDateTime::now_utc();
    params.not_before = now + Days::hours(from);
    params.not_after = now + Days::hours(to);
    let key = KeyPair::generate().unwrap();
    params.signed_by(&key, &ca.issuer).unwrap().der().clone()
}

const WEB: &str = "spiffe://cluster.local/ns/demo/sa/web";

#[test]
fn a_server_must_prove_exactly_the_uri() {
    let (ours, other) = (ca("ours"), ca("other"));
    let store = roots([ours.der.as_ref()]).unwrap();
    let verifier = UriServerVerifier::new(store, WEB);
    let name = ServerName::try_from("x").unwrap();
    let judge = |cert: &CertificateDer<'_>| {
        verifier
            .verify_server_cert(cert, &[], &name, &[], UnixTime::now())
            .map(|_| ())
            .map_err(|e| format!("{e:?}"))
    };
    assert_eq!(judge(&leaf(&ours, &[WEB], -1, 1)), Ok(()));
    let refused = [
        (leaf(&other, &[WEB], -1, 1), "UnknownIssuer"),
        (
            leaf(&ours, &["spiffe://cluster.local/ns/demo/sa/db"], -1, 1),
            "NotValidForName",
        ),
        (
            leaf(&ours, &[WEB, "spiffe://cluster.local/ns/demo/sa/db"], -1, 1),
            "NotValidForName",
        ),
        (leaf(&ours, &[], -1, 1), "NotValidForName"),
        (leaf(&ours, &[WEB], -2, -1), "Expired"),
        (leaf(&ours, &[WEB], 1, 2), "NotValidYet"),
    ];
    for (cert, why) in refused {
        let error = judge(&cert).unwrap_err();
        assert!(error.contains(why), "{error} should say {why}");
    }
}

#[test]
fn a_client_must_be_of_the_trust_domain() {
    let ours = ca("ours");
    let verifier =
        UriClientVerifier::new(roots([ours.der.as_ref()]).unwrap(), "cluster.local", true);
    assert!(
        verifier
            .verify_client_cert(&leaf(&ours, &[WEB], -1, 1), &[], UnixTime::now())
            .is_ok()
    );
    let foreign = leaf(
        &ours,
        &["spiffe://cluster.local.evil/ns/demo/sa/web"],
        -1,
        1,
    );
    assert!(
        verifier
            .verify_client_cert(&foreign, &[], UnixTime::now())
            .is_err()
    );
}

#[test]
fn the_end_of_validity_is_told() {
    let cert = leaf(&ca("ours"), &[WEB], -1, 1);
    let end = not_after(&cert).unwrap().as_secs() as i64;
    let expected = (OffsetDateTime::now_utc() + Days::hours(1)).unix_timestamp();
    assert!((end - expected).abs() < 5, "{end} {expected}");
}
