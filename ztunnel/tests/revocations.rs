//! Certificates on a revocation list: refused, and cut where they are connected, in both
//! directions.

use std::{
    fs,
    io::{ErrorKind, Read},
    path::PathBuf,
};

use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use testbed::{
    mesh_pod::{MeshPod, read_line},
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::wait_for,
};
use time::{Duration, OffsetDateTime};

/// Revocation lists of the mesh's root.
struct Lists {
    path: PathBuf,
    root: PathBuf,
    number: u64,
}

impl Lists {
    fn new(mesh: &TunnelMesh) -> Self {
        Self { path: mesh.dir.path().join("crl.pem"), root: mesh.ca_dir().join("root.pem"), number: 0 }
    }

    /// The file holds a list of these serial numbers from now on.
    fn publish(&mut self, serials: &[String]) {
        let pem = fs::read_to_string(&self.root).expect("root");
        let root = CertificateDer::from_pem_slice(pem.as_bytes()).expect("certificate");
        let issuer = Issuer::from_ca_cert_der(&root, KeyPair::from_pem(&pem).expect("key")).expect("issuer");
        self.number += 1;
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &String| RevokedCertParams {
            serial_number: SerialNumber::from(bytes(serial)),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Duration::days(1),
            crl_number: SerialNumber::from(self.number),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        self.write(&list.signed_by(&issuer).expect("a list").pem().expect("PEM"));
    }

    fn write(&self, content: &str) {
        let next = self.path.with_extension("next");
        fs::write(&next, content).expect("write");
        fs::rename(&next, &self.path).expect("rename");
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect()
}

/// The serial number of the certificate that `node` holds for `pod`, in hexadecimal.
fn serial(node: &TunnelNode, pod: &MeshPod) -> String {
    let answer = node.netns.http("GET", ([127, 0, 0, 1], 15000), "/config_dump").expect("dump");
    let dump: serde_json::Value =
        serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("JSON");
    let identity = format!("spiffe://cluster.local/ns/demo/sa/{}", pod.name);
    let certificates = dump["certificates"].as_array().expect("certificates");
    let held = certificates.iter().find(|held| held["identity"] == identity.as_str()).expect("held");
    let decimal = held["certChain"][0]["serialNumber"].as_str().expect("a number");
    let hex = format!("{:x}", decimal.parse::<u128>().expect("16 bytes"));
    format!("{:0>1$}", hex, hex.len().next_multiple_of(2))
}

/// Certificates that are revoked while their pods are connected through one tunnel, which knows the lists.
fn revoked_on_one_node(whom: &str, direction: &str, reporter: &str) {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    server.serve_double_echo(8080);
    let mut lists = Lists::new(&mesh);
    let path = lists.path.display().to_string();
    let node = mesh.node_with("a", &[&client, &server], &[("CRL_PATH", &path)]);
    let mut open = client.netns.connect(server.at(8080));
    read_line(&mut open).expect("greeting");
    let whom = serial(&node, if whom == "client" { &client } else { &server });
    lists.publish(&[whom]);
    assert_eq!(open.read_exact(&mut [0]).expect_err("cut").kind(), ErrorKind::ConnectionReset);
    node.records(1, &[&format!("\"direction\":\"{direction}\""), "\"reason\":\"revoked\"", "revoked"]);
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    let reporter = format!("reporter=\"{reporter}\"");
    let rejected = || node.metric("istio_crl_policy_rejections_total", &[&reporter]);
    wait_for("both rejections to be counted", || rejected().is_some_and(|count| count >= 2));
    lists.publish(&[]);
    wait_for("the empty list to hold", || {
        let mut stream = client.netns.try_connect(server.at(8080)).ok()?;
        read_line(&mut stream).ok()
    });
}

/// A client on node a and a server on node b, of whom the one in `with_lists` knows the lists.
fn connected(with_lists: &str) -> (TunnelMesh, Lists, MeshPod, MeshPod, [TunnelNode; 2]) {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let lists = Lists::new(&mesh);
    let path = lists.path.display().to_string();
    let start = |name: &str, pod: &MeshPod| {
        let variables = [("CRL_PATH", path.as_str())];
        let known: &[_] = if name == with_lists { &variables } else { &[] };
        let mut node = TunnelNode::start_with(&mesh, name, mesh.netns(name), known);
        assert_eq!((node.agent().add(pod), node.agent().snapshot()), (String::new(), String::new()));
        node.wait_ready();
        node
    };
    let nodes = [start("a", &client), start("b", &server)];
    (mesh, lists, client, server, nodes)
}

/// Revokes `whom` while it is connected, and takes that back.
fn revoked_and_forgiven(with_lists: &str, direction: &str, reporter: &str) {
    let (_mesh, mut lists, client, server, [a, b]) = connected(with_lists);
    let mut open = client.netns.connect(server.at(8080));
    read_line(&mut open).expect("greeting");
    let (whom, knows) = if with_lists == "b" { (serial(&a, &client), &b) } else { (serial(&b, &server), &a) };

    lists.publish(&["01".to_owned(), whom.clone()]);
    let error = open.read_exact(&mut [0]).expect_err("cut");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let direction = format!("\"direction\":\"{direction}\"");
    knows.records(1, &[&direction, "\"reason\":\"revoked\"", "revoked\""]);
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    knows.records(2, &["\"reason\":\"revoked\""]);
    let flagged = |line: &str| {
        line.starts_with("istio_tcp_connections_failed_total")
            && line.contains("response_flags=\"CERT_REVOKED\"")
            && line.contains(&format!("reporter=\"{reporter}\""))
    };
    wait_for("the flag to be counted", || knows.metrics().lines().any(flagged));
    let reporter = format!("reporter=\"{reporter}\"");
    let rejected = || knows.metric("istio_crl_policy_rejections_total", &[&reporter]);
    wait_for("the rejection to be counted", || rejected().is_some_and(|count| count > 0));

    // A bad file changes nothing, an empty list forgives.
    lists.write("-----BEGIN X509 CRL-----\nbm9uc2Vuc2U=\n-----END X509 CRL-----\n");
    wait_for("the bad file to be refused", || knows.log().contains("invalid revocation lists").then_some(()));
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    lists.publish(&[]);
    wait_for("the empty list to hold", || {
        let mut stream = client.netns.try_connect(server.at(8080)).ok()?;
        read_line(&mut stream).ok()
    });
}

#[test]
#[ignore = "needs root: make test"]
fn a_revoked_client_is_refused_and_cut() {
    revoked_and_forgiven("b", "inbound", "destination");
}

#[test]
#[ignore = "needs root: make test"]
fn pods_of_one_node_whose_certificates_are_revoked_are_refused_and_cut() {
    revoked_on_one_node("client", "inbound", "destination");
    revoked_on_one_node("server", "outbound", "source");
}

#[test]
#[ignore = "needs root: make test"]
fn a_revoked_server_is_refused_and_cut() {
    revoked_and_forgiven("a", "outbound", "source");
}
