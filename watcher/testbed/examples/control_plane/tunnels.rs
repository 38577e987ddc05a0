//! Tunnels as the control plane sees them: they subscribe to everything, acknowledge it, and come back
//! whenever their stream ends.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    runtime::Runtime,
    sync::mpsc::{self, UnboundedSender},
};
use tonic::{
    Request, Status,
    codegen::tokio_stream::wrappers::UnboundedReceiverStream,
    transport::{Certificate, ClientTlsConfig, Endpoint},
};
use ztunnel_api::discovery::{
    DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};

const TYPES: [&str; 2] =
    ["type.googleapis.com/istio.security.Authorization", "type.googleapis.com/istio.workload.Address"];

/// What a tunnel heard.
enum Heard {
    /// Its first response with workloads on a stream, and how many resources it knows now.
    Everything { tunnel: usize, count: usize },
    /// Of a change.
    Change { name: String, at: Instant },
}

/// Everything that tunnels share.
struct Shared {
    port: u16,
    root: String,
    heard: UnboundedSender<Heard>,
    /// Names and versions of what they have, for when they come back: it is the same for all.
    versions: Mutex<HashMap<String, String>>,
    /// Whether they say so.
    come_back: AtomicBool,
    connections: AtomicUsize,
}

/// All tunnels. They end with this.
pub struct Tunnels {
    runtime: Runtime,
    count: usize,
    shared: Arc<Shared>,
    heard: mpsc::UnboundedReceiver<Heard>,
    knowing: HashSet<usize>,
    changes: HashMap<String, Vec<Instant>>,
}

impl Tunnels {
    /// One for each token.
    pub fn start(port: u16, root: String, tokens: Vec<String>) -> Self {
        let (sender, heard) = mpsc::unbounded_channel();
        let shared = Shared {
            port,
            root,
            heard: sender,
            versions: Mutex::default(),
            come_back: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
        };
        let shared = Arc::new(shared);
        let (runtime, count) = (Runtime::new().expect("a runtime"), tokens.len());
        for (tunnel, token) in tokens.into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            runtime.spawn(async move {
                loop {
                    let _ = stream(&shared, tunnel, &token).await;
                    // All of them see the end at the same time; a real one waits for 10 ms first, too.
                    tokio::time::sleep(Duration::from_millis(rand::random_range(5..100))).await;
                }
            });
        }
        Self { runtime, count, shared, heard, knowing: HashSet::new(), changes: HashMap::new() }
    }

    /// Waits until every tunnel has had its first response. Returns how many resources one knows.
    pub fn until_all_know(&mut self, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        let mut known = 0;
        while self.knowing.len() < self.count {
            known = self.next(deadline).max(known);
        }
        known
    }

    /// The control plane is about to end: tunnels come back with what they have.
    pub fn come_back(&mut self) {
        self.shared.come_back.store(true, Ordering::Relaxed);
        self.shared.connections.store(0, Ordering::Relaxed);
        self.knowing.clear();
    }

    /// Waits until every tunnel has heard of a resource, and returns when each did.
    pub fn until_all_heard(&mut self, name: &str, limit: Duration) -> Vec<Instant> {
        let deadline = Instant::now() + limit;
        while self.changes.get(name).map_or(0, Vec::len) < self.count {
            self.next(deadline);
        }
        self.changes.remove(name).unwrap_or_default()
    }

    /// How many were made.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    fn next(&mut self, deadline: Instant) -> usize {
        let next = async { tokio::time::timeout_at(deadline.into(), self.heard.recv()).await };
        match self.runtime.block_on(next).expect("in time").expect("tunnels") {
            Heard::Everything { tunnel, count } => {
                self.knowing.insert(tunnel);
                count
            }
            Heard::Change { name, at } => {
                self.changes.entry(name).or_default().push(at);
                0
            }
        }
    }
}

async fn stream(shared: &Shared, tunnel: usize, token: &str) -> Result<(), Status> {
    let failed = |error: tonic::transport::Error| Status::unavailable(error.to_string());
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&shared.root)).domain_name("localhost");
    // Of an address of its own, as each node has.
    let [a, b] = [tunnel / 200, tunnel % 200].map(|byte| u8::try_from(byte).unwrap_or(u8::MAX));
    let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{}", shared.port)).map_err(failed)?;
    let endpoint = endpoint.local_address(Some(Ipv4Addr::new(127, 1, a, b + 1).into()));
    let channel = endpoint.tls_config(tls).map_err(failed)?.connect().await.map_err(failed)?;
    shared.connections.fetch_add(1, Ordering::Relaxed);
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(usize::MAX);
    let (requests, sent) = mpsc::unbounded_channel();
    let mut call = Request::new(UnboundedReceiverStream::new(sent));
    let bearer = format!("Bearer {token}").parse().map_err(|_| Status::internal("a token"))?;
    call.metadata_mut().insert("authorization", bearer);
    let held = || shared.versions.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for type_url in TYPES {
        let has_some = type_url == TYPES[1] && shared.come_back.load(Ordering::Relaxed);
        let initial_resource_versions = if has_some { held() } else { HashMap::new() };
        let request = DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            initial_resource_versions,
            ..DeltaDiscoveryRequest::default()
        };
        let _ = requests.send(request);
    }
    let mut responses = client.delta_aggregated_resources(call).await?.into_inner();
    let mut knows = false;
    while let Some(response) = responses.message().await? {
        let at = Instant::now();
        let acknowledgement = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        let _ = requests.send(acknowledgement);
        if response.type_url != TYPES[1] {
            continue;
        }
        let first = !std::mem::replace(&mut knows, true);
        if tunnel == 0 {
            let mut versions = shared.versions.lock().unwrap_or_else(PoisonError::into_inner);
            versions.extend(response.resources.iter().map(|one| (one.name.clone(), one.version.clone())));
        }
        if first {
            let _ = shared.heard.send(Heard::Everything { tunnel, count: response.resources.len() });
        } else {
            for resource in response.resources {
                let _ = shared.heard.send(Heard::Change { name: resource.name, at });
            }
        }
    }
    Ok(())
}
