//! What the programs of a node read: kubelet, containerd, the CNI plugins.

use std::path::Path;

use serde_json::{Value, json};

/// What the settings of a node depend on.
#[derive(Debug)]
pub(super) struct NodeSettings<'a> {
    /// The folder with the node's files.
    pub dir: &'a Path,
    /// The node's address.
    pub address: String,
    /// The addresses of its pods, such as `10.244.1.0/24`.
    pub pods: String,
    /// Those of IPv6.
    pub pods_v6: Option<String>,
    /// How pods are joined to their node.
    pub network: Network,
    /// Where the cluster's DNS answers.
    pub dns: String,
    /// `FILE.crt` and `FILE.key` of the kubelet, and the CA of its clients.
    pub certificate: &'a Path,
    pub key: &'a Path,
    pub ca: &'a Path,
}

/// The image of every pod's sandbox.
pub const PAUSE_IMAGE: &str = "localhost/pause:1";

/// Where a node has the list of its CNI plugins (`net.d`), and those that pods install (`bin`).
pub const CNI: &str = "/run/cni";

/// How the pods of a node are joined to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// By a bridge, as with kubenet, Flannel or Kind: pods of one node are neighbours.
    Bridge,
    /// Each by a link of its own, over which the node routes to that one address, as with Calico:
    /// pods of one node meet at their node.
    Routed,
    /// By a bridge, and with an address of each family.
    DualStack,
}

impl Network {
    /// Whether nodes, pods and services have IPv6 addresses too.
    pub(super) fn has_v6(self) -> bool {
        self == Self::DualStack
    }
}

impl NodeSettings<'_> {
    /// The kubelet's configuration.
    pub(super) fn kubelet(&self) -> Value {
        let none = json!({"memory.available": "50Mi", "nodefs.available": "0%", "imagefs.available": "0%",
            "nodefs.inodesFree": "0%", "imagefs.inodesFree": "0%"});
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true},
                "x509": {"clientCAFile": self.ca}},
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": self.certificate,
            "tlsPrivateKeyFile": self.key,
            "containerRuntimeEndpoint": format!("unix://{}", self.containerd_socket()),
            "clusterDNS": [self.dns],
            "clusterDomain": "cluster.local",
            "resolvConf": self.dir.join("resolv.conf"),
            "cgroupDriver": "cgroupfs",
            // The machine of the tests may have controllers of cgroup v1.
            "failCgroupV1": false,
            "failSwapOn": false,
            "makeIPTablesUtilChains": false,
            // As many pods as the tests make, on a machine of any size.
            "evictionHard": none,
            "imageGCHighThresholdPercent": 100,
            "healthzPort": 0,
            "nodeStatusUpdateFrequency": "3s",
            // Files that a test changes reach its pods soon.
            "syncFrequency": "5s",
            "configMapAndSecretChangeDetectionStrategy": "Watch",
        })
    }

    /// Where containerd serves.
    pub(super) fn containerd_socket(&self) -> String {
        self.dir.join("containerd.sock").display().to_string()
    }

    /// containerd's configuration.
    pub(super) fn containerd(&self, cni_bin: &Path, runc: &Path) -> String {
        let dir = self.dir.display();
        format!(
            r#"version = 3
root = "{dir}/containerd/root"
state = "/run/containerd"
[grpc]
  address = "{socket}"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  # Who runs the tests may lack CAP_SYS_RESOURCE.
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{CNI}/bin", "{cni_bin}"]
  conf_dir = "{CNI}/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  BinaryName = "{runc}"
  SystemdCgroup = false
"#,
            socket = self.containerd_socket(),
            cni_bin = cni_bin.display(),
            runc = runc.display(),
        )
    }

    /// The list of CNI plugins.
    pub(super) fn cni(&self) -> Value {
        let mut link = match self.network {
            Network::Bridge | Network::DualStack => {
                json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true})
            }
            Network::Routed => json!({"type": "ptp"}),
        };
        link["ipMasq"] = json!(false);
        let mut ranges = vec![json!([{"subnet": self.pods}])];
        let mut routes = vec![json!({"dst": "0.0.0.0/0"})];
        if let Some(pods) = &self.pods_v6 {
            ranges.push(json!([{"subnet": pods}]));
            routes.push(json!({"dst": "::/0"}));
        }
        link["ipam"] = json!({"type": "host-local", "dataDir": self.dir.join("cni-state"),
            "ranges": ranges, "routes": routes});
        let ports = json!({"type": "portmap", "capabilities": {"portMappings": true}});
        json!({"cniVersion": "0.4.0", "name": "pods", "plugins": [link, ports]})
    }
}

/// kube-proxy's configuration.
pub(super) fn proxy(name: &str, network: Network, kubeconfig: &Path) -> Value {
    let v6 = if network.has_v6() { ",fd44::/16" } else { "" };
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": name,
        "clientConnection": {"kubeconfig": kubeconfig},
        "clusterCIDR": format!("10.244.0.0/16{v6}"),
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        // Of the whole machine, and those of a netns cannot be set.
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}
