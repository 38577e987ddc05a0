//! Istio's own control plane, as `.ci/setup/istio` builds it, as a program at an API server.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
};

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use testbed::{api_server::ApiServer, istio, process::KillOnDrop, wait::try_wait};

use crate::rig::{LIMIT, bound_token, unique};

/// What Istio calls its root namespace, where it runs and where its tunnels are.
const SYSTEM: &str = "adit-system";
/// The name in its certificate.
pub const SERVER_NAME: &str = "istiod.adit-system.svc";

/// It ends with this.
pub struct Istiod {
    pub port: u16,
    /// Its root, in PEM.
    pub root: String,
    pub token: String,
    log: PathBuf,
    _process: KillOnDrop,
    _dir: tempfile::TempDir,
}

impl Istiod {
    /// At an API server that has Istio's kinds. Returns when it has read what is there.
    pub fn start(api: &Arc<ApiServer>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let output = File::create(&log).unwrap();
        let mesh = dir.path().join("mesh");
        fs::write(&mesh, format!("rootNamespace: {SYSTEM}\ntrustDomain: cluster.local\n")).unwrap();
        let anywhere = "127.0.0.1:0";
        let child = Command::new(istio::program("pilot-discovery"))
            .arg("discovery")
            .arg("--kubeconfig")
            .arg(api.admin_kubeconfig())
            .arg("--meshConfig")
            .arg(&mesh)
            .args(["--secureGRPCAddr", anywhere, "--httpAddr", anywhere, "--monitoringAddr", anywhere])
            .args(["--grpcAddr", "", "--httpsAddr", ""])
            .envs([("POD_NAMESPACE", SYSTEM), ("POD_NAME", "istiod"), ("CLUSTER_ID", "Kubernetes")])
            .envs([("PILOT_ENABLE_AMBIENT", "true"), ("CA_TRUSTED_NODE_ACCOUNTS", "adit-system/ztunnel")])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stderr(output.try_clone().unwrap())
            .stdout(output)
            .spawn()
            .unwrap();
        let mut istiod = Self {
            port: 0,
            root: String::new(),
            token: bound_token(api, (SYSTEM, "ztunnel"), &unique("node"), "istio-ca").1,
            log,
            _process: KillOnDrop(child),
            _dir: dir,
        };
        let port = try_wait(LIMIT, || {
            let line = "starting secure gRPC discovery service at ";
            let log = istiod.log();
            let at = log.lines().find_map(|text| text.split_once(line))?.1.trim();
            at.rsplit_once(':')?.1.parse().ok()
        });
        istiod.port = port.unwrap_or_else(|| panic!("istiod does not listen\n{}", istiod.log()));
        let secrets: Api<Secret> = Api::namespaced(api.client(), SYSTEM);
        let secret = api.block_on(secrets.get("istio-ca-secret")).unwrap();
        let root = secret.data.unwrap().remove("ca-cert.pem").unwrap();
        istiod.root = String::from_utf8(root.0).unwrap();
        istiod
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}
