//! `ztunnel completion`: completion scripts for shells.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Prints the completion script of a shell.
#[derive(Args)]
#[command(after_help = "Examples:
  ztunnel completion bash > /etc/bash_completion.d/ztunnel
  ztunnel completion zsh > \"${fpath[1]}/_ztunnel\"")]
pub(crate) struct Completion {
    shell: Shell,
}

pub(crate) fn run(completion: &Completion) {
    let mut command = super::Arguments::command();
    clap_complete::generate(completion.shell, &mut command, "ztunnel", &mut std::io::stdout());
}
