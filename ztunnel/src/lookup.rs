//! Resolves workloads that have only a host name: when a connection needs one, from the node's
//! netns, cached for the TTL of the answer.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig},
    net::{NetError, runtime::TokioRuntimeProvider},
};
use tracing::warn;

use crate::mesh::services::IpFamilies;

/// Maximum number of cached answers per worker.
const REMEMBERED: u64 = 4096;
/// Time limit per server and attempt. The application's connect waits for it.
const PATIENCE: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 2;

/// Why a host name could not be resolved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("no resolver is configured (dns.upstream, or /etc/resolv.conf) to look {hostname} up")]
    NoResolver { hostname: String },
    #[error("cannot look {hostname} up")]
    Failed { hostname: String, source: Box<NetError> },
    #[error("{hostname} has no address of a family that may be used")]
    NoAddress { hostname: String },
}

/// One per worker, because a waiting connection must not leave its worker.
pub(crate) struct HostResolver(Option<TokioResolver>);

impl std::fmt::Debug for HostResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostResolver").finish_non_exhaustive()
    }
}

impl HostResolver {
    /// Queries `upstream`, or the resolvers of `/etc/resolv.conf` if it is empty.
    pub(crate) fn new(upstream: &[SocketAddr]) -> Self {
        let built = if upstream.is_empty() {
            TokioResolver::builder_tokio()
        } else {
            let config = ResolverConfig::from_parts(None, Vec::new(), upstream.iter().map(server).collect());
            Ok(TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()))
        };
        let built = built.and_then(|mut builder| {
            let options = builder.options_mut();
            options.cache_size = REMEMBERED;
            options.timeout = PATIENCE;
            options.attempts = ATTEMPTS;
            options.num_concurrent_reqs = 1; // the others are for when the first fails
            options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
            builder.build()
        });
        Self(built.inspect_err(|error| warn!(%error, "workloads without addresses cannot be looked up")).ok())
    }

    /// An address of a host, of the family of `like` if there is one.
    pub(crate) async fn address(
        &self,
        hostname: &str,
        families: IpFamilies,
        like: IpAddr,
    ) -> Result<IpAddr, LookupError> {
        let hostname = || hostname.to_owned();
        let resolver = self.0.as_ref().ok_or_else(|| LookupError::NoResolver { hostname: hostname() })?;
        // Names from the control plane are complete. The final dot prevents search domains.
        let complete = format!("{}.", hostname().trim_end_matches('.'));
        let found = resolver
            .lookup_ip(complete)
            .await
            .map_err(|source| LookupError::Failed { hostname: hostname(), source: Box::new(source) })?;
        let usable = || found.iter().map(|ip| ip.to_canonical()).filter(|&ip| families.accept(ip));
        usable()
            .find(|ip| ip.is_ipv4() == like.is_ipv4())
            .or_else(|| usable().next())
            .ok_or_else(|| LookupError::NoAddress { hostname: hostname() })
    }
}

fn server(address: &SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(address.ip());
    for connection in &mut server.connections {
        let at: &mut ConnectionConfig = connection;
        at.port = address.port();
    }
    server
}
