//! Clients of other trust domains than the server's: aliases of the mesh, and those that the control
//! plane's files list.

use std::{
    fs,
    io::{ErrorKind, Read},
};

use testbed::{
    mesh_pod::{MeshPod, read_line},
    tunnel_mesh::{TunnelMesh, TunnelNode},
    wait::wait_for,
};

/// A client of `old.example` on node a, and a server of `cluster.local` on node b, which lets only
/// one client in: that of its own mesh.
struct Rig {
    client: MeshPod,
    server: MeshPod,
    _a: TunnelNode,
    b: TunnelNode,
    mesh: TunnelMesh,
}

impl Rig {
    fn new(policies: &str) -> Self {
        let mut mesh = TunnelMesh::new();
        let (client, server) = (mesh.enrolled("a", "client"), mesh.enrolled("b", "server"));
        mesh.add_to_last_workload("  trustDomain: cluster.local\n");
        mesh.policies.push_str(policies);
        mesh.publish();
        server.serve_double_echo(8080);
        let a = [("TRUST_DOMAIN", "old.example")];
        let file = |name: &str| mesh.dir.path().join(name).display().to_string();
        let (config, list) = (file("mesh-config"), file("trust-domains"));
        let b = [("MESH_CONFIG_PATH", &*config), ("TRUST_DOMAINS_PATH", &*list)];
        let start = |name: &str, pod: &MeshPod, variables: &[(&str, &str)]| {
            let mut node = TunnelNode::start_with(&mesh, name, mesh.netns(name), variables);
            assert_eq!((node.agent().add(pod), node.agent().snapshot()), (String::new(), String::new()));
            node.wait_ready();
            node
        };
        let (a, b) = (start("a", &client, &a), start("b", &server, &b));
        Self { client, server, _a: a, b, mesh }
    }

    /// As the kubelet replaces a file of a ConfigMap.
    fn write(&self, name: &str, text: &str) {
        let (next, file) = (self.mesh.dir.path().join("next"), self.mesh.dir.path().join(name));
        fs::write(&next, text).expect("write");
        fs::rename(&next, &file).expect("rename");
    }

    fn refused(&self) {
        assert_eq!(self.client.netns.refusal(self.server.at(8080)), ErrorKind::ConnectionReset);
    }

    fn connected(&self) -> std::net::TcpStream {
        wait_for("the client to be let in", || {
            let mut stream = self.client.netns.try_connect(self.server.at(8080)).ok()?;
            read_line(&mut stream).ok().map(|_| stream)
        })
    }

    /// Waits until it is refused for `reason`, and open connections are cut for it.
    fn cut(&self, mut open: std::net::TcpStream, reason: &str) {
        let error = open.read_exact(&mut [0]).expect_err("cut");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let of = "spiffe://old.example/ns/demo/sa/client";
        self.b.records(1, &[&format!("\"reason\":\"{reason}\""), of]);
        self.refused();
    }
}

#[test]
#[ignore = "needs root: make test"]
fn clients_of_trust_domains_that_the_control_plane_lists_are_accepted_as_long_as_it_does() {
    let rig = Rig::new("");
    rig.refused();
    rig.write("trust-domains", "cluster.local\nold.example\n");
    let open = rig.connected();
    rig.b.records(0, &["\"reason\":\"untrusted\""]);
    rig.write("trust-domains", "cluster.local\n");
    rig.cut(open, "untrusted");
    rig.write("trust-domains", "*\n");
    rig.connected();
}

#[test]
#[ignore = "needs root: make test"]
fn an_alias_of_the_mesh_configuration_is_this_mesh_for_policies_and_a_listed_domain_is_not() {
    let rig = Rig::new(
        "- name: ours\n  namespace: demo\n  scope: Namespace\n  action: Allow\n  \
         rules: [[[{principals: [cluster.local/ns/demo/sa/client]}]]]\n",
    );
    rig.write("trust-domains", "old.example\n");
    wait_for("policy to refuse it", || {
        rig.refused();
        rig.b.log().contains("none allowed").then_some(())
    });
    rig.write("mesh-config", "trustDomain: cluster.local\ntrustDomainAliases:\n- old.example\n");
    let open = rig.connected();
    rig.write("mesh-config", "trustDomain: cluster.local\n");
    rig.cut(open, "policy_change");
}
