//! A node of a cluster whose watcher follows an API server.

use std::{
    io,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    thread,
};

use serde_json::json;

use super::{Cluster, ClusterPod, Enrol};
use crate::{api_server::ApiServer, netns::TestNetns};

impl Cluster {
    /// Has the watcher of a node follow `api` in place of the pods file. To be called before it
    /// starts.
    pub fn follow_api(&mut self, node: usize, api: &ApiServer) {
        let node = &mut self.nodes[node];
        node.kubeconfig = Some(api.watcher_kubeconfig());
        forward(&node.netns, api.port());
    }

    /// Makes a running pod on a node that follows `api`, there and on the node.
    pub fn pod_of_api(&mut self, api: &ApiServer, namespace: &str, name: &str, node: usize) -> ClusterPod {
        let uid = api.pod(namespace, name, &self.nodes[node].pins_name, &json!({}));
        let pod = self.pod_as(name, node, Enrol::Plain, &format!("pod{uid}"));
        let ips = [&pod.v4, &pod.v6].map(|ip| json!({"ip": ip}));
        api.set_status(namespace, name, &json!({"phase": "Running", "podIP": pod.v4, "podIPs": ips}));
        pod
    }
}

/// Carries what is sent to `port` of the node's loopback to the same port of ours, where the API
/// server is.
fn forward(netns: &TestNetns, port: u16) {
    let listener = netns.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port))).expect("bind");
    thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            // Who is away is away through this, too.
            let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { continue };
            for (from, to) in [(&near, &far), (&far, &near)] {
                let (mut from, mut to) = (from.try_clone().expect("clone"), to.try_clone().expect("clone"));
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
}
