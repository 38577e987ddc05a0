//! The Secret of the root: made once, followed while it changes, and never left for one that does
//! not fit.

use std::sync::Arc;

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde_json::{Value, json};
use testbed::{api_server::ApiServer, program::binary, wait::wait_at_most};
use tokio::runtime::Runtime;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use ztunnel::identity::{CertificateChain, Revocations};
use ztunnel_control::authority::{
    new_root,
    place::{RootError, RootPlace},
};

use crate::{
    certificates::{ask, id, with_pod},
    rig::{Control, LIMIT, kubeconfig, unique},
};

fn place() -> RootPlace {
    RootPlace {
        namespace: "adit-system".to_owned(),
        secret: unique("root"),
        config_map: unique("root-cert"),
        crl_config_map: None,
        trust_domain: "cluster.local".to_owned(),
    }
}

fn secrets(api: &ApiServer) -> Api<Secret> {
    Api::namespaced(api.client(), "adit-system")
}

fn create(api: &ApiServer, name: &str, data: &Value) {
    let secret = json!({"metadata": {"name": name}, "type": "kubernetes.io/tls", "stringData": data});
    let secret: Secret = serde_json::from_value(secret).unwrap();
    api.block_on(secrets(api).create(&PostParams::default(), &secret)).unwrap();
}

/// Changes keys of the Secret; `null` removes one.
fn change(api: &ApiServer, data: &Value) {
    let bytes = |(key, text): (&String, &Value)| {
        let bytes = text.as_str().map(|text| ByteString(text.as_bytes().to_vec()));
        (key.clone(), serde_json::to_value(bytes).unwrap())
    };
    let data: serde_json::Map<String, Value> = data.as_object().unwrap().iter().map(bytes).collect();
    let patch = Patch::Merge(json!({"data": data}));
    api.block_on(secrets(api).patch("adit-root", &PatchParams::default(), &patch)).unwrap();
}

/// Under this key of the Secret of the control plane.
fn held(api: &ApiServer, key: &str) -> String {
    let secret = api.block_on(secrets(api).get("adit-root")).unwrap();
    let bytes = secret.data.unwrap().remove(key).unwrap_or_default();
    String::from_utf8(bytes.0).unwrap()
}

/// What the ConfigMap tells tunnels to trust.
fn published(api: &ApiServer) -> String {
    let maps: Api<ConfigMap> = Api::namespaced(api.client(), "adit-system");
    api.block_on(maps.get("adit-root-cert")).unwrap().data.unwrap().remove("root-cert.pem").unwrap()
}

/// As it is written by whoever writes PEM.
fn plain(pem: &str) -> String {
    pem.replace('\r', "")
}

#[test]
#[ignore = "needs an API server: make test"]
fn of_many_at_the_same_time_one_makes_the_root() {
    let (api, runtime, place) = (ApiServer::shared(), Runtime::new().unwrap(), place());
    let client = api.client();
    let opened = runtime.block_on(futures_util::future::join_all((0..8).map(|_| place.open(&client))));
    let roots: Vec<String> =
        opened.into_iter().map(|opened| opened.unwrap().1.authority.trusted_pem()).collect();
    assert!(roots.iter().all(|root| *root == roots[0]), "{roots:#?}");
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_root_that_does_not_fit_is_refused_with_the_reason() {
    let (api, runtime) = (ApiServer::shared(), Runtime::new().unwrap());
    let (certificate, key) = new_root("cluster.local").unwrap();
    let (_, other) = new_root("cluster.local").unwrap();
    for (data, expected) in [
        (json!({"tls.crt": certificate, "tls.key": other}), "does not belong to the certificate"),
        (json!({"tls.crt": "nonsense", "tls.key": key}), "cannot be read"),
        (json!({"tls.crt": certificate, "tls.key": ""}), "tls.key"),
    ] {
        let place = place();
        create(&api, &place.secret, &data);
        let error = runtime.block_on(place.open_once(&api.client())).unwrap_err();
        assert!(matches!(error, RootError::Unusable { .. }), "{error:?}");
        let said = format!("{:#}", anyhow::Error::from(error));
        assert!(said.contains(expected) && said.contains(&place.secret), "{said}");
    }
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_secret_that_is_spoilt_or_deleted_changes_nothing() {
    let api = Arc::new(ApiServer::start());
    let control = Control::start_at(Arc::clone(&api), &[]);
    let node = unique("node");
    let (web, token) = (id(&with_pod(&control, "web", &node), "web"), control.token(&node));
    let signs = || {
        let chain = ask(&control, &token, &web, &web).unwrap();
        assert_eq!(chain.last(), Some(&control.root));
        assert!(control.get("/healthz/ready").contains("200 OK"));
    };
    let wait_usable = |usable: bool| {
        wait_at_most(LIMIT, "the metric", || {
            ((control.metric("ztunnel_control_root_usable") > 0.5) == usable).then_some(())
        });
    };
    signs();
    let (certificate, key) = (held(&api, "tls.crt"), held(&api, "tls.key"));
    let (_, other) = new_root("cluster.local").unwrap();
    for (data, said) in [
        (json!({"tls.key": other}), "does not belong to the certificate"),
        (json!({"tls.key": key, "tls.crt": "nonsense"}), "tls.crt cannot be used"),
        (json!({"tls.crt": certificate, "ca.crt": new_root("a").unwrap().0}), "is not signed by"),
        (json!({"ca.crt": null, "next.crt": "nonsense", "next.key": "nonsense"}), "next.crt cannot be used"),
    ] {
        change(&api, &data);
        wait_usable(false);
        wait_at_most(LIMIT, said, || control.log().contains(said).then_some(()));
        signs();
    }
    change(&api, &json!({"next.crt": null, "next.key": null}));
    wait_usable(true);
    signs();

    drop(api.block_on(secrets(&api).delete("adit-root", &DeleteParams::default())).unwrap());
    wait_at_most(LIMIT, "the Secret to be written again", || {
        api.block_on(secrets(&api).get_opt("adit-root")).unwrap().map(drop)
    });
    assert_eq!((held(&api, "tls.crt"), held(&api, "tls.key")), (certificate, key));
    wait_usable(true);
    signs();
    // Who starts now has the same one.
    assert_eq!(Control::start_at(Arc::clone(&api), &[]).root, control.root);
}

/// An intermediate of `root`, with its key.
fn intermediate((root, root_key): &(String, String)) -> (String, String) {
    let issuer = Issuer::from_ca_cert_pem(root, KeyPair::from_pem(root_key).unwrap()).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "mesh intermediate");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
}

/// As cert-manager writes it: the intermediate, its key, and the root in `ca.crt`.
#[test]
#[ignore = "needs an API server: make test"]
fn a_root_that_somebody_brought_may_change_while_it_is_in_use() {
    let api = Arc::new(ApiServer::start());
    let outside = new_root("outside").unwrap();
    let (certificate, key) = intermediate(&outside);
    create(&api, "adit-root", &json!({"tls.crt": certificate, "tls.key": key, "ca.crt": outside.0}));
    let mut control = Control::start_at(Arc::clone(&api), &[]);
    assert_eq!(plain(&control.root), plain(&outside.0));
    let node = unique("node");
    let (web, token) = (id(&with_pod(&control, "web", &node), "web"), control.token(&node));
    let signed = |control: &Control| ask(control, &token, &web, &web).unwrap();
    let chain = signed(&control);
    assert_eq!((chain.len(), plain(&chain[1])), (3, plain(&certificate)));

    // Renewed below the same root: nothing else is trusted.
    let (certificate, key) = intermediate(&outside);
    change(&api, &json!({"tls.crt": certificate, "tls.key": key}));
    wait_at_most(LIMIT, "the new intermediate", || {
        (plain(&signed(&control)[1]) == plain(&certificate)).then_some(())
    });
    assert_eq!(plain(&published(&api)), plain(&outside.0));

    // Another root, at once: the one before stays trusted, and every replica knows.
    let other = new_root("other").unwrap();
    change(&api, &json!({"tls.crt": other.0, "tls.key": other.1, "ca.crt": other.0}));
    let both = format!("{}{}", plain(&other.0), plain(&outside.0));
    wait_at_most(LIMIT, "both roots in the ConfigMap", || (plain(&published(&api)) == both).then_some(()));
    control.root = published(&api);
    wait_at_most(LIMIT, "both roots in answers", || {
        let chain = signed(&control);
        (chain.len() == 2 && plain(&chain[1]) == both).then_some(())
    });
    wait_at_most(LIMIT, "the root before in the Secret", || {
        (plain(&held(&api, "previous.crt")) == plain(&outside.0)).then_some(())
    });
    let second = Control::start_at(Arc::clone(&api), &[]);
    assert_eq!(plain(&second.root), both);
    assert!((second.metric("ztunnel_control_trusted_roots") - 2.0).abs() < 0.1);

    // Whoever must distrust it at once takes it out there.
    change(&api, &json!({"previous.crt": null}));
    wait_at_most(LIMIT, "one root", || (plain(&published(&api)) == plain(&other.0)).then_some(()));
    control.root = published(&api);
    wait_at_most(LIMIT, "one root in answers", || {
        (plain(&signed(&control)[1]) == plain(&other.0)).then_some(())
    });
}

/// The tunnel's own code reads the list.
#[test]
#[ignore = "needs an API server: make test"]
fn a_certificate_that_is_revoked_is_refused_and_no_other() {
    let api = Arc::new(ApiServer::start());
    let control = Control::start_at(Arc::clone(&api), &["--crl-config-map", "adit-ca-crl"]);
    let node = unique("node");
    let (web, token) = (id(&with_pod(&control, "web", &node), "web"), control.token(&node));
    let leaf = || {
        let chain = ask(&control, &token, &web, &web).unwrap();
        CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap()
    };
    let (stolen, other) = (leaf(), leaf());
    let serial = X509Certificate::from_der(&stolen).unwrap().1.raw_serial_as_string();

    let maps: Api<ConfigMap> = Api::namespaced(api.client(), "adit-system");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca-crl.pem");
    let listed = || {
        let map = api.block_on(maps.get_opt("adit-ca-crl")).unwrap();
        let lists = map.and_then(|map| map.data?.remove("ca-crl.pem"))?;
        std::fs::write(&file, lists).unwrap();
        let revocations = Revocations::open(Some(file.clone())).unwrap();
        let is_revoked = |one: &CertificateDer<'static>| {
            revocations.is_revoked(&CertificateChain::of(Some(std::slice::from_ref(one))))
        };
        Some([is_revoked(&stolen), is_revoked(&other)])
    };
    wait_at_most(LIMIT, "a list", || (listed()? == [false, false]).then_some(()));

    let kubeconfig = kubeconfig(&api);
    let revoke = |arguments: &[&str]| {
        let mut command = std::process::Command::new(binary("ztunnel-control"));
        command.arg("revoke").args(arguments).env("KUBECONFIG", &kubeconfig).output().unwrap()
    };
    assert!(revoke(&[&serial]).status.success());
    wait_at_most(LIMIT, "it to be on the list", || (listed()? == [true, false]).then_some(()));
    assert!(control.metric("ztunnel_control_revoked_certificates") > 0.5);
    let shown = revoke(&["-o", "json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["serial"], serial.replace(':', ""));
    assert_eq!(revoke(&["no serial"]).status.code(), Some(2));
}
