//! Finds the service for a name, and its addresses. Pure.
//!
//! A pod may use any of Kubernetes' short forms of a service name, and its resolver appends search
//! domains to names with few dots. So a name is tried unchanged, then completed to a full service
//! name, then with each search domain removed. Each form is also tried against wildcards.
//!
//! `a.b` may mean service `a` of namespace `b`, or a name of the outside world: whoever may create
//! a namespace `com` must not own `google.com`. So it is ours only where the outside has no such
//! name. A pod's resolver tries its search domains first, and never gets so far.

use std::{net::IpAddr, sync::Arc};

use crate::mesh::{Mesh, Service};

/// The pod that sent the query.
#[derive(Clone, Copy, Debug)]
pub struct DnsClient<'a> {
    /// Where names without a namespace are looked for first.
    pub namespace: &'a str,
    /// Its network: an address counts there only.
    pub network: &'a str,
}

/// The names of this cluster, and the preference among equal names.
#[derive(Clone, Debug)]
pub struct DnsZone {
    /// `cluster.local`
    domain: String,
    /// `svc.cluster.local`
    services: String,
    /// If several namespaces have a service with the name, this namespace is preferred after the
    /// client's own.
    preferred_namespace: Option<Arc<str>>,
    /// Whether answers contain IPv6 addresses.
    ipv6: bool,
}

impl DnsZone {
    /// The zone `domain` (`cluster.local`), with or without a dot at its end.
    #[must_use]
    pub fn new(domain: &str, preferred_namespace: Option<Arc<str>>, ipv6: bool) -> Self {
        let domain = domain.trim_matches('.').to_ascii_lowercase();
        Self { services: format!("svc.{domain}"), domain, preferred_namespace, ipv6 }
    }
}

/// The requested address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressFamily {
    /// A records.
    V4,
    /// AAAA records.
    V6,
    /// Records of another type, of which services have none.
    Neither,
}

/// The result for a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundName {
    /// The name without the search domain that the client's resolver appended, if any.
    pub alias_of: Option<String>,
    /// Empty if the name exists but has no address of the family.
    pub addresses: Vec<IpAddr>,
    /// Whether the name may be one of the outside world, which then counts.
    pub outside_first: bool,
}

/// Looks up `name`, which is lower case and without the final dot. `None` if it is not a name of
/// the mesh.
#[must_use]
pub fn find(
    mesh: &Mesh,
    zone: &DnsZone,
    client: DnsClient<'_>,
    name: &str,
    family: AddressFamily,
) -> Option<FoundName> {
    for alias in aliases(zone, client, name) {
        let mut names = with_wildcards(&alias.name, mesh.deepest_wildcard());
        let service = names.find_map(|name| best(mesh, zone, client, &name));
        if let Some(service) = service {
            let addresses = addresses(mesh, zone, client, service, family);
            let outside_first = alias.outside_first;
            return Some(FoundName { alias_of: alias.stripped, addresses, outside_first });
        }
    }
    None
}

struct Alias {
    name: String,
    /// The name without its search domain, if one was removed.
    stripped: Option<String>,
    outside_first: bool,
}

fn aliases(zone: &DnsZone, client: DnsClient<'_>, name: &str) -> Vec<Alias> {
    let namespaced = format!("{}.{}", client.namespace, zone.services);
    let mut aliases: Vec<Alias> = Vec::new();
    let mut add = |name: String, stripped: Option<&str>, outside_first| {
        if !aliases.iter().any(|alias| alias.name == name) {
            aliases.push(Alias { name, stripped: stripped.map(str::to_owned), outside_first });
        }
    };
    add(name.to_owned(), None, false);
    if let Some(full) = full_name(zone, &namespaced, name) {
        add(full, None, name.split('.').count() == 2);
    }
    for search in [namespaced.as_str(), &zone.services, &zone.domain] {
        let stripped = name.strip_suffix(search).and_then(|rest| rest.strip_suffix('.'));
        let Some(stripped) = stripped.filter(|rest| !rest.is_empty()) else { continue };
        add(stripped.to_owned(), Some(stripped), false);
        if let Some(full) = full_name(zone, &namespaced, stripped) {
            add(full, Some(stripped), false);
        }
    }
    aliases
}

/// `name`, `name.namespace` and `name.namespace.svc`, completed.
fn full_name(zone: &DnsZone, namespaced: &str, name: &str) -> Option<String> {
    let labels: Vec<_> = name.split('.').collect();
    match labels[..] {
        [_] => Some(format!("{name}.{namespaced}")),
        [_, _] => Some(format!("{name}.{}", zone.services)),
        [_, _, "svc"] => Some(format!("{name}.{}", zone.domain)),
        _ => None,
    }
}

/// `a.b.c`, `*.b.c`, `*.c`; those with at most `deepest` labels.
fn with_wildcards(name: &str, deepest: usize) -> impl Iterator<Item = String> {
    let too_deep = name.split('.').count().saturating_sub(deepest);
    let parents = name.match_indices('.').skip(too_deep).map(|(dot, _)| format!("*{}", &name[dot..]));
    std::iter::once(name.to_owned()).chain(parents)
}

/// The service that the client means, in this order: its own namespace's, the preferred
/// namespace's, the canonical one, any.
fn best<'a>(
    mesh: &'a Mesh,
    zone: &DnsZone,
    client: DnsClient<'_>,
    hostname: &str,
) -> Option<&'a Arc<Service>> {
    let rank = |service: &Service| {
        if &*service.namespace == client.namespace {
            0
        } else if zone.preferred_namespace.as_deref() == Some(&*service.namespace) {
            1
        } else if service.canonical {
            2
        } else {
            3
        }
    };
    let known = mesh.services_named(hostname);
    let known = known.filter(|service| service.is_visible_from(client.namespace));
    let known = known.filter(|service| answers(zone, service));
    known.min_by_key(|service| (rank(service), &service.namespace))
}

/// A Kubernetes service without addresses is headless. Other services without addresses are
/// resolved by the upstream resolvers.
fn answers(zone: &DnsZone, service: &Service) -> bool {
    let of_kubernetes =
        || service.hostname.strip_suffix(zone.services.as_str()).is_some_and(|rest| rest.ends_with('.'));
    !service.vips.is_empty() || of_kubernetes()
}

/// Only endpoints of the client's own network. Those of other networks are reached by the service's
/// name.
fn addresses(
    mesh: &Mesh,
    zone: &DnsZone,
    client: DnsClient<'_>,
    service: &Service,
    family: AddressFamily,
) -> Vec<IpAddr> {
    let is_wanted = |ip: &IpAddr| match family {
        AddressFamily::V4 => ip.is_ipv4(),
        AddressFamily::V6 => ip.is_ipv6() && zone.ipv6,
        AddressFamily::Neither => false,
    };
    let mut addresses: Vec<IpAddr> = if service.vips.is_empty() {
        let endpoints = mesh.endpoints(&service.key()).iter().map(|endpoint| &endpoint.workload);
        endpoints
            .filter(|workload| workload.healthy || service.allows_unhealthy())
            .filter(|workload| &*workload.network == client.network)
            .flat_map(|workload| workload.addresses.iter())
            .map(IpAddr::to_canonical)
            .filter(|ip| service.ip_families.accept(*ip) && is_wanted(ip))
            .collect()
    } else {
        let own = service.vips.iter().filter(|(network, _)| &**network == client.network);
        own.map(|(_, ip)| ip.to_canonical()).filter(is_wanted).collect()
    };
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests;
