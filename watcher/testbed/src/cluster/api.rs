//! A node of a cluster whose watcher follows an API server.

use std::{
    fmt,
    io::{self, Read},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use serde_json::json;

use super::{Cluster, ClusterPod, Enrol};
use crate::{api_server::ApiServer, netns::TestNetns};

impl Cluster {
    /// Has the watcher of a node follow `api` in place of the pods file. To be called before it
    /// starts.
    pub fn follow_api(&mut self, node: usize, api: &ApiServer) -> WayToApi {
        let node = &mut self.nodes[node];
        node.kubeconfig = Some(api.watcher_kubeconfig());
        WayToApi::new(&node.netns, api.port())
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

/// Carries what is sent to a port of the node's loopback to the same port of ours, where the API
/// server is. It can be cut, or hold back what it should carry.
#[derive(Clone)]
pub struct WayToApi(Arc<Mutex<State>>);

struct State {
    works: Works,
    /// Both ends of every connection, to cut them.
    connections: Vec<[TcpStream; 2]>,
}

/// How a way is at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Works {
    /// It carries.
    Yes,
    /// Connections are cut, and new ones too.
    Cut,
    /// Nothing comes through, and nobody is told.
    Silent,
}

impl fmt::Debug for WayToApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WayToApi").field(&self.works()).finish()
    }
}

impl WayToApi {
    fn new(netns: &TestNetns, port: u16) -> Self {
        let way = Self(Arc::new(Mutex::new(State { works: Works::Yes, connections: Vec::new() })));
        let listener = netns.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port))).expect("bind");
        let carrier = way.clone();
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                carrier.carry(&near, port);
            }
        });
        way
    }

    /// Changes how it is.
    pub fn set(&self, works: Works) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.works = works;
        if works == Works::Cut {
            for end in state.connections.drain(..).flatten() {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    }

    fn works(&self) -> Works {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).works
    }

    fn carry(&self, near: &TcpStream, port: u16) {
        // Who is away is away through this, too.
        let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { return };
        let clone = |end: &TcpStream| end.try_clone().expect("clone");
        {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if state.works == Works::Cut {
                return;
            }
            state.connections.push([clone(near), clone(&far)]);
        }
        for (from, to) in [(near, &far), (&far, near)] {
            let (mut from, mut to, way) = (clone(from), clone(to), self.clone());
            thread::spawn(move || {
                let _ = io::copy(&mut HeldBack(&mut from, &way), &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    }
}

/// What `0` sends, once the way is not silent.
struct HeldBack<'a>(&'a mut TcpStream, &'a WayToApi);

impl Read for HeldBack<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        while self.1.works() == Works::Silent {
            thread::sleep(Duration::from_millis(5));
        }
        Ok(read)
    }
}
