//! Who is let in, and how.

use super::*;

#[test]
#[ignore = "needs root: make test"]
fn peers_without_the_right_certificate_get_nowhere() {
    let (mesh, client, server, node) = served("");
    let probe = Probe::new(&mesh);
    let authority = server.at(8080).to_string();
    // Another trust domain, by the same CA.
    let refused = probe.connect(&client, "spiffe://elsewhere.local/ns/demo/sa/client", &server, &authority);
    assert!(refused.is_err(), "{refused:?}");
    node.records(1, &["tls handshake error"]);
    // Plaintext: an alert at most.
    let mut plain = client.netns.connect(server.at(15008));
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("write");
    let answer = read_all(&mut plain).unwrap_or_default();
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    node.records(2, &["tls handshake error"]);
    // Still serving.
    assert_eq!(probe.connect(&client, CLIENT, &server, &authority), Ok(StatusCode::OK));
}

/// A certificate from the mesh's CA, or one of nobody's, made by openssl: the file with key and
/// certificate.
fn foreign_certificate(mesh: &TunnelMesh, name: &str, identity: &str, by_our_ca: bool) -> std::path::PathBuf {
    let (folder, ca) = (mesh.dir.path(), mesh.ca_dir());
    let (file, ca) = (folder.join(format!("{name}.pem")), ca.join("root.pem"));
    let (folder, out, ca) = (folder.display(), file.display(), ca.display());
    let signer = if by_our_ca { format!("-CA {ca} -CAkey {ca}") } else { "-signkey $1.key".to_owned() };
    run(&format!(
        "set -- {folder}/{name}; openssl ecparam -name prime256v1 -genkey -noout -out $1.key; \
         openssl req -new -key $1.key -subj / -out $1.csr; echo subjectAltName=critical,URI:{identity} > $1.ext; \
         openssl x509 -req -in $1.csr {signer} -set_serial 7 -days 1 -extfile $1.ext -out $1.crt; \
         cat $1.key $1.crt > {out}"
    ));
    file
}

/// What openssl's client gets on 15008 with these options: the head of the first HTTP/2 frame, or
/// what it says.
fn s_client(client: &MeshPod, server: &MeshPod, options: &[&str]) -> Result<[u8; 9], String> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut child = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", client.netns))
        .args(["openssl", "s_client", "-quiet", "-connect", &server.at(15008).to_string()])
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl");
    let mut input = child.stdin.take().expect("piped");
    // Who is refused is gone before.
    let _ = input.write_all(PREFACE);
    let mut head = [0; 9];
    let got = child.stdout.take().expect("piped").read_exact(&mut head);
    let _ = child.kill();
    let said = child.wait_with_output().expect("openssl").stderr;
    got.map(|()| head).map_err(|_| String::from_utf8_lossy(&said).into_owned())
}

#[test]
#[ignore = "needs root: make test"]
fn foreign_tls_clients_are_answered_by_what_they_offer() {
    const SETTINGS: u8 = 4;
    let (mesh, client, server, node) = served("");
    let ours = foreign_certificate(&mesh, "ours", CLIENT, true);
    let elsewhere =
        foreign_certificate(&mesh, "elsewhere", "spiffe://elsewhere.local/ns/demo/sa/client", true);
    let nobody = foreign_certificate(&mesh, "nobody", CLIENT, false);
    let with = |certificate: &std::path::Path, more: &[&str]| {
        let mut options = vec!["-cert", certificate.to_str().expect("path")];
        options.extend(more);
        s_client(&client, &server, &options)
    };
    for alpn in [&[][..], &["-alpn", "h2"]] {
        let head = with(&ours, alpn).unwrap_or_else(|said| panic!("{alpn:?}: {said}"));
        assert_eq!(head[3], SETTINGS, "{alpn:?}");
    }
    for (refused, why) in [
        (with(&ours, &["-alpn", "http/1.1"]), "no application protocol"),
        (with(&ours, &["-tls1_2"]), "protocol version"),
        (s_client(&client, &server, &["-alpn", "h2"]), "certificate required"),
        (with(&elsewhere, &["-alpn", "h2"]), "alert"),
        (with(&nobody, &["-alpn", "h2"]), "alert"),
    ] {
        let said = refused.expect_err(why);
        assert!(said.contains(why), "{why}: {said}");
    }
    assert_eq!(node.records(5, &["tls handshake error", "\"reason\":\"tls\""]).len(), 5);
}

/// What openssl's client gets from a tunnel with this variable, by these options.
fn foreign_client(variable: (&str, &str), options: &[&str]) -> Result<[u8; 9], String> {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.plain("a", "client"), mesh.enrolled("a", "server"));
    let mut node = TunnelNode::start_with(&mesh, "a", mesh.netns("a"), &[variable]);
    assert_eq!((node.agent().add(&server), node.agent().snapshot()), (String::new(), String::new()));
    node.wait_ready();
    let certificate = foreign_certificate(&mesh, "ours", CLIENT, true).display().to_string();
    let options: Vec<&str> = ["-cert", &certificate, "-alpn", "h2"].iter().chain(options).copied().collect();
    s_client(&client, &server, &options)
}

#[test]
#[ignore = "needs root: make test"]
fn tls_1_2_is_spoken_where_it_is_asked_for() {
    let asked = ("TLS12_ENABLED", "true");
    for version in ["-tls1_2", "-tls1_3"] {
        foreign_client(asked, &[version]).unwrap_or_else(|said| panic!("{version}: {said}"));
    }
    let said = foreign_client(asked, &["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"]).unwrap_err();
    assert!(said.contains("handshake failure"), "{said}");
}

/// This openssl knows nothing that holds against a quantum computer; our tunnels prefer it anyway.
#[test]
#[ignore = "needs root: make test"]
fn only_post_quantum_key_exchange_where_that_is_asked_for() {
    let said = foreign_client(("COMPLIANCE_POLICY", "pqc"), &["-groups", "X25519:P-256"]).unwrap_err();
    assert!(said.contains("handshake failure"), "{said}");
    let (_mesh, client, server, _nodes) = pooled(&[("COMPLIANCE_POLICY", "pqc")]);
    drop(greeted(&client, &server));
}

#[test]
#[ignore = "needs root: make test"]
fn an_application_whose_node_is_of_another_trust_domain_sees_a_reset() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    mesh.add_to_last_workload("  trustDomain: cluster.local\n");
    server.serve_double_echo(8080);
    let mut a = TunnelNode::start_with(&mesh, "a", mesh.netns("a"), &[("TRUST_DOMAIN", "elsewhere.local")]);
    assert_eq!((a.agent().add(&client), a.agent().snapshot()), (String::new(), String::new()));
    a.wait_ready();
    let b = mesh.node("b", &[&server]);
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    b.records(1, &["tls handshake error", "elsewhere.local"]);
}

#[test]
#[ignore = "needs root: make test"]
fn server_that_is_somebody_else_is_refused_and_named() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    mesh.add_to_last_workload(
        "- uid: Kubernetes//Pod/demo/impostor\n  name: impostor\n  namespace: demo\n  serviceAccount: impostor\n  \
         workloadIps: [10.99.0.1]\n  node: b\n  clusterId: Kubernetes\n",
    );
    let a = mesh.node("a", &[&client]);
    // The node of the server serves it under another name, so with another certificate.
    let mut b = mesh.node_without_pods("b");
    assert_eq!(b.agent().add_as("server", "impostor", &[server.netns.open()]), "");
    assert_eq!(b.agent().snapshot(), "");
    b.wait_ready();
    assert_eq!(client.netns.refusal(server.at(8080)), ErrorKind::ConnectionReset);
    a.records(
        1,
        &[
            "spiffe://cluster.local/ns/demo/sa/impostor",
            "spiffe://cluster.local/ns/demo/sa/server",
            "tls handshake",
        ],
    );
}
