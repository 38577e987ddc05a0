//! Chooses the endpoint of a service for a connection.

use std::net::{IpAddr, SocketAddr};

use rand::{Rng, RngExt};

use super::Avoid;
use crate::mesh::{
    Best, Endpoint, Endpoints, Question, Workload,
    services::{HealthPolicy, IpFamilies, LbMode, LbScope, LoadBalancing},
};

/// The rank of an endpoint for a client. Higher ranks come first; `None` excludes the endpoint.
///
/// Preferences count up to the first one that is not met. Another network is the last resort,
/// unless the preferences rank the network themselves.
pub(super) fn rank(client: &Workload, endpoint: &Workload, balancing: &LoadBalancing) -> Option<usize> {
    if !endpoint.healthy && balancing.health_policy == HealthPolicy::OnlyHealthy {
        return None;
    }
    let near = usize::from(endpoint.network == client.network);
    let preferences = &balancing.preferences;
    let met = || preferences.iter().take_while(|&&scope| shares(scope, client, endpoint)).count();
    let met = match balancing.mode {
        LbMode::Standard | LbMode::Passthrough => return Some(near),
        LbMode::Strict => Some(met()).filter(|&met| met == preferences.len())?,
        LbMode::Failover => met(),
    };
    let network_counts = preferences.contains(&LbScope::Network);
    Some(if network_counts { met } else { met + near * (preferences.len() + 1) })
}

fn shares(scope: LbScope, client: &Workload, endpoint: &Workload) -> bool {
    let (a, b) = (&client.locality, &endpoint.locality);
    match scope {
        LbScope::Region => a.region == b.region,
        LbScope::Zone => a.zone == b.zone,
        LbScope::Subzone => a.subzone == b.subzone,
        LbScope::Node => client.node == endpoint.node,
        LbScope::Cluster => client.cluster_id == endpoint.cluster_id,
        LbScope::Network => client.network == endpoint.network,
    }
}

/// With so few endpoints nothing is gained by keeping which are best.
const FEW: usize = 4;

/// How often an endpoint is drawn that is to be avoided, before all are looked at.
const MOST_DRAWS: usize = 8;

/// An endpoint that may be chosen.
pub(super) struct Candidate<T> {
    pub rank: usize,
    /// What is dialled, if that is known.
    pub at: SocketAddr,
    pub way: T,
}

/// Draws one of the best of `endpoints`, by their capacity. `candidate` must depend on nothing that
/// `asked` does not have.
///
/// Where nothing is to be avoided, the cost does not depend on how many there are. An endpoint that
/// is to be avoided is drawn again: those that are not keep their shares. If too many are, or all of
/// the best, all are looked at.
pub(super) fn pick<'a, T>(
    endpoints: &'a Endpoints,
    asked: &Question<'_>,
    candidate: impl Fn(&'a Endpoint) -> Option<Candidate<T>>,
    avoid: &Avoid<'_>,
    rng: &mut impl Rng,
) -> Option<(&'a Endpoint, T)> {
    if endpoints.len() > FEW {
        let find = || {
            Best::of(endpoints.iter().enumerate().filter_map(|(place, endpoint)| {
                Some((place, candidate(endpoint)?.rank, endpoint.workload.capacity))
            }))
        };
        for _ in 0..MOST_DRAWS {
            let endpoint = endpoints.draw(asked, find, rng)?;
            if let Some(Candidate { at, way, .. }) = candidate(endpoint)
                && !avoid.avoids(at)
            {
                return Some((endpoint, way));
            }
        }
    }
    pick_of_all(endpoints, candidate, avoid, rng)
}

/// The same by a look at all of them.
pub(super) fn pick_of_all<'a, T>(
    endpoints: &'a Endpoints,
    candidate: impl Fn(&'a Endpoint) -> Option<Candidate<T>>,
    avoid: &Avoid<'_>,
    rng: &mut impl Rng,
) -> Option<(&'a Endpoint, T)> {
    let candidates = endpoints.iter().filter_map(|endpoint| {
        let Candidate { rank, at, way } = candidate(endpoint)?;
        Some((avoid.rank(rank, at)?, endpoint.workload.capacity, (endpoint, way)))
    });
    choose(candidates, rng)
}

/// Draws one of the best endpoints, with a probability proportional to its weight. An endpoint with
/// weight 0 gets no new connections, unless all of its rank have weight 0. One pass without
/// allocation.
pub(super) fn choose<T>(
    candidates: impl IntoIterator<Item = (usize, u32, T)>,
    rng: &mut impl Rng,
) -> Option<T> {
    let mut best: Option<(usize, T)> = None;
    // For the best rank: the sum of weights so far, and the number of endpoints without weight.
    let (mut total, mut idle) = (0_u64, 0_u64);
    for (rank, weight, candidate) in candidates {
        match &best {
            Some((leader, _)) if rank < *leader => continue,
            Some((leader, _)) if rank == *leader => {}
            _ => (total, idle) = (0, 0),
        }
        let first = total == 0 && idle == 0;
        let takes = if weight > 0 {
            total += u64::from(weight);
            // The first endpoint with a weight replaces those without, because the total is then
            // its own.
            rng.random_range(0..total) < u64::from(weight)
        } else {
            idle += 1;
            total == 0 && rng.random_range(0..idle) == 0
        };
        if first || takes {
            best = Some((rank, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// The address of a workload to use: an allowed one, preferably of the family of `like`.
pub(super) fn address(workload: &Workload, families: IpFamilies, like: IpAddr) -> Option<IpAddr> {
    let usable = workload.addresses.iter().copied().filter(|&ip| families.accept(ip));
    let preferred = |ip: &IpAddr| ip.is_ipv4() == like.is_ipv4();
    usable.clone().find(preferred).or_else(|| usable.clone().next())
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use rand::{SeedableRng, rngs::StdRng};

    use super::*;
    use crate::mesh::tests::workload;

    /// An endpoint by what it has in common with the client, as letters of Network, Cluster,
    /// Region, Zone, Subzone (`s`) and Node (`n`, `c`, `r`, `z`, `s`, `o`).
    fn endpoint(shared: &str) -> Workload {
        let mut endpoint = workload("web-0", "10.0.0.1");
        let common = Arc::make_mut(&mut endpoint.common);
        let differs = |letter| !shared.contains(letter);
        for (letter, field) in [
            ('n', &mut common.network),
            ('c', &mut common.cluster_id),
            ('r', &mut common.locality.region),
            ('z', &mut common.locality.zone),
            ('s', &mut common.locality.subzone),
            ('o', &mut endpoint.node),
        ] {
            if differs(letter) {
                *field = "other".into();
            }
        }
        endpoint
    }

    #[test]
    fn ranks_follow_mode_and_scopes() {
        use {LbMode::*, LbScope::*};
        let client = workload("client", "10.0.0.9");
        let all = "ncrzso";
        for (mode, preferences, common, expected) in [
            // Without a preference only the network tells.
            (Standard, &[][..], all, Some(1)),
            (Standard, &[], "crzso", Some(0)),
            (Standard, &[Zone], "n", Some(1)),
            // Every scope counts for itself.
            (Strict, &[Region], "nr", Some(3)),
            (Strict, &[Region], "nczso", None),
            (Strict, &[Zone], "nz", Some(3)),
            (Strict, &[Zone], "ncrso", None),
            (Strict, &[Subzone], "ns", Some(3)),
            (Strict, &[Subzone], "ncrzo", None),
            (Strict, &[Node], "no", Some(3)),
            (Strict, &[Node], "ncrzs", None),
            (Strict, &[Cluster], "nc", Some(3)),
            (Strict, &[Cluster], "nrzso", None),
            (Strict, &[Network], "n", Some(1)),
            (Strict, &[Network], "crzso", None),
            // Strict needs all of them.
            (Strict, &[Region, Zone], "nr", None),
            (Strict, &[Region, Zone], "nrz", Some(5)),
            // Failover counts from the first; what comes after a miss is worth nothing.
            (Failover, &[Region, Zone, Node], "nrzo", Some(7)),
            (Failover, &[Region, Zone, Node], "nrz", Some(6)),
            (Failover, &[Region, Zone, Node], "nro", Some(5)),
            (Failover, &[Region, Zone, Node], "nzo", Some(4)),
            // Another network comes after everything here ...
            (Failover, &[Region, Zone, Node], "rzo", Some(3)),
            // ... unless it is ranked itself: first,
            (Failover, &[Network, Region], "nr", Some(2)),
            (Failover, &[Network, Region], "n", Some(1)),
            (Failover, &[Network, Region], "r", Some(0)),
            // or behind something else.
            (Failover, &[Region, Network], "r", Some(1)),
            (Failover, &[Region, Network], "n", Some(0)),
            (Passthrough, &[Zone], "n", Some(1)),
        ] {
            let balancing =
                LoadBalancing { preferences: preferences.to_vec(), mode, ..LoadBalancing::default() };
            let found = rank(&client, &endpoint(common), &balancing);
            assert_eq!(found, expected, "{mode:?} {preferences:?}, in common: {common}");
        }
    }

    #[test]
    fn health_counts_unless_all_are_allowed() {
        let client = workload("client", "10.0.0.9");
        let ill = Workload { healthy: false, ..workload("web-0", "10.0.0.1") };
        let mut balancing = LoadBalancing::default();
        assert_eq!(rank(&client, &ill, &balancing), None);
        balancing.health_policy = HealthPolicy::AllowAll;
        assert_eq!(rank(&client, &ill, &balancing), Some(1));
    }

    fn counted(candidates: &[(usize, u32, char)]) -> HashMap<char, u32> {
        let mut rng = StdRng::seed_from_u64(1);
        let mut count = HashMap::new();
        for _ in 0..8000 {
            if let Some(chosen) = choose(candidates.iter().copied(), &mut rng) {
                *count.entry(chosen).or_default() += 1;
            }
        }
        count
    }

    #[test]
    fn the_best_share_by_weight_and_the_others_get_nothing() {
        for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]] {
            let all = [(1, 1, 'a'), (1, 3, 'b'), (1, 0, 'c'), (0, 100, 'd'), (1, 4, 'e')];
            let count = counted(&order.map(|n: usize| all[n]));
            assert_eq!(count.len(), 3, "{count:?}");
            for (who, share) in [('a', 1000), ('b', 3000), ('e', 4000)] {
                assert!(count[&who].abs_diff(share) < 200, "{count:?}");
            }
        }
    }

    #[test]
    fn weights_that_are_all_zero_exclude_nobody_of_the_best() {
        let count = counted(&[(0, 9, 'x'), (1, 0, 'a'), (1, 0, 'b')]);
        assert!(count[&'a'].abs_diff(4000) < 300 && count.len() == 2, "{count:?}");
        assert!(counted(&[]).is_empty());
    }
}
