//! What runs beside the API server: controller manager, scheduler and DNS.

use std::{fs, net::Ipv4Addr, path::Path, process::Command};

use super::Network;
use crate::{
    api_server::{ApiServer, SERVICES},
    process::{KillOnDrop, Process},
    program::foreign,
};

/// As `go.mod` in `.ci/tools/coredns` has it.
const COREDNS: &str = "1.15.0";

/// Ends when it is dropped.
#[derive(Debug)]
pub(super) struct ControlPlane {
    _programs: Vec<KillOnDrop>,
    dns: Process,
}

/// What an API server needs for kubelets beside the rest.
pub(super) fn api_options(network: Network) -> Vec<String> {
    let mut options = vec![
        // Names of nodes are in no DNS.
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        // What kubeadm switches on, and what keeps a kubelet to its own node.
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--enable-bootstrap-token-auth=false".to_owned(),
        // It is on no node, which alone know the addresses of services: webhooks are dialled at their
        // pods, as where the control plane is somebody else's.
        "--enable-aggregator-routing=true".to_owned(),
    ];
    if network.has_v6() {
        options.push(format!("--service-cluster-ip-range={}", services(network)));
    }
    options
}

/// The addresses of services.
fn services(network: Network) -> String {
    if network.has_v6() { format!("{SERVICES},fd96::/112") } else { SERVICES.to_owned() }
}

impl ControlPlane {
    pub(super) fn start(api: &ApiServer, address: Ipv4Addr, network: Network, dir: &Path) -> Self {
        let admin = api.admin_kubeconfig();
        let manager = [
            format!("--kubeconfig={}", admin.display()),
            format!("--root-ca-file={}", api.file("ca.crt").display()),
            format!("--service-account-private-key-file={}", api.file("accounts.key").display()),
            format!("--service-cluster-ip-range={}", services(network)),
            "--leader-elect=false".to_owned(),
            // Real clusters wait for 40 s, and for 5 minutes.
            "--node-monitor-grace-period=20s".to_owned(),
            "--concurrent-daemonset-syncs=2".to_owned(),
        ];
        let scheduler = [format!("--kubeconfig={}", admin.display()), "--leader-elect=false".to_owned()];
        let programs = vec![
            api.start_beside("kube-controller-manager", &manager),
            api.start_beside("kube-scheduler", &scheduler),
        ];
        Self { _programs: programs, dns: start_dns(api, address, dir) }
    }

    pub(super) fn story(&self) -> String {
        format!("--- coredns\n{}\n", self.dns.output())
    }
}

/// The DNS of the cluster, on port 53 of the control plane's address: from `COREDNS_BIN`, else
/// `PATH`, else what `.ci/setup/coredns` builds.
fn start_dns(api: &ApiServer, address: Ipv4Addr, dir: &Path) -> Process {
    let program = foreign("coredns", "COREDNS_BIN", true, &format!("coredns-{COREDNS}"));
    let file = dir.join("Corefile");
    let zones = format!(
        ".:53 {{\n  bind {address}\n  errors\n  kubernetes cluster.local in-addr.arpa ip6.arpa {{\n    \
         kubeconfig {} testbed\n    pods insecure\n    ttl 1\n  }}\n}}\n",
        api.admin_kubeconfig().display()
    );
    fs::write(&file, zones).expect("Corefile");
    let mut command = Command::new(program);
    command.arg("-conf").arg(&file);
    Process::spawn("coredns", command, &dir.join("coredns.log"))
}
