//! The loop that owns all state: looks, compares, acts, and answers.
//!
//! * `pods`: the pods that the source told of, and what is known of each
//! * `observe`: what is there of them
//! * `apply`: from what was seen to steps, and doing them
//! * `prepare`: netns made ready for steering
//! * `tunnels`: which tunnels are connected, and which pods each acknowledged
//! * `draining`: netns of pods that left, while connections still need them
//! * `app_listeners`: the ports that applications listen on
//! * `answers`: answers to commands
//! * `config`: what it was told to do
//!
//! Everything runs on one thread, so nothing here needs a lock.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use adit_ebpf_common::{address::UNSPECIFIED, pods::flag, settings::Settings};
use adit_ebpf_loader::Kernel;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing::{error, info, warn};

use crate::{
    apply::{journal::Records, zds_server},
    control,
    metrics::{self, Metrics},
    model::error_chain::chain,
    model::exclusions::Exclusions,
    observe::{
        cgroups::{self, CgroupId},
        events::{self, SourceKind},
        netns::{self, NetnsId, Visitors},
    },
    plan::{HBONE_PORT, INBOUND_PORT, NAMES_PORT, OUTBOUND_PORT, Plan, Reason, address16},
    source::{Outcome, Outcomes, Source},
};

mod answers;
mod app_listeners;
mod apply;
mod config;
mod draining;
mod error;
mod observe;
mod pods;
mod prepare;
mod tunnels;

use self::pods::Pods;

pub(crate) use self::error::cannot;
pub use self::{answers::TraceLine, config::Config, error::NodeError};

/// How many events are taken before they are acted on.
const EVENTS_AT_ONCE: usize = 4096;
/// After a restart the tunnel's pods count as served for so long without it: tunnels try to connect
/// again at least every 15 s, and carry on meanwhile. Counted from the first word of the source, before which no
/// tunnel can be told of a pod.
const ADOPTION: Duration = Duration::from_secs(20);

/// Now, as people and other programs count it.
fn unix_secs() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs())
}

/// What a predecessor left, while the tunnel has not come back yet.
#[derive(Debug)]
struct Adopted {
    /// Netns that a tunnel served, by cookie.
    ready: BTreeSet<u64>,
    tunnels: BTreeSet<CgroupId>,
    until: Instant,
}

/// What has to be done, and for whom.
#[derive(Debug, Default)]
struct Dirty {
    /// Pods to look at, and then to act on.
    look: BTreeSet<String>,
    /// Pods to act on.
    act: BTreeSet<String>,
    /// Everything is compared with what is applied.
    all: bool,
}

/// What was told, and what had to be found.
#[derive(Clone, Copy, Debug, Default)]
struct EventCounts {
    source: Option<SourceKind>,
    told: u64,
    lost: u64,
    /// Since the last scan.
    lost_some: bool,
    /// What a scan found to be otherwise than events had told.
    corrections: u64,
}

/// All state of the node.
struct Node {
    config: Config,
    kernel: Kernel,
    records: Records,
    settings: Settings,
    /// Netns that no pod may claim.
    host: BTreeSet<NetnsId>,
    visitors: Visitors,
    own_cgroup: Option<PathBuf>,
    source_name: String,
    source_error: Option<String>,
    /// Since when the source has been usable, or not.
    source_since: u64,
    listener: Option<mpsc::UnboundedSender<(String, Option<Outcome>)>>,
    outcomes: Outcomes,
    pods: Pods,
    /// Directories of pods that are found by their uid.
    places: BTreeMap<String, PathBuf>,
    dirty: Dirty,
    events: EventCounts,
    metrics: Arc<Metrics>,
    /// Netns that were opened when their pods were looked at, by cookie, until they were acted on.
    opened: BTreeMap<u64, Arc<OwnedFd>>,
    unlisted: app_listeners::Unlisted,
    /// When everything is compared again, since something could not be done.
    all_due: Option<Instant>,
    /// Whether other directories may have to be watched.
    dirs_changed: bool,
    /// Pods by the ids of their cgroups.
    by_cgroup: HashMap<CgroupId, String>,
    applied: Plan,
    /// Pods that something was done for, until it is noted what became of them.
    to_note: BTreeSet<String>,
    /// What could not be done for the node as a whole.
    unsettled: Vec<String>,
    last_policy: u32,
    adopted: Option<Adopted>,
    tunnels: tunnels::Tunnels,
    lingering: BTreeMap<u64, draining::Lingering>,
    tracing: Option<answers::Tracing>,
}

/// Runs until a signal or a `detach` request ends it.
pub async fn run(config: Config, mut source: Source) -> Result<(), NodeError> {
    fs::create_dir_all(&config.run_dir)
        .map_err(cannot(format!("make the run directory {}", config.run_dir.display())))?;
    let mut stop = signal(SignalKind::terminate()).map_err(cannot("handle SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot("handle SIGINT"))?;
    let metrics = Arc::new(Metrics::new());
    let _http = serve_metrics(config.metrics_address, &metrics).await?;
    // The sockets first: a second watcher of this node must end before it touches anything.
    let (asked_sender, mut asked) = mpsc::channel(16);
    let control =
        control::Server::bind(&config.status_socket, asked_sender).map_err(cannot("serve commands"))?;
    let (zds_sender, mut zds_events) = mpsc::unbounded_channel();
    let zds = zds_server::Server::bind(&config.zds_socket, zds_sender).map_err(cannot("serve tunnels"))?;

    let mut node = Node::new(config, &source, metrics)?;
    // Before the first look: what happens after it is told.
    let mut events =
        events::open(node.config.events, &mut node.kernel, &node.config.attach, &node.config.cgroup_root)
            .map_err(|reason| NodeError::Events { reason })?;
    node.events.source = Some(events.kind());
    info!(node = node.config.node, attached = %node.config.attach.display(), "watching");

    let mut next_scan = Instant::now() + node.config.rescan;
    let detach = loop {
        let cause = if Instant::now() >= next_scan || std::mem::take(&mut node.events.lost_some) {
            next_scan = Instant::now() + node.config.rescan;
            node.repair();
            observe::Cause::Scan
        } else {
            observe::Cause::Event
        };
        node.look(cause);
        if cause == observe::Cause::Scan {
            node.scan_steered();
        }
        node.act();
        if node.is_ready() {
            node.tunnels.welcome(&node.applied.workloads);
        }
        // Telling comes after doing: a pod that a tunnel has just taken need not be told of as waiting for it.
        if zds_events.is_empty() && source.updates.is_empty() {
            node.note_states();
        }
        node.metrics.set_tunnels(node.tunnels.len());
        node.metrics.set_ready(node.is_ready());
        if events.wants_dirs() && std::mem::take(&mut node.dirs_changed) {
            events.watch(&node.watched());
        }
        let wake = node.wake(next_scan);
        tokio::select! {
            _ = stop.recv() => break node.config.detach,
            _ = interrupt.recv() => break node.config.detach,
            Some(event) = zds_events.recv() => node.on_tunnel(event),
            event = events::next(events.as_mut()) => node.on_event(event),
            update = source.updates.recv() => match update {
                Some(update) => node.take(update),
                None => return Err(NodeError::SourceEnded { source_name: node.source_name }),
            },
            Some(asked) = asked.recv() => {
                if let Some(waiting) = node.answer(asked) {
                    let result = node.detach(&mut zds_events).await;
                    source.farewell().await;
                    waiting.give(&match &result {
                        Ok(()) => control::Answer::Ok(()),
                        Err(error) => control::Answer::Error(error.to_string()),
                    });
                    // Let the answer leave before the runtime goes.
                    let _ = tokio::time::timeout(Duration::from_secs(1), waiting.closed()).await;
                    drop((zds, control));
                    return result;
                }
            }
            () = answers::Tracing::ready(&mut node.tracing) => node.pass_trace_on(),
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        // What is there already is one batch: sixty acknowledgements need not be sixty rounds.
        while let Ok(event) = zds_events.try_recv() {
            node.on_tunnel(event);
        }
        while let Ok(update) = source.updates.try_recv() {
            node.take(update);
        }
        for _ in 0..EVENTS_AT_ONCE {
            let Some(event) = events::ready(events.as_mut()) else { break };
            node.on_event(event);
        }
    };
    node.stop_tracing();
    let result = if detach {
        let result = node.detach(&mut zds_events).await;
        source.farewell().await;
        result
    } else {
        Ok(())
    };
    drop((zds, control));
    if detach {
        info!("everything undone");
    } else {
        info!("stopped, links and maps stay: running traffic continues");
    }
    result
}

async fn serve_metrics(
    address: Option<SocketAddr>,
    metrics: &Arc<Metrics>,
) -> Result<Option<metrics::Server>, NodeError> {
    let Some(address) = address else { return Ok(None) };
    let server = metrics::Server::bind(address, Arc::clone(metrics)).await;
    server.map(Some).map_err(cannot(format!("serve metrics at {address}")))
}

impl Node {
    fn new(config: Config, source: &Source, metrics: Arc<Metrics>) -> Result<Self, NodeError> {
        let records = Records::open(&config.run_dir).map_err(cannot("read what an earlier run noted"))?;
        let kernel_error = |what| move |source| NodeError::Kernel { what, source };
        let mut kernel = Kernel::open(&config.pins).map_err(kernel_error("load the programs and maps"))?;
        let before = kernel.settings().map_err(kernel_error("read the settings"))?;
        let mut resolvers = [UNSPECIFIED; 3];
        for (place, resolver) in resolvers.iter_mut().zip(&config.dns_resolvers) {
            *place = address16(*resolver);
        }
        let settings = Settings {
            outbound_port: OUTBOUND_PORT,
            inbound_port: INBOUND_PORT,
            hbone_port: HBONE_PORT,
            tunnel_up: before.tunnel_up,
            debug: 0,
            debug_port: 0,
            debug_address: UNSPECIFIED,
            resolvers,
            names_port: NAMES_PORT,
            pad: 0,
        };
        kernel.set_settings(&settings).map_err(kernel_error("write the settings"))?;

        let cgroups = kernel.cgroups().map_err(kernel_error("read the cgroups' map"))?;
        let addresses = kernel.pods().map_err(kernel_error("read the pods' map"))?;
        let mut applied = Plan {
            cgroups: cgroups.into_iter().collect(),
            addresses: addresses.into_iter().collect(),
            ..Plan::default()
        };
        let policy_ids: BTreeSet<u32> = applied
            .cgroups
            .values()
            .map(|info| info.policy_id)
            .chain(applied.addresses.values().map(|record| record.policy_id))
            .filter(|id| *id != 0)
            .collect();
        let last_policy = policy_ids.last().copied().unwrap_or(0);
        applied.policies = policy_ids.into_iter().map(|id| (id, Exclusions::default())).collect();
        let steered = kernel.steered().map_err(kernel_error("list the netns links"))?;
        kernel.attach_pods(&config.attach).map_err(kernel_error("attach the pods' programs"))?;

        let adopted = Adopted {
            ready: applied
                .addresses
                .values()
                .filter(|record| record.flags & flag::READY != 0)
                .map(|record| record.netns_cookie)
                .collect(),
            tunnels: applied
                .cgroups
                .iter()
                .filter(|(_, info)| info.flags & flag::TUNNEL != 0)
                .map(|(id, _)| *id)
                .collect(),
            until: Instant::now() + ADOPTION,
        };
        let mut node = Self {
            own_cgroup: cgroups::of_process(
                &config.cgroup_root,
                i32::try_from(std::process::id()).unwrap_or(0),
            )
            .ok(),
            config,
            kernel,
            records,
            settings,
            host: netns::host(),
            visitors: Visitors::new().map_err(cannot("start the threads that visit netns"))?,
            source_name: source.name.clone(),
            source_error: None,
            source_since: unix_secs(),
            listener: source.outcomes.clone(),
            outcomes: Outcomes::default(),
            pods: Pods::default(),
            places: BTreeMap::new(),
            dirty: Dirty::default(),
            events: EventCounts::default(),
            metrics,
            opened: BTreeMap::new(),
            unlisted: app_listeners::Unlisted::default(),
            all_due: None,
            dirs_changed: true,
            by_cgroup: HashMap::new(),
            applied,
            to_note: BTreeSet::new(),
            unsettled: Vec::new(),
            last_policy,
            adopted: Some(adopted),
            tunnels: tunnels::Tunnels::default(),
            lingering: BTreeMap::new(),
            tracing: None,
        };
        node.adopt_netns(steered);
        Ok(node)
    }

    /// When something is due next.
    fn wake(&self, next_scan: Instant) -> Instant {
        let now = Instant::now();
        [self.all_due, self.tunnels.next_retry(), self.next_lingering(now), self.unlisted.due()]
            .into_iter()
            .chain(self.pods.all().flat_map(|known| [known.next_look, known.lenient_until]))
            .flatten()
            .chain(self.adopted.as_ref().filter(|_| self.pods.synced).map(|adopted| adopted.until))
            .fold(next_scan, Instant::min)
    }

    /// Writes the settings, if they differ.
    fn change_settings(&mut self, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.settings;
        change(&mut settings);
        if settings == self.settings {
            return;
        }
        match self.kernel.set_settings(&settings) {
            Ok(()) => self.settings = settings,
            Err(error) => error!(error = %chain(&error), "cannot write the settings"),
        }
    }

    /// Whether a tunnel serves, as far as the programs are told.
    fn tunnel_up(&self) -> bool {
        self.settings.tunnel_up == 1
    }

    fn note_problem(&mut self, uid: &str, reason: Reason) {
        let Some(known) = self.pods.get_mut(uid) else { return };
        if known.problem.as_ref() != Some(&reason) {
            warn!(uid, code = reason.code.code(), reason = reason.text, "pod cannot be enrolled yet");
            known.problem = Some(reason);
        }
        // Tried again with the next look, which is due soon.
        known.next_look.get_or_insert_with(|| Instant::now() + apply::AGAIN);
    }

    fn forget_problem(&mut self, uid: &str) {
        if let Some(known) = self.pods.get_mut(uid) {
            known.problem = None;
        }
    }

    fn end_lenience(&mut self, uid: &str) {
        if let Some(known) = self.pods.get_mut(uid) {
            known.lenient_until = None;
        }
    }
}
