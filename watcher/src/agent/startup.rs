//! Loads the programs, and takes over what an earlier watcher left.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use adit_ebpf_loader::Kernel;
use tracing::info;

use crate::{
    admin_http::AdminServer,
    apply::{
        Applier, journal::Journal, kubelet::KubeletCgroup, settings::KernelSettings,
        tunnel_cgroups::CgroupLayout,
    },
    control::trace::Tracer,
    metrics::Metrics,
    observe::{
        cgroups,
        events::{self, EventSource},
        netns::Visitors,
    },
    source::Source,
};

use super::{
    Agent, boot::EarlyListeners, boot::Found, config::AgentConfig, error::AgentError, error::cannot,
    kept_pods::KeptPods, observer::Observer, pods::PodTable, queue::Queue, reporter::Reporter,
};

/// The agent and its source of events. Events are opened before the first observation, so that
/// whatever happens after it is reported.
///
/// # Errors
/// The journal cannot be read, the kernel refused, or no source of events works.
pub(super) fn start(
    config: AgentConfig,
    source: &mut Source,
    metrics: Arc<Metrics>,
) -> Result<(Agent, Box<dyn EventSource>), AgentError> {
    source.begin();
    let journal = Journal::open(&config.run_dir).map_err(cannot("read the journal of an earlier run"))?;
    let visitors = Arc::new(Visitors::new().map_err(cannot("start the threads that enter netns"))?);
    let failed = |what| move |source| AgentError::Kernel { what, source };
    let mut kernel = Kernel::open(&config.pins).map_err(failed("load the programs and maps"))?;
    metrics.set_verdicts(kernel.verdicts());
    let settings =
        KernelSettings::open(&mut kernel, &config.dns_resolvers).map_err(failed("write the settings"))?;
    let found = match (kernel.must_be_filled(), kernel.is_first()) {
        (true, _) => Found::OtherMaps,
        (false, true) => Found::Nothing,
        (false, false) => Found::OwnMaps,
    };
    let kubelet = KubeletCgroup::new(config.kubelet_port, config.cgroup_root.clone(), config.attach.clone());
    let pods = config.attach.clone();
    let mut applier = Applier::adopt(kernel, settings, journal, Arc::clone(&visitors), pods, kubelet)
        .map_err(|(what, source)| AgentError::Kernel { what, source })?;
    // What closes new pods comes first, beside that of an earlier watcher.
    let events = events::open(config.events, &mut applier.kernel, &config.attach, &config.cgroup_root)?;
    if found == Found::OtherMaps {
        info!("the programs of another version decide until this version's maps are filled");
    } else {
        attach(&mut applier, &config)?;
    }
    let ready = if found == Found::OtherMaps {
        applier.kernel.tunnel_netns()
    } else {
        Ok(applier.maps.ready_netns())
    };
    let ready = ready.map_err(failed("list the tunnels' listeners"))?;
    let kept = KeptPods::new(ready, applier.maps.tunnel_cgroups(), Instant::now());
    info!(node = config.node, attached = %config.attach.display(), "watching");
    let mut agent = Agent {
        queue: Queue::default(),
        pods: PodTable::new(applier.maps.last_exclusion_id()),
        observer: Observer::new(config.attach.clone(), visitors, config.detect_sidecars),
        kept,
        found,
        early: EarlyListeners::default(),
        reporter: Reporter::new(source, events.kind(), metrics),
        tracer: Tracer::default(),
        routes: super::route_watch::RouteWatch::default(),
        layout: layout(&config),
        applier,
        config,
    };
    if source.forgets_running_pods {
        agent.pods.keep_running();
    }
    Ok((agent, events))
}

/// Has this version's programs decide, by what its maps hold.
///
/// # Errors
/// The kernel refused.
pub(super) fn attach(applier: &mut Applier, config: &AgentConfig) -> Result<(), AgentError> {
    let failed = |what| move |source| AgentError::Kernel { what, source };
    // Tunnels first: what the pods' programs pass on, a tunnel's have to understand.
    applier.update_tunnel_programs();
    let kernel = &mut applier.kernel;
    kernel.attach_pods(&config.attach).map_err(failed("attach the pods' programs"))?;
    kernel.end_earlier_lifecycle().map_err(failed("end the lifecycle programs of an earlier watcher"))
}

/// Where no tunnel may run.
fn layout(config: &AgentConfig) -> CgroupLayout {
    let pid = i32::try_from(std::process::id()).unwrap_or(0);
    CgroupLayout {
        root: config.cgroup_root.clone(),
        pods: config.attach.clone(),
        tunnel_accounts: config.tunnel_accounts.clone(),
        own: cgroups::of_process(&config.cgroup_root, pid).ok(),
    }
}

/// Serves `metrics` at `address`, if there is one, until the result is dropped.
///
/// # Errors
/// The address cannot be bound.
pub(super) async fn serve_metrics(
    address: Option<SocketAddr>,
    metrics: &Arc<Metrics>,
) -> Result<Option<AdminServer>, AgentError> {
    let Some(address) = address else { return Ok(None) };
    let server = AdminServer::bind(address, Arc::clone(metrics)).await;
    server.map(Some).map_err(cannot(format!("serve metrics at {address}")))
}
