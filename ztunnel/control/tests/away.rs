//! Both control planes are away, for as long as certificates must hold then: connections go on.

use std::{
    net::TcpListener,
    sync::Arc,
    time::{Duration, Instant},
};

use kube::Api;
use testbed::{api_server::ApiServer, wait::wait_at_most};
use tokio::runtime::Runtime;

use crate::{
    replica::Replica,
    rig::{LIMIT, kubeconfig},
    tunnels::{Tunnel, connect},
};

/// Of certificates. The clocks of the real ones, with a day, go more slowly by this.
const LIFE: Duration = Duration::from_secs(20);
/// A third of it, as 8 hours of a day. An hour is asked for.
const AWAY: Duration = Duration::from_secs(7);

#[test]
#[ignore = "needs an API server: make test"]
fn connections_go_on_while_both_control_planes_are_away_for_a_third_of_a_certificates_life() {
    let api = Arc::new(ApiServer::start());
    let kubeconfig = kubeconfig(&api);
    let ports = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    let start = || ports.map(|port| Replica::start(&kubeconfig, port, LIFE));
    let mut replicas = Some(start());
    let maps: Api<k8s_openapi::api::core::v1::ConfigMap> = Api::namespaced(api.client(), "adit-system");
    let root = wait_at_most(LIMIT, "a root", || {
        let map = api.block_on(maps.get_opt("adit-root-cert")).unwrap();
        map.and_then(|map| map.data?.remove("root-cert.pem"))
    });
    let runtime = Runtime::new().unwrap();
    let tunnels = ports.map(|port| Tunnel::start(&api, &runtime, port, &root));
    let talk = |time: Duration| {
        let (began, mut count) = (Instant::now(), 0);
        while began.elapsed() < time {
            for (from, to) in [(0, 1), (1, 0)] {
                let connected = runtime.block_on(connect(&tunnels[from], &tunnels[to]));
                assert_eq!(connected, Ok(()), "after {:?}, {count} connections", began.elapsed());
                count += 1;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        count
    };
    // Each time at another moment of the certificates' lives.
    for phase in 0..4 {
        talk(Duration::from_secs(2) * phase);
        let before = tunnels.each_ref().map(|tunnel| runtime.block_on(tunnel.credentials()).not_after);
        drop(replicas.take());
        assert!(talk(AWAY) > 50);
        replicas = Some(start());
        for (tunnel, before) in tunnels.iter().zip(before) {
            wait_at_most(LIMIT, "another certificate", || {
                (runtime.block_on(tunnel.credentials()).not_after > before).then_some(())
            });
        }
    }
}
