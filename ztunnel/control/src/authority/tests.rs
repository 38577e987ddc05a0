//! Which roots are usable, and what they sign.

use x509_parser::{extensions::GeneralName, pem::Pem};

use super::*;

fn identity() -> Identity {
    "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap()
}

fn fails(certificates: &str, key: &str, root: Option<&str>) -> AuthorityError {
    Authority::from_pem(certificates, key, root).unwrap_err()
}

/// An intermediate of `root`.
fn intermediate(root: &str, root_key: &str, is_ca: bool) -> (String, String) {
    let issuer = Issuer::from_ca_cert_pem(root, KeyPair::from_pem(root_key).unwrap()).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "intermediate");
    if is_ca {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    }
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
}

#[test]
fn a_leaf_has_the_identity_and_nothing_else() {
    let (root, root_key) = new_root("cluster.local").unwrap();
    let authority = Authority::from_pem(&root, &root_key, None).unwrap();
    let key = KeyPair::generate().unwrap();
    let chain = authority.sign(&identity(), &key, Duration::from_hours(24)).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], authority.trusted_pem());
    let leaf = Pem::iter_from_buffer(chain[0].as_bytes()).next().unwrap().unwrap();
    let leaf = leaf.parse_x509().unwrap();
    let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names[..], [GeneralName::URI("spiffe://cluster.local/ns/demo/sa/web")]);
    assert!(!leaf.is_ca() && leaf.subject.iter().next().is_none());
    let lasts = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(lasts, 24 * 3600 + 65 * 60);
    let root = Pem::iter_from_buffer(root.as_bytes()).next().unwrap().unwrap();
    leaf.verify_signature(Some(root.parse_x509().unwrap().public_key())).unwrap();
}

#[test]
fn nothing_outlives_the_root() {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - SHORT, now + SHORT);
    let key = KeyPair::generate().unwrap();
    let key_pem = key.serialize_pem();
    let root = CertifiedIssuer::self_signed(params, key).unwrap().pem();
    let mut authority = Authority::from_pem(&root, &key_pem, None).unwrap();
    let key = KeyPair::generate().unwrap();
    let chain = authority.sign(&identity(), &key, Duration::from_hours(24)).unwrap();
    let leaf = Pem::iter_from_buffer(chain[0].as_bytes()).next().unwrap().unwrap();
    let ends = leaf.parse_x509().unwrap().validity().not_after.timestamp();
    assert_eq!(ends, authority.not_after().unix_timestamp());

    authority.not_after = now - Duration::from_secs(1);
    let ended = authority.sign(&identity(), &key, SHORT).unwrap_err();
    assert!(matches!(ended, AuthorityError::Ended { .. }), "{ended}");
}

#[test]
fn an_intermediate_of_another_root_signs() {
    let (root, root_key) = new_root("cluster.local").unwrap();
    let (certificate, key) = intermediate(&root, &root_key, true);
    let by_chain = Authority::from_pem(&format!("{certificate}{root}"), &key, None).unwrap();
    let by_root = Authority::from_pem(&certificate, &key, Some(&root)).unwrap();
    for authority in [by_chain, by_root] {
        let chain = authority.sign(&identity(), &KeyPair::generate().unwrap(), SHORT).unwrap();
        assert_eq!(chain.len(), 3);
        assert_eq!(authority.trusted_pem().replace('\r', ""), root.replace('\r', ""));
        assert_eq!(authority.serve_as(&["localhost".to_owned()], SHORT).unwrap().0.len(), 2);
    }
    let (other, _) = new_root("cluster.local").unwrap();
    assert!(matches!(fails(&certificate, &key, Some(&other)), AuthorityError::OtherRoot { .. }));
    // Both are trusted, the own one first.
    let both = Authority::from_pem(&certificate, &key, Some(&format!("{other}{root}"))).unwrap();
    let roots = both.sign(&identity(), &KeyPair::generate().unwrap(), SHORT).unwrap().pop().unwrap();
    assert_eq!(roots.replace('\r', ""), format!("{root}{other}").replace('\r', ""));
    assert_eq!(both.trusted().len(), 2);
}

/// What a replica signs whose clock is an hour ahead is valid on the others.
#[test]
fn clocks_may_differ_and_no_certificate_is_older_than_its_half() {
    let (root, root_key) = new_root("cluster.local").unwrap();
    let authority = Authority::from_pem(&root, &root_key, None).unwrap();
    let validity = |pem: &str| {
        let pem = Pem::iter_from_buffer(pem.as_bytes()).next().unwrap().unwrap();
        let validity = pem.parse_x509().unwrap().validity().clone();
        [validity.not_before, validity.not_after].map(|time| time.timestamp())
    };
    let hour_ago = OffsetDateTime::now_utc().unix_timestamp() - 3600;
    assert!(validity(&root)[0] < hour_ago);
    let leaf = |life| authority.sign(&identity(), &KeyPair::generate().unwrap(), life).unwrap().remove(0);
    assert!(validity(&leaf(Duration::from_hours(24)))[0] < hour_ago);
    for life in [Duration::from_mins(1), SHORT, Duration::from_hours(24)] {
        let [from, to] = validity(&leaf(life));
        assert!(i64::midpoint(from, to) > OffsetDateTime::now_utc().unix_timestamp() + 10, "{life:?}");
    }
}

const SHORT: Duration = Duration::from_mins(10);

#[test]
fn what_does_not_fit_together_is_no_root() {
    let (root, key) = new_root("cluster.local").unwrap();
    let (_, other_key) = new_root("cluster.local").unwrap();
    assert!(matches!(fails(&root, &other_key, None), AuthorityError::Mismatch { .. }));
    let (leaf, leaf_key) = intermediate(&root, &key, false);
    assert!(matches!(fails(&leaf, &leaf_key, Some(&root)), AuthorityError::NotACa { .. }));
    for (certificate, key) in [("", &*key), ("nonsense", &*key), (&*root, ""), (&*root, "nonsense")] {
        assert!(matches!(fails(certificate, key, None), AuthorityError::Unreadable { .. }));
    }
}

#[test]
fn a_root_whose_time_is_over_is_no_root() {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (params.not_before, params.not_after) =
        (rcgen::date_time_ymd(2000, 1, 1), rcgen::date_time_ymd(2001, 1, 1));
    let key = KeyPair::generate().unwrap();
    let key_pem = key.serialize_pem();
    let old = CertifiedIssuer::self_signed(params, key).unwrap().pem();
    assert!(matches!(fails(&old, &key_pem, None), AuthorityError::NotValidNow { .. }));
}
