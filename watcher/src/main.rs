//! The binary. What it may do is what its tasks need:
//!
//! * `CAP_BPF` and `CAP_NET_ADMIN`: load the programs, write the maps, attach to cgroups and netns; rules and
//!   routes in the pods' netns
//! * `CAP_SYS_ADMIN`: enter the pods' netns (`setns`), and load programs on kernels before 5.8
//! * `CAP_SYS_PTRACE`: open `/proc/PID/ns/net` of processes of other users
//! * `CAP_DAC_OVERRIDE`: only where the pods' cgroups or the run directory are not root's
//!
//! It sees the node's processes, cgroup2 tree and bpffs, and opens no network connection and no port.

use std::process::ExitCode;

use clap::Parser as _;

mod cli;

fn main() -> ExitCode {
    cli::run(cli::Cli::parse())
}
