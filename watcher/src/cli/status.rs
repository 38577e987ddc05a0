//! `watcher status`: what the running watcher knows.

use std::{
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
    time::SystemTime,
};

use clap::{Args, ValueEnum};
use comfy_table::{Table, TableStyle};
use serde_json::json;

use watcher::{
    control::{
        Request,
        lists::{ListEntry, PodLists},
        status::{PodStatus, Status, VerdictStatus},
    },
    observe::events::SourceKind,
};

use super::{NodeArgs, Output, ask_once};

/// Show what the running watcher knows: pods and their states, tunnels, cgroups
#[derive(Debug, Args)]
#[command(
    after_help = "States of a pod: open (a tunnel carries its traffic), closed (refused until one does), bypassed \
(plaintext until one does), refused (cannot be enrolled; see the reason), plain (not enrolled by its labels).

Examples:
  watcher status
  watcher status pods -o json | jq '.pods[] | select(.state != \"open\")'
  watcher status verdicts
  watcher status lists --pod demo/client
  watcher status cgroups"
)]
pub(super) struct StatusArgs {
    /// Only this part
    #[arg(value_enum)]
    part: Option<Part>,
    /// With `lists`: only of this pod, by uid, name or namespace/name
    #[arg(long, value_name = "POD")]
    pod: Option<String>,
    #[command(flatten)]
    node: NodeArgs,
    #[arg(short, long, value_enum, default_value = "human")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Every pod, its state and why
    Pods,
    /// How often each rule decided about connections of each pod
    Verdicts,
    /// What excludes and includes connections, as the kernel's maps have it, and who wrote it
    Lists,
    /// Every cgroup of every pod
    Cgroups,
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    if args.part == Some(Part::Lists) {
        return print_lists(args);
    }
    anyhow::ensure!(args.pod.is_none(), "--pod goes with `watcher status lists`");
    let status: Status = ask_once(&args.node, &Request::Status)?;
    let mut out = io::stdout().lock();
    match (args.output, args.part) {
        (Output::Json, None) => writeln!(out, "{}", serde_json::to_string(&status)?)?,
        (Output::Json, Some(Part::Pods)) => writeln!(out, "{}", json!({"pods": status.pods}))?,
        (Output::Json, Some(Part::Verdicts)) => writeln!(out, "{}", verdicts_json(&status))?,
        (Output::Json, Some(Part::Lists)) => {}
        (Output::Json, Some(Part::Cgroups)) => writeln!(out, "{}", cgroups_json(&status.pods))?,
        (Output::Human, part) => {
            if part.is_none() {
                print_node(&mut out, &status)?;
            }
            let table = match part {
                None | Some(Part::Pods | Part::Lists) => pods_table(&status.pods),
                Some(Part::Verdicts) => verdicts_table(&status),
                Some(Part::Cgroups) => cgroups_table(&status.pods),
            };
            writeln!(out, "{table}")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_lists(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let lists: Vec<PodLists> = ask_once(&args.node, &Request::Lists { pod: args.pod.clone() })?;
    let mut out = io::stdout().lock();
    match args.output {
        Output::Json => writeln!(out, "{}", json!({"lists": lists}))?,
        Output::Human => writeln!(out, "{}", lists_table(&lists))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn lists_table(lists: &[PodLists]) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header(["NAMESPACE", "POD", "LIST", "ENTRY", "FROM"]);
    for pod in lists {
        for ListEntry { list, item, from, in_maps } in &pod.entries {
            let from = match (from.as_slice(), in_maps) {
                ([], _) => "nobody here".to_owned(),
                (from, true) => from.join("; "),
                (from, false) => format!("{} (not in force)", from.join("; ")),
            };
            table.add_row([pod.namespace.clone(), pod.name.clone(), list.clone(), item.clone(), from]);
        }
        if pod.left_out > 0 {
            let more = format!("{} more: name the pod by --pod", pod.left_out);
            table.add_row([pod.namespace.clone(), pod.name.clone(), "…".to_owned(), more, String::new()]);
        }
    }
    table
}

fn print_node(out: &mut dyn Write, status: &Status) -> io::Result<()> {
    writeln!(out, "node {}: watcher {}, attached to {}", status.node, status.pid, status.attached.display())?;
    let source = &status.source;
    let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let lasted = now.saturating_sub(source.since_unix_secs);
    match &source.error {
        Some(error) => {
            writeln!(
                out,
                "pods from {}: unavailable for {lasted} s; keeping the last known pods: {error}",
                source.name
            )?;
        }
        None if source.synced => writeln!(out, "pods from {}: up to date for {lasted} s", source.name)?,
        None => writeln!(out, "pods from {}: no pod list received for {lasted} s", source.name)?,
    }
    let events = &status.events;
    writeln!(
        out,
        "events from {}: {} received, {} lost, {} corrections; {}",
        events.source.map_or("nowhere yet", SourceKind::as_str),
        events.received,
        events.lost,
        events.corrections,
        if status.ready { "ready" } else { "not ready" }
    )?;
    for tunnel in &status.tunnels {
        writeln!(out, "tunnel {} in {}: serves {} pods", tunnel.pid, tunnel.cgroup.display(), tunnel.pods)?;
    }
    if status.tunnels.is_empty() {
        writeln!(out, "no tunnel is connected")?;
    }
    if let Some(reason) = &status.rejected_tunnel {
        writeln!(out, "a tunnel was rejected ({}): {}", reason.code, reason.text)?;
    }
    for draining in &status.draining {
        writeln!(
            out,
            "netns {} of pod {} waits for {}",
            draining.netns.inode, draining.uid, draining.waits_for
        )?;
    }
    for problem in &status.problems {
        writeln!(out, "problem: {problem}")?;
    }
    writeln!(out)
}

fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn pods_table(pods: &[PodStatus]) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header([
        "NAMESPACE",
        "NAME",
        "STATE",
        "ADDRESSES",
        "NETNS",
        "WHY",
    ]);
    for pod in pods {
        let state = serde_json::to_value(pod.state).ok().and_then(|state| state.as_str().map(str::to_owned));
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        // A pod that is not open because of it says it once.
        let doubt = pod.not_observed.iter().filter(|_| pod.not_observed != pod.reason);
        let mut why: Vec<String> = pod
            .reason
            .iter()
            .chain(doubt)
            .map(|reason| format!("{}: {}", reason.code, reason.text))
            .collect();
        why.extend(pod.reserved_ports.iter().map(ToString::to_string));
        why.extend(pod.notes.iter().cloned());
        table.add_row([
            or_dash(pod.namespace.as_ref()),
            or_dash(pod.name.as_ref().or(pod.uid.as_ref())),
            or_dash(state),
            if addresses.is_empty() { "-".to_owned() } else { addresses.join(" ") },
            or_dash(pod.netns.map(|netns| netns.inode)),
            why.join("; "),
        ]);
    }
    table
}

/// How often each rule decided about each pod, as one flat list; without a pod: about all others.
fn verdicts_json(status: &Status) -> serde_json::Value {
    let of_pod = |pod: &PodStatus, verdict: &VerdictStatus| json!({"pod": pod.name, "namespace": pod.namespace, "uid": pod.uid, "rule": verdict.rule, "count": verdict.count});
    let pods =
        status.pods.iter().flat_map(|pod| pod.verdicts.iter().map(move |verdict| of_pod(pod, verdict)));
    let others = status.other_verdicts.iter();
    let others = others.map(|verdict| json!({"pod": null, "rule": verdict.rule, "count": verdict.count}));
    json!({"verdicts": pods.chain(others).collect::<Vec<_>>()})
}

fn verdicts_table(status: &Status) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header(["NAMESPACE", "POD", "COUNT", "RULE"]);
    let mut row = |namespace, pod, verdict: &VerdictStatus| {
        table.add_row([namespace, pod, verdict.count.to_string(), verdict.rule.clone()]);
    };
    for pod in &status.pods {
        for verdict in &pod.verdicts {
            row(or_dash(pod.namespace.as_ref()), or_dash(pod.name.as_ref().or(pod.uid.as_ref())), verdict);
        }
    }
    for verdict in &status.other_verdicts {
        row("-".to_owned(), "-".to_owned(), verdict);
    }
    table
}

/// Every cgroup of every pod, as one flat list.
fn cgroups_json(pods: &[PodStatus]) -> serde_json::Value {
    let list: Vec<_> = pods
        .iter()
        .flat_map(|pod| {
            pod.cgroups.iter().map(move |(path, id)| {
                json!({"id": id, "path": path, "pod": pod.name, "namespace": pod.namespace, "uid": pod.uid,
                    "state": pod.state, "addresses": pod.addresses})
            })
        })
        .collect();
    json!({"cgroups": list})
}

fn cgroups_table(pods: &[PodStatus]) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header(["CGROUP ID", "POD", "PATH"]);
    for pod in pods {
        for (path, id) in &pod.cgroups {
            table.add_row([id.to_string(), or_dash(pod.name.as_ref()), path.display().to_string()]);
        }
    }
    table
}
