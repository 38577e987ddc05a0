//! `watcher trace`: each verdict of the kernel programs, as it is given.

use std::{
    io::{self, Write as _},
    net::IpAddr,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Args;
use ipnet::IpNet;

use watcher::control::{Answer, Request, ask, trace::TraceLine};

use super::{NodeArgs, Output, no_watcher};

/// Print each verdict of the kernel programs until interrupted; they are silent again then
#[derive(Debug, Args)]
#[command(after_help = "The same verdicts stand in /sys/kernel/tracing/trace_pipe meanwhile.

Examples:
  watcher trace --pod client
  watcher trace --pod client --not-address 10.0.0.5 --not-address fd00::/8
  watcher trace --port 80 --address 10.0.2.3 -o json")]
pub(super) struct TraceArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Only verdicts about this pod: uid, name or namespace/name
    #[arg(long)]
    pod: Option<String>,
    /// Only verdicts about this port, at either end
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Only verdicts about this address, at either end
    #[arg(long)]
    address: Option<IpAddr>,
    /// No verdicts whose either end is in this range, or is this address; repeatable
    #[arg(long = "not-address", value_name = "CIDR", value_parser = cidr)]
    not_addresses: Vec<IpNet>,
    #[arg(short, long, value_enum, default_value = "human")]
    output: Output,
}

pub(super) fn run(args: &TraceArgs) -> anyhow::Result<ExitCode> {
    let request = Request::Trace {
        pod: args.pod.clone(),
        port: args.port,
        address: args.address,
        not_addresses: args.not_addresses.clone(),
    };
    let answers = ask::<TraceLine>(&args.node.socket(), &request).with_context(|| no_watcher(&args.node))?;
    for answer in answers {
        let line = match answer.context("the watcher's answer cannot be read")? {
            Answer::Ok(line) => line,
            Answer::Error(problem) => anyhow::bail!(problem),
        };
        let mut out = io::stdout().lock();
        match args.output {
            Output::Json => writeln!(out, "{}", serde_json::to_string(&line)?)?,
            Output::Human => writeln!(out, "{}", human(&line))?,
        }
        out.flush()?;
    }
    anyhow::bail!("the watcher ended")
}

/// A range, or an address, which is a range of one.
fn cidr(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "expected a CIDR or an address, such as 10.0.0.0/8".to_owned())
}

fn human(line: &TraceLine) -> String {
    let end = |address: std::net::SocketAddr, pod: &Option<String>| match pod {
        Some(pod) => format!("{address} ({pod})"),
        None => address.to_string(),
    };
    let caller = line.caller.as_ref().map(|pod| format!(" by {pod}")).unwrap_or_default();
    let (local, remote) = (end(line.local, &line.local_pod), end(line.remote, &line.remote_pod));
    format!("{:<9} {local} ↔ {remote}{caller}: {}", line.hook, line.rule)
}
