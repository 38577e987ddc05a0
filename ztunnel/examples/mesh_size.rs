//! What a large mesh costs: 100,000 workloads as a control plane sends them, read, indexed and
//! held; then one more.
//!
//!     cargo run --release -p ztunnel --example mesh_size [WORKLOADS]

use std::{
    fs,
    ops::Range,
    time::{Duration, Instant},
};

use prost::Message as _;
use prost_types::Any;
use ztunnel::{
    discovery::{ADDRESS, ResourceDecoder, delta::Subscription},
    mesh::{Store, local_file::ResourceDefaults},
};
use ztunnel_api::{
    discovery::{DeltaDiscoveryResponse, Resource},
    workload::{Address, Port, PortList, TunnelProtocol, Workload, address},
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How many come in one response.
const PART: usize = 5000;

/// One of a deployment of 20 pods, 50 deployments in a namespace, 1,000 nodes.
fn workload(number: usize) -> Resource {
    let (deployment, namespace) = (number / 20, number / 1000);
    let (name, service) = (format!("web-{deployment}-{number:06x}"), format!("web-{deployment}"));
    let ip = u32::try_from(number).unwrap_or(0) + 0x0a00_0001;
    let ports = vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }];
    let uid = format!("Kubernetes//Pod/team-{namespace}/{name}");
    let sent = Workload {
        uid: uid.clone(),
        name,
        namespace: format!("team-{namespace}"),
        addresses: vec![ip.to_be_bytes().to_vec()],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".to_owned(),
        service_account: service.clone(),
        node: format!("node-{}", number % 1000),
        canonical_name: service.clone(),
        canonical_revision: "latest".to_owned(),
        workload_name: service.clone(),
        cluster_id: "Kubernetes".to_owned(),
        services: [(
            format!("team-{namespace}/{service}.team-{namespace}.svc.cluster.local"),
            PortList { ports },
        )]
        .into(),
        ..Workload::default()
    };
    let value = Address { r#type: Some(address::Type::Workload(sent)) }.encode_to_vec();
    let resource = Some(Any { type_url: ADDRESS.to_owned(), value });
    Resource { name: uid, resource, ..Resource::default() }
}

fn response(numbers: Range<usize>) -> DeltaDiscoveryResponse {
    let resources = numbers.map(workload).collect();
    DeltaDiscoveryResponse { type_url: ADDRESS.to_owned(), resources, ..DeltaDiscoveryResponse::default() }
}

/// Kilobytes that this process holds.
fn held() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}

fn main() {
    let count: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(100_000);
    let decoder = ResourceDecoder::new(ResourceDefaults {
        trust_domain: "cluster.local".into(),
        cluster_id: "Kubernetes".into(),
    });
    let store = Store::default();
    let mut addresses = Subscription::new(ADDRESS);
    let before = held();
    // Made and told in parts, so that what is measured is what stays, not the message.
    let (mut took, mut made) = (Duration::ZERO, 0);
    while made < count {
        let numbers = made..count.min(made + PART);
        made = numbers.end;
        let response = response(numbers);
        let began = Instant::now();
        store.apply(addresses.apply(&decoder, response).changes);
        took += began.elapsed();
    }
    let kilobytes = held().saturating_sub(before);
    println!("{count} workloads: read, indexed and held after {took:?}");
    println!("{kilobytes} kB, {} bytes each", kilobytes * 1024 / count.max(1) as u64);
    let last = response(count..count + 1);
    let began = Instant::now();
    store.apply(addresses.apply(&decoder, last).changes);
    println!("one more: {:?}", began.elapsed());
}
