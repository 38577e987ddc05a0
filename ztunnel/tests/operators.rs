//! What operators see of a running tunnel: status, dump, page, profiles, and the commands of the
//! program.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    process::{Command, Output},
};

use testbed::{
    command::run,
    mesh_pod::read_line,
    program::binary,
    tunnel_mesh::{TunnelMesh, TunnelNode, local},
    wait::wait_for,
};
/// `ztunnel arguments` beside the tunnel.
fn ztunnel(tunnel: &TunnelNode, arguments: &[&str]) -> Output {
    Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", tunnel.netns))
        .arg(binary("ztunnel"))
        .args(arguments)
        .env_clear()
        .output()
        .expect("ztunnel")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn status(tunnel: &TunnelNode) -> serde_json::Value {
    let output = ztunnel(tunnel, &["status", "-o", "json"]);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)))
}

fn body(tunnel: &TunnelNode, to: SocketAddr, method: &str, path: &str) -> (String, String) {
    let answer = tunnel.netns.http(method, to, path).expect("answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("HTTP");
    (head.to_owned(), body.to_owned())
}

#[test]
#[ignore = "needs root: make test"]
fn open_connection_is_shown_and_counted_while_it_lives() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
    mesh.publish();
    server.serve_double_echo(8080);
    let (a, _b) = (mesh.node("a", &[&client]), mesh.node("b", &[&server]));
    let mut stream = client.netns.connect(server.at(8080));
    read_line(&mut stream).expect("the greeting");
    stream.write_all(b"hello world").expect("write");
    stream.read_exact(&mut [0; 22]).expect("both echoes");

    let shown = wait_for("the connection in the status", || {
        let status = status(&a);
        let found = status["connections"].as_array()?.iter().find(|one| one["bytesSent"] == 11)?.clone();
        Some(found)
    });
    assert_eq!(shown["protocol"], "HBONE");
    assert_eq!(shown["originalDst"], server.at(8080).to_string());
    assert_eq!(shown["peer"], "demo/server");
    assert_eq!(shown["peerIdentity"], "spiffe://cluster.local/ns/demo/sa/server");
    let labels = ["reporter=\"source\"", "destination_workload=\"server\""];
    a.wait_metric("istio_tcp_received_bytes_total", &labels, 11);
    let status = status(&a);
    assert_eq!(status["tunnels"], 1);
    assert_eq!(status["streams"], 1);
    let pod = &status["pods"][0];
    assert_eq!((&pod["name"], &pod["outbound"], &pod["state"]), (&"client".into(), &1.into(), &"Up".into()));
    let dump: serde_json::Value =
        serde_json::from_str(&body(&a, local(15000), "GET", "/config_dump").1).expect("JSON");
    let open = &dump["workloadState"]["client"]["connections"]["outbound"][0];
    assert_eq!(open["actualDst"], server.at(15008).to_string());

    drop(stream);
    wait_for("the connection to go", || self::status(&a)["connectionsOpen"] == 0);
    for name in ["ztunnel_connect_duration_seconds_count", "ztunnel_tls_handshake_duration_seconds_count"] {
        a.wait_metric(name, &["direction=\"outbound\""], 1);
    }
    let expiry = a.metric("ztunnel_certificate_expiration_timestamp_seconds", &["sa/client"]);
    assert!(expiry.is_some_and(|at| at > 1_600_000_000), "{expiry:?}");
}

#[test]
#[ignore = "needs root: make test"]
fn failure_has_one_reason_in_log_metric_and_status() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("a", "server"));
    mesh.publish();
    let a = mesh.node("a", &[&client, &server]);
    client.netns.refusal(server.at(8080)); // nobody listens there
    let record = &a.records(1, &["outbound", "\"reason\""])[0];
    let reason = record["reason"].as_str().expect("a reason").to_owned();
    let labels = [format!("reason=\"{reason}\""), "direction=\"outbound\"".to_owned()];
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    a.wait_metric("ztunnel_connection_failures_total", &labels, 1);
    let human = text(&ztunnel(&a, &["status"]).stdout);
    let line = human.lines().find(|line| line.contains("outbound") && line.contains(&reason));
    assert!(line.is_some(), "{reason} in {human}");
}

#[test]
#[ignore = "needs root: make test"]
fn status_says_what_is_pending_by_text_and_exit_code() {
    let mesh = TunnelMesh::new();
    let mut a = mesh.node_without_pods("a");
    let output =
        wait_for("an answer", || Some(ztunnel(&a, &["status"])).filter(|o| o.status.code() != Some(1)));
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stdout).contains("not ready, pending: workload proxy manager"), "{output:?}");
    assert_eq!(a.agent().snapshot(), "");
    a.wait_ready();
    assert_eq!(ztunnel(&a, &["status"]).status.code(), Some(0));
    let nobody = ztunnel(&a, &["status", "--admin", "127.0.0.1:1"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(text(&nobody.stderr).contains("cannot query the tunnel at 127.0.0.1:1"), "{nobody:?}");
}

#[test]
#[ignore = "needs root: make test"]
fn profiles_of_processor_and_memory_are_taken_from_the_running_tunnel() {
    let mut mesh = TunnelMesh::new();
    let (client, server) = (mesh.enrolled("a", "client"), mesh.plain("b", "server"));
    mesh.publish();
    server.serve(8080, |mut stream, _| while stream.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {});
    let a = mesh.node("a", &[&client]);
    let file = mesh.dir.path().join("profile.gz");
    let profile = |path: &str| {
        a.netns.run(&format!("curl -sf -o {} \"http://127.0.0.1:15000{path}\"", file.display()));
        assert_eq!(std::fs::read(&file).expect("profile")[..2], [0x1f, 0x8b], "gzip");
    };
    // While it carries something, so that there is something to see.
    let mut stream = client.netns.connect(server.at(8080));
    let mut load = stream.try_clone().expect("clone");
    let sender = std::thread::spawn(move || while load.write_all(&[0; 4096]).is_ok() {});
    profile("/debug/pprof/profile?seconds=2&frequency=1000");
    let _ = stream.flush().and_then(|()| stream.shutdown(std::net::Shutdown::Both));
    sender.join().expect("sender");
    run(&format!("zcat {} | grep -aqE 'ztunnel::|tokio::'", file.display())); // functions have their names
    let (head, why) = body(&a, local(15000), "GET", "/debug/pprof/heap");
    assert!(head.contains("409") && why.contains("activate=true"), "{head} {why}");
    let activate = "/debug/pprof/heap/profiling?activate=true";
    assert_eq!(body(&a, local(15000), "POST", activate).1, "heap profiling is active\n");
    profile("/debug/pprof/heap");
    let deactivate = "/debug/pprof/heap/profiling?activate=false";
    assert_eq!(body(&a, local(15000), "POST", deactivate).1, "heap profiling is inactive\n");
}

#[test]
fn configuration_is_checked_and_printed_without_running() {
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), "pool: {idle: 7s}\nnode: {name: n1}\nca: {token: s3cret}\n").expect("write");
    let path = file.path().to_str().expect("path");
    let ztunnel = |arguments: &[&str]| {
        let mut command = Command::new(binary("ztunnel"));
        command.env_clear().env("NODE_NAME", "n2").args(arguments).output().expect("ztunnel")
    };
    let good = ztunnel(&["config", "check", path]);
    assert!(good.status.success(), "{good:?}");
    assert!(text(&good.stdout).contains("2 keys from"), "{good:?}");
    let printed = ztunnel(&["--config", path, "config", "print", "-o", "json"]);
    assert!(!text(&printed.stdout).contains("s3cret"));
    let keys: Vec<serde_json::Value> = serde_json::from_slice(&printed.stdout).expect("JSON");
    let key = |name: &str| keys.iter().find(|key| key["key"] == name).expect("key");
    assert_eq!(
        (&key("node.name")["value"], &key("node.name")["origin"]),
        (&"n2".into(), &"environment".into())
    );
    assert_eq!((&key("pool.idle")["value"], &key("pool.idle")["origin"]), (&"7s".into(), &"file".into()));
    // What is printed as YAML is a configuration with the same effect.
    let yaml = ztunnel(&["--config", path, "config", "print", "-o", "yaml"]);
    std::fs::write(file.path(), &yaml.stdout).expect("write");
    let again = ztunnel(&["config", "check", path]);
    assert!(again.status.success(), "{again:?}\n{}", text(&yaml.stdout));
    std::fs::write(file.path(), "pool: {ilde: 7s}\n").expect("write");
    let bad = ztunnel(&["config", "check", path]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(text(&bad.stderr).contains("unknown key pool.ilde, did you mean pool.idle?"), "{bad:?}");
}

#[test]
#[ignore = "needs root: make test"]
fn own_metrics_are_read_over_hbone_by_a_captured_prometheus() {
    let mut mesh = TunnelMesh::new();
    let prometheus = mesh.enrolled("b", "prometheus");
    let own = mesh.own("a", "ztunnel-a");
    let (metrics, admin, hbone) = (own.at(15020), own.at(15000), own.at(15008));
    let secret = own.at(9000);
    own.serve(9000, |mut stream, _| drop(stream.write_all(b"what else the node offers")));
    let itself = [("POD_NAME", "ztunnel-a"), ("POD_NAMESPACE", "demo"), ("SERVICE_ACCOUNT", "ztunnel-a")];
    let mut a = TunnelNode::start_with(&mesh, "a", own.netns, &itself);
    assert_eq!(a.agent().snapshot(), "", "a snapshot without pods does not end it");
    a.wait_ready();
    let b = mesh.node("b", &[&prometheus]);

    let answer = prometheus.netns.http("GET", metrics, "/metrics").expect("metrics");
    assert!(
        answer.starts_with("HTTP/1.0 200") && answer.contains("istio_build{component=\"ztunnel\""),
        "{answer}"
    );
    let record = &a.records(1, &["inbound"])[0];
    assert_eq!(record["dst.identity"], "spiffe://cluster.local/ns/demo/sa/ztunnel-a");
    assert_eq!(record["src.identity"], "spiffe://cluster.local/ns/demo/sa/prometheus");
    assert_eq!(record["dst.hbone_addr"], metrics.to_string());
    let record = &b.records(1, &["outbound"])[0];
    assert_eq!(record["dst.addr"], hbone.to_string(), "over HBONE");

    for other in [admin, secret, hbone] {
        prometheus.netns.refusal(other);
    }
}
