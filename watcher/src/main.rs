//! The binary. It needs these capabilities:
//!
//! * `CAP_BPF` and `CAP_NET_ADMIN`: load the programs, write the maps, attach to cgroups and netns;
//!   set rules and routes in the pods' netns
//! * `CAP_SYS_ADMIN`: enter the pods' netns (`setns`), and load programs on kernels before 5.8
//! * `CAP_SYS_PTRACE`: open `/proc/PID/ns/net` of processes of other users
//! * `CAP_DAC_OVERRIDE`: only where the pods' cgroups or the run directory are not root's
//!
//! It reads the node's processes, cgroup2 tree and bpffs. It connects to the API server only with
//! `--kubernetes`, and opens a port only with `--metrics-address`.

use std::process::ExitCode;

use clap::Parser as _;

mod cli;

fn main() -> ExitCode {
    // Where the tunnel is built beside this, rustls has two to choose from.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    cli::run(cli::Cli::parse())
}
