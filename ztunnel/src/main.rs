//! `ztunnel`: parse, load, bind, report ready, serve, drain.

mod allocator;
mod cli;

use std::{io::Write, path::Path, process::ExitCode, sync::Arc, time::SystemTime};

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use cli::{Arguments, Command};
use tokio::{runtime::Builder, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use ztunnel::{
    admin::{Admin, Servers},
    config::{Config, LocalState, OwnPod, ProxyMode},
    context::ProcessContext,
    discovery::{
        self,
        last_state::{self, LastState, LastStateMetrics, Origin},
    },
    dns::Dns,
    drain,
    identity::{Certificates, MeshTrust, Revocations},
    logging::Logging,
    mesh::{
        OwnNode, Store,
        local_file::{self, ResourceDefaults},
    },
    metrics::{Metrics, certificates::CertificateExpiry, log::LostLogLines},
    pod::PodInfo,
    pods::{ServedPods, zds},
    readiness::{Readiness, ReadyGuard},
    supervision::{self, Supervisor},
    worker::Workers,
};

fn main() -> ExitCode {
    // For the calls to the control plane; rustls has two to choose from.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let Arguments { config, command } = Arguments::parse();
    let done = match command {
        Some(Command::Config(command)) => cli::config::run(command, config).map(|()| ExitCode::SUCCESS),
        Some(Command::Status(status)) => cli::status::run(&status),
        Some(Command::Completion(completion)) => {
            cli::completion::run(&completion);
            Ok(ExitCode::SUCCESS)
        }
        None | Some(Command::Proxy { .. }) => run(config.as_deref()).map(|()| ExitCode::SUCCESS),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "ztunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(file: Option<&Path>) -> Result<()> {
    let config = Arc::new(Config::load(file)?);
    let (logging, log_writer) = Logging::init(config.log_format, &config.log_filter)?;
    info!(version = env!("CARGO_PKG_VERSION"), node = %config.node, workers = config.workers, "starting");
    info!(config = %serde_json::to_string(&*config)?, "effective configuration");
    supervision::observe_panics();
    raise_descriptor_limit();
    let runtime =
        Builder::new_current_thread().enable_all().build().context("cannot start the control runtime")?;
    let done = runtime.block_on(serve(config, logging, log_writer.lost.clone()));
    // Past the drain deadline a worker may still hang: dropping the runtime would wait for it.
    runtime.shutdown_background();
    done
}

/// The mesh at the start: what the file says, or nothing until a control plane tells.
fn first_store(config: &Config) -> Result<Store> {
    if config.xds.is_none() {
        return Ok(Store::new(local_file::load(config)?));
    }
    let (cluster_id, name) = (Arc::clone(&config.cluster_id), Arc::clone(&config.node));
    Ok(Store::untold_on(OwnNode { cluster_id, name }))
}

async fn serve(config: Arc<Config>, logging: Logging, lost_lines: LostLogLines) -> Result<()> {
    // Load.
    let store = Arc::new(first_store(&config)?);
    forget_state(&config);
    let last_state = last_state(&config)?;
    let trust = MeshTrust::open(&config);
    let certificates = Certificates::new(&config, Arc::clone(&trust))?;
    let revocations = Arc::new(Revocations::open(config.crl.clone())?);
    let metrics = metrics(&config, &certificates, last_state.as_deref(), lost_lines);
    let readiness = Readiness::default();
    let mut pods_ready = readiness.task("workload proxy manager");
    let on_demand = config.xds.as_ref().is_some_and(|xds| xds.on_demand);
    let demand = on_demand.then(discovery::demand::Demand::default);
    let xds = config.xds.as_ref().map(|xds| {
        let (defaults, ready) = (ResourceDefaults::from(&*config), readiness.task("state manager"));
        discovery::client::DiscoveryClient::new(
            xds,
            defaults,
            Arc::clone(&store),
            demand.clone(),
            last_state.clone(),
            &metrics,
            ready,
        )
    });

    // Bind.
    let servers = Servers::bind(&config).await?;
    let (stop, end) = (CancellationToken::new(), CancellationToken::new());
    let signals = drain::on_signal(&stop).context("cannot install the signal handlers")?;
    let supervisor = Supervisor::default();
    let process = Arc::new(ProcessContext::new(
        Arc::clone(&config),
        Arc::clone(&store),
        Arc::clone(&certificates),
        Arc::clone(&revocations),
        Arc::clone(&metrics),
        demand,
        supervisor.clone(),
    ));
    let workers = Workers::start(&process).context("cannot start the workers")?;
    let start_dns = || {
        let ready = readiness.task("dns proxy");
        let dns = Dns::start(&process).context("cannot start the DNS proxy")?;
        ready.done();
        anyhow::Ok(dns)
    };
    let dns = config.dns.enabled.then(start_dns).transpose()?;
    let mut pods = ServedPods::new(process, workers, dns, stop.clone());

    // Serve. Services that draining connections need run until `end`, and none may end before.
    let mut services = JoinSet::new();
    let admin = Admin {
        config: Arc::clone(&config),
        store: Arc::clone(&store),
        certificates: Arc::clone(&certificates),
        logging,
        metrics,
        readiness,
        workload_state: pods.view(),
        quit: stop.clone(),
        last_state: last_state.map(|last_state| Arc::clone(last_state.status())),
        started: SystemTime::now(),
    };
    let served = servers.serve(admin, end.clone());
    let watch = || supervisor.clone();
    services.spawn(watch().watch("the admin, metrics and readiness servers", async {
        if let Err(error) = served.await {
            error!(%error, "admin, metrics and readiness servers stopped");
        }
    }));
    services.spawn(watch().watch("the renewal of certificates", certificates.run(end.clone())));
    if revocations.is_configured() {
        services.spawn(watch().watch("the watch for revocations", revocations.watch(end.clone())));
    }
    services.spawn(watch().watch("the watch for trust domains", trust.watch(end.clone())));
    if let Some(client) = xds {
        services.spawn(watch().watch("discovery", client.run(end.clone())));
    }
    if let Some(LocalState::Path(path)) = &config.local_state {
        let (defaults, store) = (ResourceDefaults::from(&*config), Arc::clone(&store));
        let watching = local_file::watch(path.clone(), defaults, store, end.clone());
        services.spawn(watch().watch("the watch of the mesh file", watching));
    }
    let ended_early = tokio::select! {
        served = serve_pods(&config, &store, &mut pods, &mut pods_ready, &stop) => served.map(|()| None)?,
        ended = supervisor.ended_early() => Some(ended),
    };
    if let Some(ended) = &ended_early {
        error!(%ended, "shutting down");
        stop.cancel();
    }

    // Drain.
    pods_ready.pending();
    drain::drained(pods.finish(), config.drain_deadline).await;
    end.cancel();
    services.shutdown().await;
    forget_state(&config);
    signals.abort();
    info!("stopped");
    ended_early.map_or(Ok(()), |ended| Err(anyhow!("{ended}")))
}

/// Where what the control plane tells is kept, if it is.
fn last_state(config: &Config) -> Result<Option<Arc<LastState>>> {
    let xds = config.xds.as_ref().filter(|xds| !xds.forget_state);
    let folder = xds.and_then(|xds| xds.state_dir.as_deref());
    let started = folder.map(|folder| LastState::start(folder, Origin::from(config)));
    Ok(started.transpose().context("cannot start the thread of the last state")?.map(Arc::new))
}

/// Removes what was kept, if this tunnel is to leave nothing on its node.
fn forget_state(config: &Config) {
    let xds = config.xds.as_ref().filter(|xds| xds.forget_state);
    let Some(folder) = xds.and_then(|xds| xds.state_dir.as_deref()) else { return };
    if let Err(error) = last_state::forget(folder) {
        let error = format!("{:#}", anyhow!(error));
        warn!(folder = %folder.display(), error, "the last state of the control plane cannot be removed; remove it by hand");
    }
}

/// The metrics, with what is read at each scrape.
fn metrics(
    config: &Config,
    certificates: &Arc<Certificates>,
    last_state: Option<&LastState>,
    lost_lines: LostLogLines,
) -> Arc<Metrics> {
    let mut metrics = Metrics::new(config.budget.metric_label_sets as usize);
    if let Some(last_state) = last_state {
        metrics.collect(Box::new(LastStateMetrics(Arc::clone(last_state.status()))));
    }
    metrics.collect(Box::new(CertificateExpiry(Arc::clone(certificates))));
    metrics.collect(Box::new(lost_lines));
    Arc::new(metrics)
}

/// Serves the pods that this process is for until `stop`.
async fn serve_pods(
    config: &Config,
    store: &Store,
    pods: &mut ServedPods,
    ready: &mut ReadyGuard,
    stop: &CancellationToken,
) -> Result<()> {
    // Who serves a pod before the policies are known would serve it without.
    if stop.run_until_cancelled(store.until_known()).await.is_none() {
        return Ok(());
    }
    match config.mode.clone() {
        ProxyMode::Shared => {
            if let Some(OwnPod { name, namespace, service_account }) = config.own_pod.clone()
                && let Err(error) = pods.serve_own(PodInfo { name, namespace, service_account })
            {
                // Serving the node's pods matters more.
                warn!(%error, "cannot serve own metrics over HBONE; continuing without");
            }
            zds::run(&config.zds_socket, pods, ready, stop).await;
        }
        ProxyMode::Dedicated { namespace, name, service_account } => {
            let pod = PodInfo { name, namespace, service_account };
            pods.serve_here(pod).context("cannot listen for the workload, in whose netns this process is")?;
            ready.ready();
            stop.cancelled().await;
        }
    }
    Ok(())
}

/// Each connection takes two descriptors, so that 500 would use up the default of 1024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of open files");
    }
}
