//! A foreign implementation at the other end: Envoy as waypoint, as the gateway of another network,
//! and as HBONE client.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Stdio,
};

use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use testbed::{
    mesh_pod::{MeshPod, read_line},
    process::KillOnDrop,
    program::cache,
    tunnel_mesh::TunnelMesh,
    wait::wait_for,
};

fn identity(name: &str) -> String {
    format!("spiffe://cluster.local/ns/demo/sa/{name}")
}

/// Where `.ci/setup/envoy` puts it.
fn envoy() -> PathBuf {
    let binary = cache().join("envoy/envoy");
    assert!(binary.exists(), "no Envoy at {}: run make setup", binary.display());
    binary
}

/// Envoy in the netns of a pod, with a certificate of the pod's service account from the mesh's CA.
struct Envoy {
    child: KillOnDrop,
    log: PathBuf,
}

impl Envoy {
    /// `config` may name `CERT`, `KEY` and `ROOT`. Returns once `port` is listened on.
    fn start(mesh: &TunnelMesh, pod: &MeshPod, config: &str, port: u16) -> Self {
        let path = |end: &str| mesh.dir.path().join(format!("{}-envoy.{end}", pod.name));
        let (cert, key) = issue(mesh, &pod.name);
        fs::write(path("cert"), cert).expect("write");
        fs::write(path("key"), key).expect("write");
        let text = |path: PathBuf| path.display().to_string();
        let config = config
            .replace("CERT", &text(path("cert")))
            .replace("KEY", &text(path("key")))
            .replace("ROOT", &text(mesh.ca_dir().join("root-cert.pem")));
        fs::write(path("yaml"), config).expect("write");
        let log = File::create(path("log")).expect("log");
        let mut command = pod.netns.command(envoy().to_str().expect("UTF-8 path"));
        command
            .args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning", "-c"])
            .arg(path("yaml"))
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("log"))
            .stdout(log);
        let child = KillOnDrop(command.spawn().expect("Envoy starts"));
        let mut envoy = Self { child, log: path("log") };
        wait_for("Envoy to listen", || {
            assert!(envoy.child.0.try_wait().expect("wait").is_none(), "Envoy ended:\n{}", envoy.log());
            let listening = pod.netns.output("ss", &["-Hltn", &format!("sport = :{port}")]);
            (!listening.is_empty()).then_some(())
        });
        envoy
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("log")
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of Envoy\n{}", self.log());
        }
    }
}

/// Certificate and key, PEM.
fn issue(mesh: &TunnelMesh, name: &str) -> (String, String) {
    let root = fs::read_to_string(mesh.ca_dir().join("root.pem")).expect("the mesh's CA");
    let ca_key = KeyPair::from_pem(&root).expect("key");
    let ca = CertificateDer::from_pem_slice(root.as_bytes()).expect("certificate");
    let issuer = Issuer::from_ca_cert_der(&ca, ca_key).expect("issuer");
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity(name).try_into().expect("ASCII"))];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().expect("key");
    (params.signed_by(&key, &issuer).expect("signed").pem(), key.serialize_pem())
}

/// What both directions say of TLS: as Istio configures it.
fn tls(context: &str, peer: &str) -> String {
    format!(
        r#"{{name: tls, typed_config: {{
      "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{context},
      {require} common_tls_context: {{
        alpn_protocols: [h2], tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}},
        tls_certificates: [{{certificate_chain: {{filename: CERT}}, private_key: {{filename: KEY}}}}],
        validation_context: {{trusted_ca: {{filename: ROOT}},
          match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: "{peer}"}}}}]}}}}}}}}"#,
        require = if context.starts_with("Downstream") { "require_client_certificate: true," } else { "" },
    )
}

fn cluster(to: SocketAddr, more: &str) -> String {
    format!(
        "  clusters:\n  - name: next\n    type: STATIC\n    connect_timeout: 10s\n{more}    load_assignment: \
         {{cluster_name: next, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: \
         {{address: {}, port_value: {}}}}}}}}}]}}]}}\n",
        to.ip(),
        to.port()
    )
}

/// Takes HBONE of `client` on 15008 and forwards what is inside to `to`.
fn terminating(client: &str, to: SocketAddr) -> String {
    format!(
        r#"static_resources:
  listeners:
  - name: hbone
    address: {{socket_address: {{address: 0.0.0.0, port_value: 15008}}}}
    filter_chains:
    - transport_socket: {tls}
      filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: hbone
          http2_protocol_options: {{allow_connect: true}}
          upgrade_configs: [{{upgrade_type: CONNECT}}]
          access_log:
          - name: stdout
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog
              log_format: {{text_format_source: {{inline_string: "asked %REQ(:METHOD)% %REQ(:AUTHORITY)% %RESPONSE_CODE% %DOWNSTREAM_PEER_URI_SAN% baggage=%REQ(BAGGAGE)% forwarded=%REQ(FORWARDED)%\n"}}}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{connect_matcher: {{}}}}
                route: {{cluster: next, timeout: 0s, upgrade_configs: [{{upgrade_type: CONNECT, connect_config: {{}}}}]}}
          http_filters:
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
{cluster}"#,
        tls = tls("DownstreamTlsContext", &identity(client)),
        cluster = cluster(to, ""),
    )
}

/// Takes TCP on 127.0.0.1:10000 and sends it by HBONE to `to`, asking for `authority`.
fn tunnelling(server: &str, to: SocketAddr, authority: &str) -> String {
    let more = format!(
        "    transport_socket: {}\n    typed_extension_protocol_options:\n      \
         envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
         \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
         explicit_http_config: {{http2_protocol_options: {{}}}}\n",
        tls("UpstreamTlsContext", &identity(server))
    );
    format!(
        r#"static_resources:
  listeners:
  - name: tcp
    address: {{socket_address: {{address: 127.0.0.1, port_value: 10000}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tcp
          cluster: next
          tunneling_config: {{hostname: "{authority}"}}
{}"#,
        cluster(to, &more)
    )
}

/// 100 KB there and the double back, then a clean end.
fn exchange(client: &MeshPod, to: SocketAddr) -> String {
    let mut stream = client.netns.connect(to);
    let seen = read_line(&mut stream).expect("greeting");
    let sent = vec![7; 100_000];
    let mut writing = stream.try_clone().expect("dup");
    let writer = std::thread::spawn(move || {
        writing.write_all(&sent).expect("write");
        writing.shutdown(std::net::Shutdown::Write).expect("shutdown");
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).expect("a clean end");
    writer.join().expect("all sent");
    assert!(received.len() == 200_000 && received.iter().all(|&byte| byte == 7), "{}", received.len());
    seen
}

const WEB: &str = "- name: web\n  namespace: demo\n  hostname: web.demo.svc.cluster.local\n  \
                   vips: [\"/10.96.0.1\"]\n  ports: {80: 8080}\n";

fn vip() -> SocketAddr {
    (Ipv4Addr::new(10, 96, 0, 1), 80).into()
}

#[test]
#[ignore = "needs root: make test"]
fn envoy_is_a_waypoint() {
    let mut mesh = TunnelMesh::new();
    let (client, waypoint) = (mesh.enrolled("a", "client"), mesh.plain("b", "waypoint"));
    let server = mesh.plain("b", "server");
    mesh.services = format!("{WEB}  waypoint: {{destination: /{}}}\n", waypoint.ip);
    mesh.publish();
    server.serve_double_echo(8080);
    let a = mesh.node("a", &[&client]);
    let envoy = Envoy::start(&mesh, &waypoint, &terminating("client", server.at(8080)), 15008);
    assert_eq!(exchange(&client, vip()), waypoint.ip.to_string());
    let asked = wait_for("Envoy's access log", || {
        envoy.log().lines().find(|line| line.starts_with("asked")).map(str::to_owned)
    });
    let wanted = format!("asked CONNECT 10.96.0.1:80 200 {}", identity("client"));
    assert!(asked.starts_with(&wanted), "{asked}");
    assert!(asked.contains("k8s.namespace.name=demo,k8s.deployment.name=client"), "{asked}");
    assert!(asked.contains("host=web.demo.svc.cluster.local"), "{asked}");
    let record = &a.records(1, &["\"direction\":\"outbound\""])[0];
    assert_eq!(record["dst.identity"], identity("waypoint"), "{record}");
    assert!(record.get("error").is_none_or(serde_json::Value::is_null), "{record}");
}

#[test]
#[ignore = "needs root: make test"]
fn envoy_is_the_gateway_of_another_network() {
    let mut mesh = TunnelMesh::new();
    let (client, gateway) = (mesh.enrolled("a", "client"), mesh.plain("b", "gateway"));
    // Known as a service, whose port for HBONE leads to itself.
    mesh.add_to_last_workload("  network: east\n  services:\n    demo/gateway.demo.svc.cluster.local: {}\n");
    let server = mesh.enrolled("c", "server");
    mesh.add_to_last_workload(
        "  network: east\n  networkGateway: {destination: demo/gateway.demo.svc.cluster.local}\n  \
         services:\n    demo/web.demo.svc.cluster.local: {}\n",
    );
    mesh.services = format!(
        "{WEB}- name: gateway\n  namespace: demo\n  hostname: gateway.demo.svc.cluster.local\n  \
         vips: [\"/10.96.0.2\"]\n  ports: {{15008: 15008}}\n"
    );
    mesh.publish();
    server.serve_double_echo(8080);
    let (a, c) = (mesh.node("a", &[&client]), mesh.node("c", &[&server]));
    let envoy = Envoy::start(&mesh, &gateway, &terminating("client", server.at(15008)), 15008);
    exchange(&client, vip());
    let asked = wait_for("Envoy's access log", || {
        envoy.log().lines().find(|line| line.starts_with("asked")).map(str::to_owned)
    });
    assert!(asked.starts_with("asked CONNECT web.demo.svc.cluster.local:80 200"), "{asked}");
    let record = &a.records(1, &["\"direction\":\"outbound\""])[0];
    assert_eq!(record["dst.workload"], "server", "{record}");
    assert_eq!(record["dst.identity"], identity("server"), "{record}");
    let record = &c.records(1, &["\"direction\":\"inbound\""])[0];
    assert_eq!(record["src.identity"], identity("client"), "{record}");
}

#[test]
#[ignore = "needs root: make test"]
fn envoy_is_a_client_and_policy_knows_it_by_its_certificate() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.plain("a", "client"), mesh.enrolled("b", "server"));
    server.serve_double_echo(8080);
    let b = mesh.node("b", &[&server]);
    let config = tunnelling("server", server.at(15008), &server.at(8080).to_string());
    let _envoy = Envoy::start(&mesh, &client, &config, 10000);
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, 10000));
    assert_eq!(exchange(&client, to), client.ip.to_string(), "the application sees the client's address");
    let record = &b.records(1, &["\"direction\":\"inbound\"", "connection complete"])[0];
    assert_eq!(record["src.identity"], identity("client"), "{record}");
    assert_eq!(record["bytes_sent"], 100_000, "{record}");
    // And is refused by it.
    mesh.policies.push_str(
        "- name: deny\n  namespace: demo\n  scope: Namespace\n  action: Deny\n  \
         rules: [[[{principals: [cluster.local/ns/demo/sa/client]}]]]\n",
    );
    mesh.publish();
    wait_for("the policy to hold", || {
        let read = client.netns.try_connect(to).and_then(|mut stream| read_line(&mut stream));
        read.is_err().then_some(())
    });
    // The one that showed it may have been open for a moment, and was cut.
    let _ = client.netns.try_connect(to).and_then(|mut stream| read_line(&mut stream));
    b.records(1, &["explicitly denied by: demo/deny"]);
}
