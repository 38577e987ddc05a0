//! `watcher completion`: prints a completion script for a shell.

use std::process::ExitCode;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "Example:
  watcher completion bash > /etc/bash_completion.d/watcher")]
pub(super) struct CompletionArgs {
    shell: Shell,
}

pub(super) fn run(args: &CompletionArgs) -> ExitCode {
    clap_complete::generate(args.shell, &mut super::Cli::command(), "watcher", &mut std::io::stdout());
    ExitCode::SUCCESS
}
