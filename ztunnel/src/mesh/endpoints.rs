//! The endpoints of a service at one moment, and what was found out about them for clients.
//!
//! Which of them are best for a client, and by which weights they share its connections, depends on
//! the endpoints, the service, and where the client is: on nothing that changes from one connection
//! to the next. So it is found out once, by the first connection after a push that changed the
//! endpoints, and is kept with them. All pods of a node are mostly one client.

use std::{ops::Deref, sync::Arc};

use arc_swap::ArcSwapOption;
use rand::{Rng, RngExt as _};

use super::{
    Service, Workload,
    services::PortMap,
    workloads::{Common, Locality},
};

/// How many questions are kept for one service. Beyond it, the first ones are asked again.
const MOST: usize = 16;

/// A workload as an endpoint of one service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its own target ports.
    pub(super) ports: Arc<PortMap>,
}

impl Endpoint {
    /// Its target ports, as far as the control plane says them.
    pub(crate) fn own_ports(&self) -> &PortMap {
        &self.ports
    }

    /// The port at which this endpoint serves `port` of its service. `None`: it does not serve it.
    #[must_use]
    pub fn target_port(&self, service: &Service, port: u16) -> Option<u16> {
        // Only ports of the service are valid. The workload's own mapping wins; a mapping to 0 uses
        // the service's.
        let target = service.ports.get(&port).copied()?;
        let own = self.ports.get(&port).copied().filter(|&own| own != 0);
        own.or_else(|| (target != 0).then_some(target))
    }
}

/// All endpoints of a service, healthy or not, unordered.
#[derive(Debug, Default)]
pub struct Endpoints {
    all: Vec<Endpoint>,
    /// Answers about exactly these.
    answers: ArcSwapOption<Vec<Arc<Answer>>>,
}

/// Without the answers: who copies them is about to change them.
impl Clone for Endpoints {
    fn clone(&self) -> Self {
        Self { all: self.all.clone(), answers: ArcSwapOption::empty() }
    }
}

impl Deref for Endpoints {
    type Target = [Endpoint];

    fn deref(&self) -> &[Endpoint] {
        &self.all
    }
}

/// What decides which endpoints are best.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// How it wants its endpoints chosen.
    pub service: &'a Arc<Service>,
    /// Who wants to connect: only where it is counts.
    pub client: &'a Workload,
    /// The port of the service.
    pub port: u16,
    /// The family of the address that was dialled.
    pub is_ipv4: bool,
    /// What they are wanted for.
    pub purpose: Purpose,
}

/// What endpoints are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be connected to.
    Server,
    /// To carry the connection on, in the client's network.
    GatewayHere,
    /// The same, in any network.
    GatewayAnywhere,
}

#[derive(Debug)]
struct Answer {
    service: Arc<Service>,
    network: Arc<str>,
    cluster_id: Arc<str>,
    node: Arc<str>,
    locality: Locality,
    port: u16,
    is_ipv4: bool,
    purpose: Purpose,
    best: Best,
}

impl Answer {
    fn new(asked: &Question<'_>, best: Best) -> Self {
        let Question { service, client, port, is_ipv4, purpose } = *asked;
        let Common { network, cluster_id, locality, .. } = &*client.common;
        Self {
            service: Arc::clone(service),
            network: Arc::clone(network),
            cluster_id: Arc::clone(cluster_id),
            node: Arc::clone(&client.node),
            locality: locality.clone(),
            port,
            is_ipv4,
            purpose,
            best,
        }
    }

    fn is_to(&self, asked: &Question<'_>) -> bool {
        let Question { service, client, port, is_ipv4, purpose } = *asked;
        Arc::ptr_eq(&self.service, service)
            && self.port == port
            && self.is_ipv4 == is_ipv4
            && self.purpose == purpose
            && self.node == client.node
            && self.network == client.network
            && self.cluster_id == client.cluster_id
            && self.locality == client.locality
    }
}

/// The best endpoints for a client, with their shares.
#[derive(Clone, Debug, Default)]
pub struct Best {
    /// Their indices.
    places: Box<[u32]>,
    /// The sum of weights up to each of them. Empty: all weigh the same.
    sums: Box<[u64]>,
}

impl Best {
    /// Of endpoints with index, rank and weight: those of the highest rank, by their weights. Those
    /// of weight 0 count only if all of that rank have weight 0.
    pub fn of(candidates: impl IntoIterator<Item = (usize, usize, u32)>) -> Self {
        let mut best: Vec<(u32, u32)> = Vec::new();
        let mut leader = 0;
        for (place, rank, weight) in candidates {
            if rank > leader || best.is_empty() {
                best.clear();
                leader = rank;
            }
            if rank == leader
                && let Ok(place) = u32::try_from(place)
            {
                best.push((place, weight));
            }
        }
        if best.iter().any(|(_, weight)| *weight > 0) {
            best.retain(|(_, weight)| *weight > 0);
        }
        let places = best.iter().map(|(place, _)| *place).collect();
        let same = best.iter().all(|(_, weight)| *weight == best[0].1);
        let sums = best.iter().filter(|_| !same).scan(0_u64, |sum, (_, weight)| {
            *sum += u64::from(*weight);
            Some(*sum)
        });
        Self { places, sums: sums.collect() }
    }

    /// One of them, with a probability proportional to its weight.
    pub fn draw(&self, rng: &mut impl Rng) -> Option<usize> {
        let drawn = match self.sums.last() {
            Some(total) => {
                let at = rng.random_range(0..*total);
                self.sums.partition_point(|sum| *sum <= at)
            }
            None if self.places.len() > 1 => rng.random_range(0..self.places.len()),
            None => 0,
        };
        self.places.get(drawn).map(|place| *place as usize)
    }
}

impl Endpoints {
    /// Of a service without any.
    pub(super) fn none<'a>() -> &'a Self {
        static NONE: Endpoints = Endpoints { all: Vec::new(), answers: ArcSwapOption::const_empty() };
        &NONE
    }

    pub(super) fn add(&mut self, workload: &Arc<Workload>, ports: &Arc<PortMap>) {
        self.change().push(Endpoint { workload: Arc::clone(workload), ports: Arc::clone(ports) });
    }

    pub(super) fn remove(&mut self, workload: &Arc<Workload>) {
        let place = self.all.iter().position(|endpoint| Arc::ptr_eq(&endpoint.workload, workload));
        if let Some(place) = place {
            self.change().swap_remove(place);
        }
    }

    fn change(&mut self) -> &mut Vec<Endpoint> {
        self.answers.store(None);
        &mut self.all
    }

    /// Draws one of the best endpoints, which `find` finds out if nobody has asked yet.
    pub fn draw(
        &self,
        asked: &Question<'_>,
        find: impl FnOnce() -> Best,
        rng: &mut impl Rng,
    ) -> Option<&Endpoint> {
        let known = self.answers.load();
        let answer = known.iter().flat_map(|all| all.iter()).find(|answer| answer.is_to(asked));
        let place = if let Some(answer) = answer {
            answer.best.draw(rng)
        } else {
            let answer = Arc::new(Answer::new(asked, find()));
            self.keep(&answer);
            answer.best.draw(rng)
        };
        self.all.get(place?)
    }

    fn keep(&self, answer: &Arc<Answer>) {
        self.answers.rcu(|known| {
            let known: &[_] = known.as_ref().map_or(&[], |known| known);
            let kept = &known[known.len().saturating_sub(MOST - 1)..];
            Some(Arc::new(kept.iter().chain([answer]).cloned().collect::<Vec<_>>()))
        });
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;
    use crate::mesh::tests::{service, workload};

    fn asked<'a>(service: &'a Arc<Service>, client: &'a Workload, port: u16) -> Question<'a> {
        Question { service, client, port, is_ipv4: true, purpose: Purpose::Server }
    }

    fn endpoints(count: usize) -> Endpoints {
        let mut endpoints = Endpoints::default();
        for n in 0..count {
            endpoints.add(&Arc::new(workload(&format!("web-{n}"), "10.0.0.1")), &Arc::default());
        }
        endpoints
    }

    #[test]
    fn an_answer_is_found_out_once_until_the_endpoints_or_the_question_change() {
        let (web, client) = (Arc::new(service("web", "10.96.0.1")), workload("client", "10.0.9.9"));
        let mut rng = StdRng::seed_from_u64(1);
        let mut endpoints = endpoints(3);
        let found = std::cell::Cell::new(0);
        let mut ask = |endpoints: &Endpoints, asked: Question<'_>| {
            let find = || {
                found.set(found.get() + 1);
                Best::of([(1, 0, 1)])
            };
            let name = endpoints.draw(&asked, find, &mut rng).unwrap().workload.name.to_string();
            assert_eq!(name, "web-1");
            found.take()
        };
        assert_eq!(ask(&endpoints, asked(&web, &client, 80)), 1);
        assert_eq!(ask(&endpoints, asked(&web, &client, 80)), 0);
        let sibling = workload("other", "10.0.9.8");
        assert_eq!(ask(&endpoints, asked(&web, &sibling, 80)), 0, "it is where the client is");
        assert_eq!(ask(&endpoints, asked(&web, &client, 81)), 1);
        let elsewhere = Workload { node: "node-b".into(), ..client.clone() };
        assert_eq!(ask(&endpoints, asked(&web, &elsewhere, 80)), 1);
        let updated = Arc::new(service("web", "10.96.0.1"));
        assert_eq!(ask(&endpoints, asked(&updated, &client, 80)), 1, "it may balance otherwise now");
        assert_eq!(ask(&endpoints, Question { is_ipv4: false, ..asked(&web, &client, 80) }), 1);
        let gateway = Question { purpose: Purpose::GatewayHere, ..asked(&web, &client, 80) };
        assert_eq!(ask(&endpoints, gateway), 1);
        assert_eq!(ask(&endpoints, asked(&web, &client, 80)), 0);
        assert_eq!(ask(&endpoints.clone(), asked(&web, &client, 80)), 1);
        let last = Arc::clone(&endpoints[2].workload);
        endpoints.remove(&last);
        assert_eq!(ask(&endpoints, asked(&web, &client, 80)), 1);
    }

    #[test]
    fn only_so_many_answers_are_kept() {
        let (web, client) = (Arc::new(service("web", "10.96.0.1")), workload("client", "10.0.9.9"));
        let mut rng = StdRng::seed_from_u64(1);
        let endpoints = endpoints(1);
        for port in 0..1000 {
            endpoints.draw(&asked(&web, &client, port), || Best::of([(0, 0, 1)]), &mut rng).unwrap();
        }
        assert_eq!(endpoints.answers.load().as_ref().unwrap().len(), MOST);
    }

    #[test]
    fn the_best_rank_shares_by_weight_and_nobody_is_nobody() {
        let mut rng = StdRng::seed_from_u64(1);
        for (candidates, shares) in [
            (&[(0, 1, 1), (1, 1, 3), (2, 1, 0), (3, 0, 100), (4, 1, 4)][..], [1000, 3000, 0, 0, 4000]),
            (&[(0, 0, 9), (1, 1, 0), (3, 1, 0)], [0, 4000, 0, 4000, 0]),
            (&[(2, 7, 5), (4, 7, 5)], [0, 0, 4000, 0, 4000]),
            (&[(3, 0, 1)], [0, 0, 0, 8000, 0]),
        ] {
            let best = Best::of(candidates.iter().copied());
            let mut count = [0_u32; 5];
            for _ in 0..8000 {
                count[best.draw(&mut rng).unwrap()] += 1;
            }
            for (drawn, share) in count.into_iter().zip(shares) {
                assert!(drawn.abs_diff(share) < 250 && (share > 0 || drawn == 0), "{count:?} {shares:?}");
            }
        }
        assert_eq!(Best::of([]).draw(&mut rng), None);
    }
}
