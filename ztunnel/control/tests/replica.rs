//! A control plane whose certificates last for seconds.

use std::{path::Path, time::Duration};

use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use testbed::wait::wait_at_most;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use ztunnel_control::{
    authority::place::RootPlace,
    discovery::StreamLimits,
    program::{self, Options, Sockets},
    settings::MeshSettings,
};

use crate::rig::LIMIT;

/// A control plane in this process: its certificates last shorter than the program would have it. It
/// ends at once, wherever it is, when this is dropped.
pub struct Replica(Option<Runtime>);

impl Replica {
    /// Its certificates last for `life`.
    pub fn start(kubeconfig: &Path, port: u16, life: Duration) -> Self {
        let runtime = Runtime::new().unwrap();
        let options = Options {
            listen: ([127, 0, 0, 1], port).into(),
            http_listen: ([127, 0, 0, 1], 0).into(),
            mesh: MeshSettings::default(),
            tunnels: ["adit-system/ztunnel".parse().unwrap()].into(),
            server_names: vec!["localhost".to_owned()],
            certificate_life: life,
            root: RootPlace {
                namespace: "adit-system".to_owned(),
                secret: "adit-root".to_owned(),
                config_map: "adit-root-cert".to_owned(),
                crl_config_map: None,
                trust_domain: "cluster.local".to_owned(),
            },
            limits: StreamLimits::default(),
        };
        let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
        let options_of_file = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options_of_file);
        let config = runtime.block_on(config).unwrap();
        // The port of the one before is free when its last connection is.
        let sockets = wait_at_most(LIMIT, "the port", || runtime.block_on(Sockets::bind(&options)).ok());
        runtime.spawn(program::run(options, config, sockets, CancellationToken::new()));
        Self(Some(runtime))
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.0.take().unwrap().shutdown_background();
    }
}
