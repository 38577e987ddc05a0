//! `watcher preflight`: says what this node lacks.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use adit_ebpf_loader::preflight::{Check, checks};
use clap::Args;
use serde_json::json;

use crate::observed::cgroups;

use super::{MountArgs, Output};

/// Say whether this node can run the watcher, and what it lacks; changes nothing
#[derive(Debug, Args)]
#[command(after_help = "Exit code 1: something is missing.

Examples:
  watcher preflight
  watcher preflight -o json | jq '.checks[] | select(.ok | not)'")]
pub struct PreflightArgs {
    #[command(flatten)]
    mounts: MountArgs,
    /// The cgroup above all pods [default: kubepods or kubepods.slice, else the root]
    #[arg(long, value_name = "DIR")]
    attach: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value = "human")]
    output: Output,
}

pub fn run(args: &PreflightArgs) -> anyhow::Result<ExitCode> {
    let root = args.mounts.root();
    let attach = args.attach.clone().map_or_else(|| cgroups::pods_dir(&root), |dir| root.join(dir));
    let checks = checks(&args.mounts.bpffs, &root, Some(&attach));
    let ok = checks.iter().all(|check| check.ok);
    let mut out = io::stdout().lock();
    match args.output {
        Output::Human => print_human(&mut out, checks.iter())?,
        Output::Json => {
            let list: Vec<_> = checks
                .iter()
                .map(|check| {
                    json!({"name": check.name, "ok": check.ok, "found": check.found, "needed": check.needed,
                        "advice": check.advice})
                })
                .collect();
            writeln!(out, "{}", json!({"ok": ok, "checks": list}))?;
        }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One line per check, and what to do about those that failed.
pub fn print_human<'a>(out: &mut dyn Write, checks: impl Iterator<Item = &'a Check>) -> io::Result<()> {
    for check in checks {
        let mark = if check.ok { "ok  " } else { "FAIL" };
        writeln!(out, "{mark} {}: {}", check.name, check.found)?;
        if !check.ok {
            writeln!(out, "     needed: {}", check.needed)?;
            writeln!(out, "     to do:  {}", check.advice)?;
        }
    }
    Ok(())
}
