//! The loop: receives updates, events, acknowledgements and requests, marks what they are about,
//! and has it observed, planned and applied.
//!
//! * `turn`: one turn of the loop: everything that is due
//! * `handlers`: what an update, an event or a tunnel's message leads to
//! * `queue`: what has to be done, and for which pods
//! * `pods`: the table of pods; `pod_entry`: one of them
//! * `observer`: reads from the node what there is of pods
//! * `planning`: from the table of pods to plans and states
//! * `kept_pods`: pods of tunnels that are not connected
//! * `reporter`: outcomes to the source, metrics; `commands`: answers to commands
//! * `reserved_ports`: applications that use the tunnel's ports; `port_uses`: those of one pod
//! * `route_watch`: follows routes of pods that exclude interfaces
//! * `boot`: pods that ran before the first watcher did; `audit`: what no pod should have in clear
//! * `startup`: loading the programs, and taking over what is there
//! * `node_lock`: one watcher for each node; the next one stands by
//! * `config`, `error`: what it is configured to do, and why it ends
//!
//! What is applied belongs to [`crate::apply`]. Everything here runs on one thread, so nothing
//! needs a lock.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use error_reporter::Report;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing::{info, warn};

use crate::{
    admin_http::AdminServer,
    apply::{
        Applier, OpenNetns,
        tunnel_cgroups::CgroupLayout,
        zds_server::{ZdsEvent, ZdsServer},
    },
    control::{
        Answer, Answers, ControlServer, IncomingRequest, Request,
        trace::{TraceLine, TraceRequest, Tracer},
    },
    metrics::Metrics,
    observe::events,
    plan::{Plan, diff::DiffScope},
    source::Source,
};

mod audit;
mod boot;
mod commands;
mod config;
mod error;
mod handlers;
mod kept_pods;
mod node_lock;
mod observer;
mod planning;
mod pod_entry;
mod pods;
mod port_uses;
mod queue;
mod reporter;
mod reserved_ports;
mod route_watch;
mod startup;
mod turn;

use self::error::cannot;
pub use self::{config::AgentConfig, error::AgentError};

use self::{
    boot::EarlyListeners, boot::Found, commands::Commands, kept_pods::KeptPods, observer::Observer,
    pods::PodTable, queue::Queue, reporter::Reporter, route_watch::RouteWatch,
};

/// How long tunnels have to acknowledge that their pods are gone, when everything is undone.
const WITHDRAWAL_TIME: Duration = Duration::from_secs(2);

/// The owners of all state.
struct Agent {
    config: AgentConfig,
    queue: Queue,
    pods: PodTable,
    observer: Observer,
    kept: KeptPods,
    /// What was attached at the start: how pods are treated that the source names first.
    found: Found,
    early: EarlyListeners,
    applier: Applier,
    reporter: Reporter,
    tracer: Tracer,
    routes: RouteWatch,
    /// Where no tunnel may run.
    layout: CgroupLayout,
}

/// Runs until a signal or a `detach` request ends it.
///
/// # Errors
/// It cannot start, a source or server ended, or not everything could be undone at the end.
pub async fn run(config: AgentConfig, mut source: Source) -> Result<(), AgentError> {
    fs::create_dir_all(&config.run_dir)
        .map_err(cannot(format!("make the run directory {}", config.run_dir.display())))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot("handle SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot("handle SIGINT"))?;
    let metrics = Arc::new(Metrics::new());
    let http = startup::serve_metrics(config.metrics_address, &metrics).await;
    // Before everything else: a second watcher of this node must not touch anything.
    let lock = tokio::select! {
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
        lock = node_lock::acquire(&config.pins, &metrics) => lock,
    };
    let lock = lock.map_err(cannot(format!("lock the pins in {}", config.pins.display())))?;
    let _http = match (http, config.metrics_address) {
        // The watcher before this one had the address, in the same netns, and may not have ended.
        (Err(_), Some(address)) if lock.stood_by => {
            Some(AdminServer::bind_when_free(address, Arc::clone(&metrics)))
        }
        (http, _) => http?,
    };
    let (request_sender, mut requests) = mpsc::channel(16);
    let mut control =
        ControlServer::bind(&config.status_socket, request_sender).map_err(cannot("serve commands"))?;
    let (zds_sender, mut zds_events) = mpsc::unbounded_channel();
    let mut zds = ZdsServer::bind(&config.zds_socket, zds_sender).map_err(cannot("serve tunnels"))?;
    let (mut agent, mut events) = startup::start(config, &mut source, metrics)?;

    let mut next_scan = Instant::now() + agent.config.rescan;
    let (detach, client) = loop {
        let scan = agent.queue.take_scan() || Instant::now() >= next_scan;
        if scan {
            next_scan = Instant::now() + agent.config.rescan;
            // What the programs did themselves is not the work of others.
            agent.on_ready_events(events.as_mut());
        }
        agent.reconcile(scan);
        agent.take_over()?;
        // After all that is there: a pod that a tunnel has just taken need not be reported as
        // waiting for it.
        if zds_events.is_empty() && source.updates.is_empty() {
            agent.report();
        }
        if agent.is_ready() {
            source.ready();
        }
        agent.reporter.set_gauges(agent.applier.tunnels.len(), agent.is_ready());
        agent.watch_dirs(events.as_mut());
        let wake = agent.next_due(next_scan);
        tokio::select! {
            _ = terminate.recv() => break (agent.config.detach, None),
            _ = interrupt.recv() => break (agent.config.detach, None),
            cause = zds.failed() => return Err(AgentError::ServerEnded { what: "tunnels", cause }),
            cause = control.failed() => return Err(AgentError::ServerEnded { what: "commands", cause }),
            Some(event) = zds_events.recv() => agent.on_tunnel(event),
            event = events::next(events.as_mut()) => agent.on_event(event),
            update = source.updates.recv() => {
                let Some(update) = update else {
                    let source_name = agent.reporter.source_name().to_owned();
                    let cause = source.why_ended().await;
                    return Err(AgentError::SourceEnded { source_name, cause });
                };
                agent.on_update(update);
            }
            Some(request) = requests.recv() => {
                if let Some(client) = agent.answer(request) {
                    break (true, Some(client));
                }
            }
            uid = agent.routes.changed() => agent.queue.observe([uid]),
            () = agent.tracer.ready() => agent.tracer.forward(agent.pods.views()),
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        // What is there already is one batch: sixty acknowledgements need not be sixty rounds.
        while let Ok(event) = zds_events.try_recv() {
            agent.on_tunnel(event);
        }
        while let Ok(update) = source.updates.try_recv() {
            agent.on_update(update);
        }
        agent.on_ready_events(events.as_mut());
    };
    agent.tracer.stop(&mut agent.applier);
    if !detach {
        info!("stopped; links and maps stay, so running traffic continues");
        return Ok(());
    }
    let run_dir = agent.config.run_dir.clone();
    let result = agent.detach(&mut zds_events).await;
    source.close().await;
    if let Some(client) = client {
        client
            .give_last(&Answer::from(
                result.as_ref().copied().map_err(|error| Report::new(error).to_string()),
            ))
            .await;
    }
    if result.is_ok() {
        remove_run_dir(control, &run_dir);
        info!("everything undone");
    }
    result
}

/// Removes the folder of this run, and before it the file of the socket for commands. A journal that
/// is still needed, or a successor's socket, keeps it.
fn remove_run_dir(control: ControlServer, run_dir: &Path) {
    drop(control);
    let _ = fs::remove_dir(run_dir);
}

impl Agent {
    /// Whether every pod that was there at the start has been observed, and is enrolled as far as
    /// possible.
    fn is_ready(&self) -> bool {
        self.pods.is_synced() && self.queue.is_idle() && !self.awaits_adopted()
    }

    /// Whether a pod that an earlier watcher enrolled could not be observed yet. While that may
    /// still succeed, it stays as it is, and no tunnel is told which pods there are.
    fn awaits_adopted(&self) -> bool {
        let adopted = |uid: &str| self.applier.netns.of_pod(uid).is_some();
        self.kept.ends_at().is_some()
            && self.pods.iter().any(|entry| !entry.is_observed() && adopted(&entry.view.pod.uid))
    }

    /// Has a source of events that watches directories watch those of the pods.
    fn watch_dirs(&mut self, events: &mut dyn events::EventSource) {
        if !events.wants_dirs() || !self.queue.take_dirs_changed() {
            return;
        }
        match self.pods.directories(&self.config.attach) {
            Ok(dirs) => events.watch(&dirs),
            Err(error) => warn!(%error, "cannot list the cgroups to be watched; the scan finds changes"),
        }
    }

    /// Reports the states that may have changed.
    fn report(&mut self) {
        let gone = self.pods.take_gone_states();
        if !gone.is_empty() {
            self.count_port_uses();
        }
        self.reporter.states_gone(gone);
        for uid in self.queue.take_reports() {
            let Some(entry) = self.pods.get_mut(&uid) else {
                self.reporter.pod_gone(&uid);
                continue;
            };
            let (state, reason) = planning::state_of(entry, &self.applier, &self.config);
            self.reporter.pod_state(entry, state, reason);
        }
    }

    /// When something is due next.
    fn next_due(&self, next_scan: Instant) -> Instant {
        let kept_until = self.kept.ends_at().filter(|_| self.pods.is_synced());
        [
            self.queue.resync_at(),
            self.applier.next_due(Instant::now()),
            self.pods.next_due(),
            self.pods.ports_due(),
            kept_until,
            self.kept.next_check(),
        ]
        .into_iter()
        .flatten()
        .fold(next_scan, Instant::min)
    }

    /// Answers a request; gives back the client of a detach, which is answered when that is done.
    fn answer(&mut self, IncomingRequest { request, answers }: IncomingRequest) -> Option<Answers> {
        let ready = self.is_ready();
        let Self { config, pods, applier, reporter, .. } = self;
        match request {
            Request::Status => {
                let commands = Commands { config, pods, applier, reporter, ready };
                answers.give(&Answer::Ok(commands.status()));
            }
            Request::Explain { pod, destination, caller } => {
                let commands = Commands { config, pods, applier, reporter, ready };
                answers.give(&Answer::from(commands.explain(&pod, &caller, destination)));
            }
            Request::Lists { pod } => {
                let commands = Commands { config, pods, applier, reporter, ready };
                answers.give(&Answer::from(commands.lists(pod.as_deref())));
            }
            Request::Trace { pod, port, address, not_addresses } => {
                let filter = TraceRequest { pod, port, address, not_addresses };
                if let Err(problem) = self.tracer.start(&answers, filter, &pods.views(), applier) {
                    answers.give(&Answer::<TraceLine>::Error(problem));
                }
            }
            Request::Detach => return Some(answers),
        }
        None
    }

    /// Undoes everything, at once.
    async fn detach(mut self, events: &mut mpsc::UnboundedReceiver<ZdsEvent>) -> Result<(), AgentError> {
        // Applications first; the tunnels' own entries stay until they have let go.
        let tunnels = self.applier.tunnels.cgroup_ids();
        self.applier.apply(DiffScope::All { tunnels: &tunnels }, &Plan::new(), &OpenNetns::new());
        self.reporter.all_left(self.pods.views());
        let deadline = Instant::now() + WITHDRAWAL_TIME;
        while self.applier.draining.waits_for_tunnels() {
            match tokio::time::timeout_at(deadline.into(), events.recv()).await {
                Ok(Some(event)) => self.on_tunnel(event),
                Ok(None) | Err(_) => break,
            }
        }
        Ok(self.applier.remove_everything(&self.config.pins)?)
    }
}
