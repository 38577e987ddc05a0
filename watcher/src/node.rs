//! The loop that owns all state: looks, compares, acts, and answers.
//!
//! * `look`: the pods, and what is there of them
//! * `act`: from what was seen to steps, and doing them
//! * `tunnels`: who is connected, and who acknowledged what
//! * `lingering`: netns of pods that left, while connections still need them
//! * `asked`: what commands want to know
//!
//! Everything runs on one thread, so nothing here needs a lock.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

use adit_ebpf_common::{address::UNSPECIFIED, pods::flag, settings::Settings};
use adit_ebpf_loader::{Kernel, KernelError};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing::{error, info, warn};

use crate::{
    control,
    desired::{BadEntry, Entry, FailMode, Outcome, Outcomes, Source, exclusions::Exclusions},
    enrol::{hand_over, records::Records},
    observed::{
        cgroups::{self, CgroupId},
        events::Events,
        netns::{self, NetnsId},
    },
    reconcile::{HBONE_PORT, INBOUND_PORT, Judged, OUTBOUND_PORT, Plan, Reason},
};

mod act;
mod asked;
mod lingering;
mod look;
mod tunnels;

pub use self::asked::TraceLine;

/// How long a pod that cannot be enrolled yet is looked at again and again: its processes are just
/// starting, most likely.
const EAGER: Duration = Duration::from_secs(5);
const EAGER_EVERY: Duration = Duration::from_millis(20);
/// The scan that makes up for lost events. With it, what is gone is forgotten within two seconds.
const SCAN_EVERY: Duration = Duration::from_secs(1);
/// After a restart the tunnel's pods count as served for so long without it: tunnels try to connect
/// again at least every 15 s, and carry on meanwhile.
const ADOPTION: Duration = Duration::from_secs(20);

/// All that the watcher is told.
#[derive(Clone, Debug)]
pub struct Config {
    pub node: String,
    pub zds_socket: PathBuf,
    pub status_socket: PathBuf,
    /// Where this node's maps and links are pinned.
    pub pins: PathBuf,
    pub cgroup_root: PathBuf,
    /// Where the pods' programs are attached.
    pub attach: PathBuf,
    /// This node's run directory.
    pub run_dir: PathBuf,
    pub fail_mode: FailMode,
    /// Undo everything at the end.
    pub detach: bool,
}

/// Why the watcher could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("cannot {what}")]
    Io { what: String, source: io::Error },
    #[error("{source_name} ended, which it never should; restart the watcher")]
    SourceEnded { source_name: String },
    #[error("cannot {what}")]
    Kernel { what: &'static str, source: KernelError },
}

/// Takes part of the blame from an [`io::Error`].
pub(crate) fn cannot(what: impl Into<String>) -> impl FnOnce(io::Error) -> NodeError {
    let what = what.into();
    move |source| NodeError::Io { what, source }
}

/// What a predecessor left, while the tunnel has not come back yet.
#[derive(Debug)]
struct Adopted {
    /// Netns that a tunnel served, by cookie.
    ready: BTreeSet<u64>,
    tunnels: BTreeSet<CgroupId>,
    until: Instant,
}

/// All state of the node.
struct Node {
    config: Config,
    kernel: Kernel,
    records: Records,
    settings: Settings,
    /// Netns that no pod may claim.
    host: BTreeSet<NetnsId>,
    own_cgroup: Option<PathBuf>,
    source_name: String,
    /// What the source told last; `None`: nothing yet.
    entries: Option<Vec<Entry>>,
    source_error: Option<String>,
    listener: Option<mpsc::UnboundedSender<(String, Option<Outcome>)>>,
    outcomes: Outcomes,
    bad: Vec<BadEntry>,
    judged: Vec<Judged>,
    /// Since when an enrolled pod has no process.
    empty_since: BTreeMap<String, Instant>,
    /// Until when unsettled pods are looked at eagerly.
    eager_until: Instant,
    applied: Plan,
    /// What could not be done for a pod, by uid.
    problems: BTreeMap<String, Reason>,
    /// What could not be done for the node as a whole.
    unsettled: Vec<String>,
    policies: BTreeMap<String, (u32, Exclusions)>,
    last_policy: u32,
    /// Pods that were seen before, so that only a pod that ran in clear until now is treated leniently.
    met: BTreeSet<String>,
    lenient: BTreeMap<String, Instant>,
    adopted: Option<Adopted>,
    tunnels: tunnels::Tunnels,
    lingering: BTreeMap<u64, lingering::Lingering>,
    tracing: Option<asked::Tracing>,
}

/// Runs until a signal or a `detach` request ends it.
pub async fn run(config: Config, mut source: Source) -> Result<(), NodeError> {
    fs::create_dir_all(&config.run_dir)
        .map_err(cannot(format!("make the run directory {}", config.run_dir.display())))?;
    let mut stop = signal(SignalKind::terminate()).map_err(cannot("handle SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot("handle SIGINT"))?;
    let mut events = Events::new().map_err(cannot("watch cgroups"))?;
    // The sockets first: a second watcher of this node must end before it touches anything.
    let (asked_sender, mut asked) = mpsc::channel(16);
    let control =
        control::Server::bind(&config.status_socket, asked_sender).map_err(cannot("serve commands"))?;
    let (zds_sender, mut zds_events) = mpsc::unbounded_channel();
    let zds = hand_over::Server::bind(&config.zds_socket, zds_sender).map_err(cannot("serve tunnels"))?;

    let mut node = Node::new(config, &source)?;
    node.act();
    events.watch_cgroups(&node.watched());
    info!(node = node.config.node, pods = node.judged.len(), attached = %node.config.attach.display(), "watching");

    let mut next_scan = Instant::now() + SCAN_EVERY;
    let detach = loop {
        let wake = node.wake(next_scan);
        tokio::select! {
            _ = stop.recv() => break node.config.detach,
            _ = interrupt.recv() => break node.config.detach,
            Some(event) = zds_events.recv() => node.on_tunnel(event),
            () = events.next() => node.look(look::Which::All),
            update = source.updates.recv() => match update {
                Some(update) => {
                    node.take(update);
                    node.look(look::Which::All);
                }
                None => return Err(NodeError::SourceEnded { source_name: node.source_name }),
            },
            Some(asked) = asked.recv() => {
                if let Some(waiting) = node.answer(asked) {
                    let result = node.detach(&mut zds_events).await;
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
            () = asked::Tracing::ready(&mut node.tracing) => node.pass_trace_on(),
            () = tokio::time::sleep_until(wake.into()) => {
                if Instant::now() >= next_scan {
                    node.look(look::Which::All);
                    node.repair();
                    next_scan = Instant::now() + SCAN_EVERY;
                } else {
                    node.look(look::Which::Unsettled);
                }
            }
        }
        node.act();
        node.tell_outcomes();
        events.watch_cgroups(&node.watched());
    };
    node.stop_tracing();
    let result = if detach { node.detach(&mut zds_events).await } else { Ok(()) };
    drop((zds, control));
    if detach {
        info!("everything undone");
    } else {
        info!("stopped, links and maps stay: running traffic continues");
    }
    result
}

impl Node {
    fn new(config: Config, source: &Source) -> Result<Self, NodeError> {
        let records = Records::open(&config.run_dir).map_err(cannot("read what an earlier run noted"))?;
        let kernel_error = |what| move |source| NodeError::Kernel { what, source };
        let mut kernel = Kernel::open(&config.pins).map_err(kernel_error("load the programs and maps"))?;
        let before = kernel.settings().map_err(kernel_error("read the settings"))?;
        let settings = Settings {
            outbound_port: OUTBOUND_PORT,
            inbound_port: INBOUND_PORT,
            hbone_port: HBONE_PORT,
            tunnel_up: before.tunnel_up,
            debug: 0,
            debug_port: 0,
            debug_address: UNSPECIFIED,
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
            source_name: source.name.clone(),
            entries: None,
            source_error: None,
            listener: source.outcomes.clone(),
            outcomes: Outcomes::default(),
            bad: Vec::new(),
            judged: Vec::new(),
            empty_since: BTreeMap::new(),
            eager_until: Instant::now(),
            applied,
            problems: BTreeMap::new(),
            unsettled: Vec::new(),
            policies: BTreeMap::new(),
            last_policy,
            met: BTreeSet::new(),
            lenient: BTreeMap::new(),
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
        let eager = (now < self.eager_until && self.is_unsettled()).then_some(now + EAGER_EVERY);
        [eager, self.tunnels.next_retry(), self.next_lingering(now)]
            .into_iter()
            .flatten()
            .chain(self.lenient.values().copied())
            .chain(self.adopted.as_ref().map(|adopted| adopted.until))
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
        if self.problems.get(uid) != Some(&reason) {
            warn!(uid, code = reason.code, reason = reason.text, "pod cannot be enrolled yet");
            self.problems.insert(uid.to_owned(), reason);
        }
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
