//! `ztunnel status`: the state of the tunnel on this node.

use std::{
    fmt::Write as _,
    io::{Read, Write as _},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use super::Output;

/// Longer than listing the largest mesh takes.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Shows pods, connections, certificates and failures of the tunnel on this node.
///
/// Exit code 0: ready; 3: not ready, and the first line lists what is pending; 1: no answer.
#[derive(Args)]
#[command(after_help = "Examples:
  ztunnel status                                   for people
  ztunnel status -o json | jq .connections         for programs
  kubectl exec -n adit-system ds/ztunnel -- ztunnel status")]
pub(crate) struct Status {
    /// Address of its admin server.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15000", env = "ADMIN_ADDR")]
    admin: String,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

pub(crate) fn run(arguments: &Status) -> Result<ExitCode> {
    let body = get(&arguments.admin, "/status")?;
    let status: Value = serde_json::from_str(&body).context("the answer is not JSON")?;
    let text = match arguments.output {
        Output::Json => serde_json::to_string_pretty(&status)? + "\n",
        Output::Yaml => bail!("status supports -o text and -o json"),
        Output::Text => human(&status),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(if status["ready"] == true { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

/// One request over HTTP/1.0, whose response ends with the connection.
fn get(admin: &str, path: &str) -> Result<String> {
    let request = || -> Result<String> {
        let address: SocketAddr = admin.replace("localhost:", "127.0.0.1:").parse()?;
        let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = request().with_context(|| {
        format!(
            "cannot query the tunnel at {admin}: is it running, in this network namespace? (--admin ADDRESS)"
        )
    })?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let line = head.lines().next().unwrap_or_default();
    if line.split(' ').nth(1) != Some("200") {
        bail!("{admin} answers {line:?} to {path}: is it the tunnel's admin server?");
    }
    Ok(body.to_owned())
}

fn human(status: &Value) -> String {
    let mut text = String::new();
    let ready = if status["ready"] == true {
        "ready".to_owned()
    } else {
        format!("not ready, pending: {}", list(&status["pending"]))
    };
    let _ = writeln!(
        text,
        "{}: {ready}; version {}, up {} s; {} connections open, {} tunnels to peers with {} streams",
        shown(&status["node"]),
        shown(&status["version"]),
        status["upSecs"],
        status["connectionsOpen"],
        status["tunnels"],
        status["streams"]
    );
    if let Some(age) = status["lastState"]["inForceAgeSecs"].as_u64() {
        let _ = writeln!(
            text,
            "the control plane has not answered since the start: going on with what it told {age} s ago"
        );
    }
    if let Some(error) = status["lastState"]["error"].as_str() {
        let _ = writeln!(text, "the last state of the control plane is not kept: {}", shown(&error.into()));
    }
    let pods = ["namespace", "name", "serviceAccount", "state", "inbound", "outbound"];
    table(&mut text, "pods", &pods, &status["pods"]);
    let connections = [
        "direction",
        "src",
        "originalDst",
        "actualDst",
        "protocol",
        "peer",
        "bytesSent",
        "bytesReceived",
        "ageSecs",
    ];
    table(&mut text, "connections", &connections, &status["connections"]);
    table(
        &mut text,
        "certificates",
        &["identity", "state", "expiresInSecs", "error"],
        &status["certificates"],
    );
    table(&mut text, "failures", &["direction", "reason", "count"], &status["failures"]);
    let last = ["secondsAgo", "direction", "src", "dst", "reason", "error"];
    table(&mut text, "last failures", &last, &status["lastFailures"]);
    text
}

fn table(text: &mut String, title: &str, columns: &[&str], rows: &Value) {
    let rows = rows.as_array().map_or(&[][..], Vec::as_slice);
    if rows.is_empty() {
        let _ = writeln!(text, "\n{title}: none");
        return;
    }
    let mut cells: Vec<Vec<String>> = vec![columns.iter().map(|column| (*column).to_owned()).collect()];
    cells.extend(rows.iter().map(|row| columns.iter().map(|column| shown(&row[*column])).collect()));
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let _ = writeln!(text, "\n{title}:");
    for row in &cells {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "  {}", line.join("  ").trim_end());
    }
}

/// Replaces control characters, since names are chosen by others and the output may be a terminal.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

fn list(value: &Value) -> String {
    let names = value.as_array().into_iter().flatten().map(shown);
    names.collect::<Vec<_>>().join(", ")
}
