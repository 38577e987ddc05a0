//! The commands. `ztunnel` and `ztunnel proxy [ztunnel]` run the tunnel; the others print something
//! and exit.
//!
//! * [`config`]: checks and prints the configuration, without running
//! * [`status`]: prints the state of the running tunnel
//! * [`completion`]: prints completion scripts for shells

pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod status;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

/// Carries the TCP connections of a node's enrolled pods over HBONE.
///
/// Without a command, or with `proxy`, it runs. It is configured by a file and by the environment
/// variables that Istio's DaemonSet sets; the environment overrides the file.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  ztunnel --config /etc/adit/ztunnel.yaml        run
  ztunnel proxy ztunnel                          run, as Istio's DaemonSet starts it
  ztunnel config check /etc/adit/ztunnel.yaml    report what is wrong with the file
  ztunnel status                                 show the state of the tunnel on this node
  ztunnel config print                           print every key with its value and origin"
)]
pub(crate) struct Arguments {
    /// The configuration, YAML. Keys: docs/configuration.md, or `ztunnel config print`.
    #[arg(long, value_name = "FILE", env = "ZTUNNEL_CONFIG")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Runs the tunnel, as no command at all does: the arguments of Istio's DaemonSet are `proxy
    /// ztunnel`.
    #[command(after_help = "Examples:
  ztunnel proxy ztunnel
  ztunnel --config /etc/adit/ztunnel.yaml proxy")]
    Proxy {
        /// Which proxy to run. This program has one.
        #[arg(value_name = "ROLE", default_value = "ztunnel", hide_default_value = true)]
        role: ProxyRole,
    },
    /// Configuration without running.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    Status(status::Status),
    Completion(completion::Completion),
}

/// Output format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Text,
    Json,
    Yaml,
}

/// The second word of `ztunnel proxy ztunnel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProxyRole {
    /// The node tunnel.
    Ztunnel,
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, error::ErrorKind};

    use super::*;

    #[test]
    fn the_documentation_has_only_commands_that_there_are() {
        testbed::doc_commands::assert_valid(&Arguments::command());
    }

    #[test]
    fn arguments_of_istios_daemonset_run_the_tunnel_and_other_roles_are_refused() {
        let parse = |arguments: &[&str]| {
            Arguments::try_parse_from(std::iter::once("ztunnel").chain(arguments.iter().copied()))
        };
        for arguments in
            [&["proxy", "ztunnel"][..], &["proxy"], &["--config", "file.yaml", "proxy", "ztunnel"]]
        {
            let parsed = parse(arguments).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
            assert!(matches!(parsed.command, Some(Command::Proxy { .. })), "{arguments:?}");
        }
        assert!(parse(&[]).is_ok_and(|parsed| parsed.command.is_none()));
        let Err(error) = parse(&["proxy", "sidecar"]) else { panic!("a second word that is not ztunnel") };
        assert_eq!(error.kind(), ErrorKind::InvalidValue);
        let message = error.to_string();
        assert!(message.contains("'sidecar'") && message.contains("possible values: ztunnel"), "{message}");
        assert!(parse(&["proxy", "ztunnel", "more"]).is_err());
        assert!(parse(&["prxy"]).is_err());
    }
}
