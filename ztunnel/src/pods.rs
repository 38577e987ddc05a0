//! The pods that this process serves. ZDS ([`zds`]) names them; every worker listens in their netns
//! ([`listeners`]).
//!
//! This file keeps the list: pods that are served, and pods that could not be started and are
//! retried.

mod handover;
mod sys;
pub mod zds;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, atomic::AtomicBool},
};

use adit_netns::{Netns, NetnsId};
use serde_json::json;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::handover::{Handover, local_pod};
use crate::{
    backoff::Backoff,
    budget::PodBudget,
    config::ProxyMode,
    context::ProcessContext,
    dns::{Dns, sockets},
    mesh::LocalPod,
    pod::{Deletion, OwnAddress, PodInfo, ServedPod},
    policy::PodProtection,
    socket,
    worker::{
        Workers,
        listeners::{self, ListenPort},
    },
};

/// The uid of the workload in dedicated mode.
const DEDICATED: &str = "dedicated";

/// A pod whose listeners could not be opened, or that another tunnel serves still.
#[derive(Debug)]
struct Pending {
    info: PodInfo,
    netns: OwnedFd,
    handover: Option<Handover>,
    backoff: Backoff,
    next: Instant,
}

/// All pods of this process. Its only writer is the ZDS client.
#[derive(Debug)]
pub struct ServedPods {
    process: Arc<ProcessContext>,
    workers: Workers,
    /// Unless it is switched off.
    dns: Option<Dns>,
    running: HashMap<String, Arc<ServedPod>>,
    /// The tunnel's own pod. The node agent neither adds nor removes it.
    own: Option<Arc<ServedPod>>,
    pending: HashMap<String, Pending>,
    /// Counts the snapshots of the mesh, which tells who the pods are.
    mesh_changes: watch::Receiver<u64>,
    /// The tasks that keep the pods' protection up to date.
    followers: JoinSet<()>,
    stop: CancellationToken,
    /// Name and state of each, by uid.
    published: watch::Sender<BTreeMap<String, serde_json::Value>>,
}

impl ServedPods {
    /// `stop` ends all of them.
    #[must_use]
    pub fn new(
        process: Arc<ProcessContext>,
        workers: Workers,
        dns: Option<Dns>,
        stop: CancellationToken,
    ) -> Self {
        let mesh_changes = process.store.subscribe();
        let (running, pending, published) = (HashMap::new(), HashMap::new(), watch::Sender::default());
        let followers = JoinSet::new();
        Self { process, workers, dns, running, own: None, pending, mesh_changes, followers, stop, published }
    }

    /// The pods as shown to operators. Each call returns the current state.
    #[must_use]
    pub fn view(&self) -> Arc<dyn Fn() -> serde_json::Value + Send + Sync> {
        let view = self.published.subscribe();
        Arc::new(move || json!(*view.borrow()))
    }

    /// Serves `uid` in `netns`. A second call for the same netns changes nothing. Another netns
    /// replaces the old one, whose connections finish. A failed start is retried until it works or
    /// the pod is removed. A pod that another tunnel serves may wait, see [`handover`].
    ///
    /// # Errors
    /// Why the first start failed.
    pub fn add(&mut self, uid: &str, info: PodInfo, netns: OwnedFd) -> io::Result<()> {
        let id = NetnsId::of(&netns)?;
        if self.running.get(uid).is_some_and(|pod| pod.netns.id() == id && pod.info == info) {
            return Ok(());
        }
        self.remove(uid);
        let again = netns.try_clone()?;
        let (namespace, account) = (Arc::clone(&info.namespace), Arc::clone(&info.service_account));
        let _account = self.process.certificates.lease(namespace, account);
        // While the listeners are opened.
        self.prefetch_certificates(Some(&local_pod(&self.process, &info)));
        let handover = Handover::new(&self.process, &info);
        let awaited = handover.as_ref().and_then(|handover| handover.awaits(&self.process, again.as_fd()));
        let started = if let Some(lack) = &awaited {
            info!(pod.uid = uid, pod.name = %info.name, lack, "another tunnel serves the pod until this one can");
            Ok(())
        } else {
            self.start(uid, info.clone(), netns)
        };
        if let Err(error) = &started {
            warn!(pod.uid = uid, %error, "cannot serve the pod yet");
        }
        if awaited.is_some() || started.is_err() {
            let (handover, mut backoff) = match awaited {
                Some(_) => (handover, Backoff::up_to(handover::LONGEST_PAUSE)),
                None => (None, Backoff::new()),
            };
            let next = Instant::now() + backoff.delay();
            self.pending.insert(uid.to_owned(), Pending { info, netns: again, handover, backoff, next });
            self.prefetch_certificates(None);
        } else {
            self.process.metrics.pods.started.inc();
        }
        self.publish(uid);
        started
    }

    /// Stops serving `uid`, if it was served.
    pub fn remove(&mut self, uid: &str) {
        self.pending.remove(uid);
        if let Some(pod) = self.running.remove(uid) {
            info!(pod.uid = uid, pod.name = %pod.info.name, "pod removed");
            self.process.served.remove(&pod);
            pod.stop.cancel();
            self.process.metrics.pods.stopped.inc();
        }
        self.publish(uid);
    }

    /// Stops serving all pods except `seen`.
    pub fn keep_only(&mut self, seen: &HashSet<String>) {
        let known = self.running.keys().chain(self.pending.keys());
        let gone: Vec<String> = known.filter(|uid| !seen.contains(*uid)).cloned().collect();
        for uid in gone {
            self.remove(&uid);
        }
    }

    pub(crate) fn knows(&self, uid: &str) -> bool {
        self.running.contains_key(uid) || self.pending.contains_key(uid)
    }

    /// Whether every pod that was handed over is served.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.pending.is_empty()
    }

    /// Waits for something to do, and does it: a failed start is due, or the mesh has changed and
    /// may tell more of who the pods are.
    pub async fn upkeep(&mut self) {
        let due = self.pending.iter().min_by_key(|(_, pending)| pending.next);
        let due = due.map(|(uid, pending)| (uid.clone(), pending.next));
        let retry = async {
            match due {
                Some((uid, next)) => {
                    sleep_until(next).await;
                    uid
                }
                None => std::future::pending().await,
            }
        };
        let uid = tokio::select! {
            uid = retry => uid,
            Ok(()) = self.mesh_changes.changed() => return self.prefetch_certificates(None),
        };
        let Some(mut pending) = self.pending.remove(&uid) else { return };
        let handover = pending.handover.as_ref();
        let started = match handover.and_then(|it| it.awaits(&self.process, pending.netns.as_fd())) {
            Some(lack) => Err(io::Error::other(lack)),
            None => pending.netns.try_clone().and_then(|netns| self.start(&uid, pending.info.clone(), netns)),
        };
        if let Err(error) = started {
            tracing::debug!(pod.uid = uid, %error, "still cannot serve the pod");
            pending.next = Instant::now() + pending.backoff.delay();
            self.pending.insert(uid.clone(), pending);
        } else {
            self.process.metrics.pods.started.inc();
        }
        self.publish(&uid);
    }

    /// Waits until all connections have ended. Call it after `stop` was cancelled.
    pub async fn finish(self) {
        let dns = async {
            if let Some(dns) = self.dns {
                dns.finish().await;
            }
        };
        tokio::join!(self.workers.finish(), dns);
    }

    fn start(&mut self, uid: &str, info: PodInfo, netns: OwnedFd) -> io::Result<()> {
        let pod = self.listen(uid, info, Netns::new(netns)?, &listeners::ALL, None)?;
        info!(pod.uid = uid, pod.name = %pod.info.name, pod.namespace = %pod.info.namespace,
            pod.service_account = %pod.info.service_account, "pod added");
        self.process.served.add(&pod);
        self.running.insert(uid.to_owned(), pod);
        self.prefetch_certificates(None);
        Ok(())
    }

    /// Serves the tunnel's own pod, so that its metrics are available over HBONE and under policy.
    ///
    /// # Errors
    /// Its port cannot be listened at.
    pub fn serve_own(&mut self, info: PodInfo) -> io::Result<()> {
        let netns = Netns::current()?;
        let metrics = self.process.config.stats_address.port();
        let pod = self.listen("own", info, netns, &[ListenPort::Hbone], Some(metrics))?;
        info!(pod.name = %pod.info.name, pod.namespace = %pod.info.namespace,
            pod.service_account = %pod.info.service_account, port = metrics, "own metrics are served over HBONE");
        self.own = Some(pod);
        self.prefetch_certificates(None);
        Ok(())
    }

    /// Serves the one workload of a dedicated tunnel, in the netns of this process. It is a reason
    /// not to start if that cannot be done.
    ///
    /// # Errors
    /// A port cannot be listened at.
    pub fn serve_here(&mut self, info: PodInfo) -> io::Result<()> {
        let netns = File::open("/proc/thread-self/ns/net")?.into();
        self.start(DEDICATED, info, netns)?;
        self.process.metrics.pods.started.inc();
        self.publish(DEDICATED);
        Ok(())
    }

    fn listen(
        &mut self,
        uid: &str,
        info: PodInfo,
        netns: Netns,
        ports: &[ListenPort],
        own_port: Option<u16>,
    ) -> io::Result<Arc<ServedPod>> {
        let config = &self.process.config;
        let mut socket = self.process.socket.clone();
        let (listeners, names) = netns.enter(|| {
            if socket::mark_stays_local(socket.mark) {
                socket.mark = 0;
            }
            let listeners = listeners::open(ports, self.workers.count(), config, &socket)?;
            // DNS queries of the tunnel's own pod are not captured.
            let dns = self.dns.as_ref().filter(|_| own_port.is_none());
            let names = dns.map(|_| sockets::listen(config.dns.address, config.ipv6, &socket));
            Ok((listeners, names))
        })?;
        let local = local_pod(&self.process, &info);
        let (namespace, service_account) = (Arc::clone(&info.namespace), Arc::clone(&info.service_account));
        let account = self.process.certificates.lease(namespace, service_account);
        let (uid, stop, end) = (uid.to_owned(), self.stop.child_token(), self.stop.clone());
        let protection = PodProtection::default();
        let budget = PodBudget::new(&config.budget, &self.process.descriptors);
        // The netns, the listeners, and DNS over UDP and TCP, for two families.
        let descriptors = budget.descriptors.take_anyway(1 + ports.len() * self.workers.count() + 4);
        let memory = self.process.memory.of_pod(config.memory.pod_bytes);
        let pod = Arc::new(ServedPod {
            uid,
            info,
            local,
            _account: account,
            netns,
            own_address: OwnAddress::default(),
            deletion: Deletion::default(),
            socket,
            memory,
            own_port,
            from_agent: self.process.config.mode == ProxyMode::Shared && own_port.is_none(),
            was_told: AtomicBool::new(false),
            protection,
            budget,
            _descriptors: descriptors,
            stop,
            end,
        });
        // Each ends by itself when its pod is gone.
        while self.followers.try_join_next().is_some() {}
        let (store, trust) = (Arc::clone(&self.process.store), Arc::clone(&self.process.trust));
        self.followers.spawn(ServedPod::follow_policies(store, trust, Arc::downgrade(&pod)));
        self.workers.serve(&pod, listeners)?;
        // DNS is optional, connections are not: a pod whose DNS port is in use is served without
        // DNS.
        match (&self.dns, names) {
            (Some(dns), Some(Ok(names))) => dns.serve(&pod, names)?,
            (_, Some(Err(error))) => {
                warn!(pod.uid, address = %config.dns.address, %error, "cannot serve the pod's DNS");
            }
            _ => {}
        }
        Ok(pod)
    }

    /// Updates the state of `uid` that operators see.
    fn publish(&self, uid: &str) {
        let gauges = &self.process.metrics.pods;
        gauges.active.set(self.running.len().try_into().unwrap_or(i64::MAX));
        gauges.pending.set(self.pending.len().try_into().unwrap_or(i64::MAX));
        let up = self.running.get(uid).map(|pod| (&pod.info, "Up"));
        let shown = up.or_else(|| self.pending.get(uid).map(|pending| (&pending.info, "Pending")));
        self.published.send_modify(|published| match shown {
            Some((PodInfo { name, namespace, service_account }, state)) => {
                let info = json!({ "name": &**name, "namespace": &**namespace, "serviceAccount": &**service_account });
                published.insert(uid.to_owned(), json!({ "state": state, "info": info }));
            }
            None => drop(published.remove(uid)),
        });
    }

    /// Has the certificates of the pods, and of the one that is `coming`, fetched ahead, so that the
    /// first connection does not wait. A dedicated tunnel fetches only its own, when it needs it.
    fn prefetch_certificates(&self, coming: Option<&LocalPod>) {
        if self.process.config.mode != ProxyMode::Shared {
            return;
        }
        let mesh = self.process.store.snapshot();
        let running = self.running.values().chain(&self.own).map(|pod| &pod.local);
        let awaited = self.pending.values().filter_map(|pending| Some(&pending.handover.as_ref()?.local));
        let workloads = running.chain(awaited).chain(coming).filter_map(|pod| mesh.workload_of(pod));
        let told = workloads.map(|workload| workload.identity()).collect();
        // Before everything was told once, nobody knows what is not.
        let is_known = self.process.store.is_known();
        let coming = coming.filter(|_| is_known).and_then(|pod| mesh.newcomer(pod));
        let coming = coming.map(|workload| workload.identity());
        let new = self.running.values().filter(|_| is_known).filter_map(|pod| pod.newcomer(&mesh));
        let new = new.map(|workload| workload.identity()).chain(coming.clone()).collect();
        self.process.certificates.serve(&told, &new);
        if let Some(coming) = &coming {
            self.process.certificates.expect_newcomer(coming);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_a_quarter_minute() {
        let mut backoff = Backoff::new();
        let delays: Vec<u128> = (0..13).map(|_| backoff.delay().as_millis()).collect();
        assert_eq!(delays[..4], [10, 20, 40, 80]);
        assert_eq!(delays[11..], [15000, 15000]);
    }
}
