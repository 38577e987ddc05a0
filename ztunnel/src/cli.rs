//! The commands. `ztunnel` alone runs the tunnel; every other command asks and ends.
//!
//! * [`config`]: what the configuration comes to, without running
//! * [`status`]: what the running tunnel says of itself
//! * [`completion`]: what a shell needs to complete all that

pub mod completion;
pub mod config;
pub mod status;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

/// Carries the TCP connections of a node's enrolled pods over HBONE.
///
/// Without a command it runs. It is configured by a file and by the environment variables that Istio's DaemonSet sets;
/// the environment overrides the file.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  ztunnel --config /etc/adit/ztunnel.yaml        run
  ztunnel config check /etc/adit/ztunnel.yaml    say what is wrong with it, if anything
  ztunnel status                                 what the tunnel of this node does now
  ztunnel config print                           every key, its value and where that comes from"
)]
pub struct Arguments {
    /// The configuration, YAML. Keys: docs/configuration.md, or `ztunnel config print`.
    #[arg(long, value_name = "FILE", env = "ZTUNNEL_CONFIG")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Configuration without running.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    Status(status::Status),
    Completion(completion::Completion),
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    Json,
    Yaml,
}
