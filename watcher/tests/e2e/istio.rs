//! In a cluster with Istio's real control plane.

use testbed::{capture::Capture, real_cluster::Pod};

use crate::{
    first, istioctl, policies,
    rig::{DEMO, ISTIO, PodSpec, Rig, SERVER},
    traffic::{self, Load},
};

#[test]
#[ignore = "starts a cluster, needs root: make e2e"]
fn istios_control_plane_feeds_the_mesh() {
    let rig = Rig::start_with_istio();
    let [server, client, other, stranger] = rig.demo_and_a_stranger();
    rig.install(&["--set", "profile=istio"]);
    rig.label(DEMO, "ambient");
    for pod in [&server, &client, &other] {
        rig.wait_enrolled(pod, true);
    }
    let by_address = format!("http://{}:8080/", server.ip);
    let wire = Capture::start(&rig.cluster.netns);
    for url in [by_address.as_str(), SERVER] {
        let body = rig.wait_get(&client, url, true);
        assert!(body.contains(&format!("hello from server, client {}", client.ip)), "{body}");
    }
    traffic::assert_only_hbone(&wire, &client, &server);
    for (node, direction) in [("node1", "outbound"), ("node2", "inbound")] {
        rig.wait_record(node, &[direction, "/ns/demo/sa/client", "/ns/demo/sa/server"]);
    }

    assert!(rig.wait_get(&stranger, &by_address, true).contains(&stranger.ip));
    rig.cluster.apply(policies::STRICT);
    rig.wait_get(&stranger, &by_address, false);
    rig.wait_get(&client, &by_address, true);
    rig.wait_get(&other, &by_address, true);

    new_pods_are_answered_at_once(&rig, &stranger);

    rig.cluster.apply(policies::CLIENT_ONLY);
    rig.wait_get(&other, &by_address, false);
    rig.wait_get(&client, SERVER, true);

    let load = Load::start(&rig, 1);
    istioctl::assert_reads_tunnels(&rig, &server);
    istiod_is_away(&rig, &load);
    load.end(&rig);

    services_of_istios_kinds_are_reached(&rig, &client, &stranger, &server);
    strict_ports_are_strict_and_others_are_not(&rig, &client, &stranger, &server);

    rig.uninstall();
    assert!(rig.wait_get(&stranger, &by_address, true).contains(&stranger.ip));
    rig.assert_nothing_left(&[&server, &client, &other]);
}

/// Beside pods without a mesh, as the machine may be slow.
fn new_pods_are_answered_at_once(rig: &Rig, stranger: &Pod) {
    rig.namespace("plain", &[]);
    rig.pod(PodSpec {
        namespace: "plain",
        name: "server",
        account: "default",
        node: "node2",
        role: &["serve", "8080"],
    });
    rig.cluster.kubectl(&["-n", "plain", "expose", "pod", "server", "--port=80", "--target-port=8080"]);
    rig.wait_get(stranger, "http://server.plain.svc/", true);
    for at_a_time in [1, 10] {
        let [plain, mesh] = ["plain", DEMO].map(|namespace| {
            let address = ["-n", namespace, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}"];
            let url = format!("http://{}/", rig.cluster.kubectl(&address));
            first::times(rig, namespace, &url, at_a_time)
        });
        println!(
            "first connections, {at_a_time} pods at a time: p50 {:?}, max {:?}; without a mesh p50 {:?}, max {:?}",
            mesh[5], mesh[9], plain[5], plain[9]
        );
    }
}

/// Nothing that runs needs it; what it would have told is told when it is back.
fn istiod_is_away(rig: &Rig, load: &Load) {
    load.assert_whole(rig, "with istiod");
    let scale = |replicas: &str| {
        let replicas = format!("--replicas={replicas}");
        rig.cluster.kubectl(&["-n", ISTIO, "scale", "deployment/istiod", &replicas]);
    };
    scale("0");
    rig.cluster.wait_gone(ISTIO, "app=istiod");
    load.assert_whole(rig, "without istiod");
    scale("1");
    rig.wait_rolled_out();
    load.assert_whole(rig, "with istiod again");
}

/// Headless services, and entries for what is outside of the cluster, by their names: the tunnel answers
/// the pods' DNS.
fn services_of_istios_kinds_are_reached(rig: &Rig, client: &Pod, stranger: &Pod, server: &Pod) {
    rig.cluster.apply(&SERVICES.replace("SERVER", &server.ip).replace("STRANGER", &stranger.ip));
    for url in [
        "http://headless.demo.svc.cluster.local:8080/",
        // By another port than that of the pod.
        "http://several.demo.svc.cluster.local:81/",
        "http://several.demo.svc.cluster.local:82/",
        "http://alias.demo.svc.cluster.local/",
    ] {
        let body = rig.wait_get(client, url, true);
        assert!(body.contains("hello from server"), "{url}: {body}");
    }
    // By an address, and by a name that the tunnel resolves.
    for url in ["http://fixed.example/", "http://named.example/"] {
        assert!(rig.wait_get(client, url, true).contains("hello from stranger"), "{url}");
    }
    rig.wait_record("node1", &["outbound", "dst.service=\"fixed.example\""]);
}

/// With the addresses of pods. The last one is CoreDNS's alone.
const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: demo}
spec: {clusterIP: None, selector: {app: server}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: several, namespace: demo}
spec: {selector: {app: server}, ports: [{name: one, port: 81, targetPort: 8080}, {name: two, port: 82, targetPort: 8080}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: fixed, namespace: demo}
spec:
  hosts: [fixed.example]
  addresses: [240.240.0.1]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  resolution: STATIC
  endpoints: [{address: STRANGER}]
---
# It takes nothing from the pod that has the address.
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: claiming, namespace: demo}
spec:
  hosts: [claiming.example]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  resolution: STATIC
  endpoints: [{address: SERVER}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: named, namespace: demo}
spec:
  hosts: [named.example]
  addresses: [240.240.0.2]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: DNS
  endpoints: [{address: stranger.outside.svc.cluster.local}]
---
apiVersion: v1
kind: Service
metadata: {name: stranger, namespace: outside}
spec: {selector: {app: stranger}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: demo}
spec: {type: ExternalName, externalName: server.demo.svc.cluster.local}
";

/// Also where Istio's control plane says that there is a policy, and does not send it: a strict port in a
/// strict mesh, of pods that are not strict.
fn strict_ports_are_strict_and_others_are_not(rig: &Rig, client: &Pod, stranger: &Pod, server: &Pod) {
    let by_address = format!("http://{}:8080/", server.ip);
    let policies = |port: u16| {
        rig.cluster.apply(&format!(
            "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: server, namespace: demo}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  mtls: {{mode: PERMISSIVE}}
  portLevelMtls: {{{port}: {{mode: STRICT}}}}
"
        ));
    };
    rig.cluster.kubectl(&["-n", DEMO, "delete", "peerauthentication", "strict"]);
    rig.cluster.kubectl(&["-n", DEMO, "delete", "authorizationpolicy", "client-only"]);
    rig.wait_get(stranger, &by_address, true);
    rig.cluster.apply(MESH_STRICT);
    policies(8080);
    rig.wait_get(stranger, &by_address, false);
    rig.wait_get(client, &by_address, true);
    // Here nothing is sent: whoever has an identity passes.
    policies(9999);
    istioctl::wait_line(
        rig,
        &["ztunnel-config", "workload", "server.demo", "-o", "json"],
        &["\"demo/converted_peer_authentication_server\""],
    );
    for _ in 0..5 {
        let body =
            rig.get(client, &by_address).unwrap_or_else(|said| panic!("{said}\n{}", rig.system_story()));
        assert!(body.contains("hello from server"), "{body}");
    }
    rig.get(stranger, &by_address).expect_err("nothing is known of who has no identity");
    // It makes such a policy anew when its own object changes, not when the mesh's does.
    rig.cluster.kubectl(&["-n", ISTIO, "delete", "peerauthentication", "mesh"]);
    policies(9998);
    rig.wait_get(stranger, &by_address, true);
}

const MESH_STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: mesh, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
";
