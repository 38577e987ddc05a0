//! The program `ztunnel-control`: its arguments, its log and its signals.
//!
//! * `rotate_root`, `revoke`: the commands of these names

mod revoke;
mod rotate_root;

use std::{collections::BTreeSet, io::Write as _, net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand, ValueEnum};
use kube::{Client, Config};
use rustls::crypto::aws_lc_rs;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;
use tracing_subscriber::EnvFilter;
use ztunnel_api::names::ServiceAccount;
use ztunnel_control::{
    authority::place::RootPlace,
    discovery::StreamLimits,
    identity::{self, InvalidIdentity},
    program::{self, Options, Sockets},
    settings::MeshSettings,
};

/// Tells tunnels of workloads, services and policies, and signs certificates for their pods, from
/// Kubernetes alone.
#[derive(Debug, Parser)]
#[command(
    name = "ztunnel-control",
    version,
    after_help = "The API server is found by KUBECONFIG, else by the service account of the pod.

Examples:
  ztunnel-control
  ztunnel-control --trust-domain example.org --cluster-id east
  ztunnel-control --tunnel-account istio-system/ztunnel --root-namespace istio-system
  KUBECONFIG=~/.kube/config ztunnel-control --listen 127.0.0.1:15012 --server-name localhost"
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Where tunnels call: discovery and certificates, by gRPC over TLS
    #[arg(long, env = "CONTROL_LISTEN", default_value = "[::]:15012", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Where readiness (/healthz/ready) and metrics (/metrics) are
    #[arg(long, env = "CONTROL_HTTP_LISTEN", default_value = "[::]:15014", value_name = "ADDRESS")]
    http_listen: SocketAddr,
    /// The namespace of this program, of its Secret and of its ConfigMap
    #[arg(long, env = "POD_NAMESPACE", default_value = "adit-system", global = true)]
    namespace: String,
    /// Policies of this namespace are about all namespaces [default: NAMESPACE]
    #[arg(long, env = "ROOT_NAMESPACE", value_name = "NAMESPACE")]
    root_namespace: Option<String>,
    /// The id of the cluster, as tunnels have it
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes", value_name = "ID")]
    cluster_id: String,
    /// The trust domain of all identities
    #[arg(
        long,
        env = "TRUST_DOMAIN",
        default_value = "cluster.local",
        value_name = "DOMAIN",
        value_parser = trust_domain,
        global = true
    )]
    trust_domain: String,
    /// The domain below which services have their names
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local", value_name = "DOMAIN")]
    cluster_domain: String,
    /// The network that all pods are on, as tunnels have it
    #[arg(long, env = "NETWORK", default_value = "")]
    network: String,
    /// A service account of tunnels; nobody else may call [default: NAMESPACE/ztunnel]
    #[arg(
        long = "tunnel-account",
        env = "TUNNEL_ACCOUNTS",
        value_delimiter = ',',
        value_name = "NAMESPACE/NAME"
    )]
    tunnel_accounts: Vec<ServiceAccount>,
    /// A name by which tunnels call this server [default: ztunnel-control.NAMESPACE.svc]
    #[arg(long = "server-name", env = "SERVER_NAMES", value_delimiter = ',', value_name = "NAME")]
    server_names: Vec<String>,
    /// The Secret with the root's certificate and key; it is made if it is not there
    #[arg(long, env = "ROOT_SECRET", default_value = "adit-root", value_name = "NAME", global = true)]
    root_secret: String,
    /// The ConfigMap that is kept with the root's certificate, for tunnels
    #[arg(
        long,
        env = "ROOT_CONFIG_MAP",
        default_value = "adit-root-cert",
        value_name = "NAME",
        global = true
    )]
    root_config_map: String,
    /// The ConfigMap that is kept with the list of revoked certificates; empty: none
    #[arg(long, env = "CRL_CONFIG_MAP", default_value = "", value_name = "NAME")]
    crl_config_map: String,
    /// The longest life of a certificate, in seconds
    #[arg(
        long, env = "CERTIFICATE_LIFE_SECS", default_value_t = 24 * 3600, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(600..=30 * 24 * 3600)
    )]
    certificate_life_secs: u64,
    /// How long a tunnel may take to acknowledge a response, in seconds
    #[arg(
        long, env = "ACKNOWLEDGE_SECS", default_value_t = 60, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    acknowledge_secs: u64,
    /// What is logged, as of tracing's EnvFilter
    #[arg(long, env = "RUST_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
    /// How: text, or a JSON object on each line
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value = "text", value_name = "FORMAT")]
    log_format: LogFormat,
}

#[derive(Debug, Subcommand)]
enum Command {
    RotateRoot(rotate_root::RotateRoot),
    Revoke(revoke::Revoke),
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// One that an identity can have.
fn trust_domain(text: &str) -> Result<String, InvalidIdentity> {
    let identity = identity::of_objects(&format!("spiffe://{text}/ns/a/sa/a"))?;
    Ok(identity.trust_domain.to_string())
}

impl Arguments {
    fn options(self) -> Options {
        let Self { namespace, tunnel_accounts, server_names, .. } = self;
        let tunnels: BTreeSet<ServiceAccount> = if tunnel_accounts.is_empty() {
            [ServiceAccount { namespace: namespace.clone(), name: "ztunnel".to_owned() }].into()
        } else {
            tunnel_accounts.into_iter().collect()
        };
        let server_names = if server_names.is_empty() {
            vec![format!("ztunnel-control.{namespace}.svc")]
        } else {
            server_names
        };
        Options {
            listen: self.listen,
            http_listen: self.http_listen,
            mesh: MeshSettings {
                cluster_id: self.cluster_id,
                trust_domain: self.trust_domain.clone(),
                cluster_domain: self.cluster_domain,
                network: self.network,
                root_namespace: self.root_namespace.unwrap_or_else(|| namespace.clone()),
            },
            tunnels,
            server_names,
            certificate_life: Duration::from_secs(self.certificate_life_secs),
            root: RootPlace {
                namespace,
                secret: self.root_secret,
                config_map: self.root_config_map,
                crl_config_map: Some(self.crl_config_map).filter(|name| !name.is_empty()),
                trust_domain: self.trust_domain,
            },
            limits: StreamLimits {
                acknowledge: Duration::from_secs(self.acknowledge_secs),
                ..StreamLimits::default()
            },
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    // Where the tunnel is built beside this, rustls has two to choose from.
    let _ = aws_lc_rs::default_provider().install_default();
    match Box::pin(run(Arguments::parse())).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "ztunnel-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(mut arguments: Arguments) -> Result<()> {
    if let Some(command) = arguments.command.take() {
        let (client, place) = (Client::try_from(api().await?)?, arguments.options().root);
        return match command {
            Command::RotateRoot(command) => command.run(client, &place).await,
            Command::Revoke(command) => command.run(client, &place).await,
        };
    }
    let filter = EnvFilter::try_new(&arguments.log)
        .with_context(|| format!("invalid log filter {:?}", arguments.log))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    match arguments.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    info!(version = env!("CARGO_PKG_VERSION"), "starting");
    let options = arguments.options();
    let api = api().await?;
    let sockets = Sockets::bind(&options).await?;
    let stop = CancellationToken::new();
    let mut signals = tokio::task::JoinSet::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = stop.clone();
    signals.spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        info!(signal = name, "shutdown signal received");
        stopping.cancel();
    });
    Box::pin(program::run(options, api, sockets, stop)).await
}

async fn api() -> Result<Config> {
    Config::infer().await.context(
        "cannot find the API server: outside of a pod set KUBECONFIG; inside, mount the service account's token",
    )
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn defaults_follow_from_the_namespace() {
        let options = Arguments::parse_from(["ztunnel-control", "--namespace", "mesh"]).options();
        assert_eq!(options.tunnels, ["mesh/ztunnel".parse().unwrap()].into());
        assert_eq!(options.server_names, ["ztunnel-control.mesh.svc"]);
        assert_eq!((options.mesh.root_namespace.as_str(), options.root.namespace.as_str()), ("mesh", "mesh"));
    }

    #[test]
    fn the_documentation_has_only_commands_that_there_are() {
        testbed::doc_commands::assert_valid(&Arguments::command());
    }

    #[test]
    fn the_documentation_has_a_row_for_every_option() {
        let page = include_str!("../../../docs/control-plane.md");
        for argument in Arguments::command().get_arguments() {
            let (Some(long), Some(variable)) = (argument.get_long(), argument.get_env()) else { continue };
            let row = format!("| `--{long}` | `{}` |", variable.to_str().unwrap());
            assert!(page.contains(&row), "docs/control-plane.md has no row {row}");
        }
    }

    #[test]
    fn several_accounts_and_nonsense() {
        let parse = |value: &str| Arguments::try_parse_from(["ztunnel-control", "--tunnel-account", value]);
        let two = parse("a/ztunnel,b/ztunnel").unwrap().options().tunnels;
        assert_eq!(two.len(), 2);
        let message = parse("ztunnel").unwrap_err().to_string();
        assert!(message.contains("expected NAMESPACE/NAME"), "{message}");
        for domain in ["", "a/b", "EXAMPLE.org"] {
            assert!(Arguments::try_parse_from(["ztunnel-control", "--trust-domain", domain]).is_err());
        }
    }
}
