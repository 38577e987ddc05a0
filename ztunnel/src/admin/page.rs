//! The page at `/`: pods, connections and certificates at a glance, for a reader who need not know
//! Istio. It loads nothing, runs no script, and follows the browser's light or dark theme.
//!
//! `maud` escapes every value by its type, so that names chosen by pods, peers and the control
//! plane stay text.

use std::fmt::{self, Display};

use maud::{DOCTYPE, Markup, PreEscaped, display, html};

use super::overview::{CertificateOverview, FailureCount, LastFailure, Overview, PodOverview};
use crate::metrics::open::ConnectionView;

/// Rows of the table of connections. `/status` lists more.
const ROWS: usize = 100;

const STYLE: PreEscaped<&str> = PreEscaped(include_str!("page.css"));

/// The whole document.
pub(super) fn page(overview: &Overview) -> Markup {
    let node = if overview.node.is_empty() { "this node" } else { &overview.node };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Tunnel of " (node) }
                style { (STYLE) }
            }
            body {
                header {
                    h1 { "Tunnel of " (node) }
                    @if overview.ready {
                        (pill("good", "ready"))
                    } @else {
                        (pill("bad", &format!("not ready: {}", overview.pending.join(", "))))
                    }
                    @if let Some(age) = overview.last_state.as_ref().and_then(|state| state.in_force_age_secs) {
                        (pill("bad", &format!("as the control plane told it {} ago", Lasts(age))))
                    }
                    span.quiet { "version " (overview.version) " · up " (display(Lasts(overview.up_secs))) }
                }
                p."quiet lead" {
                    "Carries the TCP connections of this node's enrolled pods to other pods, encrypted and \
                     with both ends authenticated by certificates."
                }
                .tiles { (tiles(overview)) }
                (pods(overview))
                (connections(overview))
                (certificates(overview))
                (failures(overview))
                (last_failures(overview))
                (footer())
            }
        }
    }
}

fn footer() -> Markup {
    html! {
        footer {
            "More: " a href="config_dump" { "everything as JSON" }
            " · " a href="status" { "this page as JSON" }
            " · " a href="debug/pprof/profile?seconds=10" { "CPU profile, 10 s" }
            " · " a href="debug/pprof/heap" { "heap profile" }
            ". On a shell: " code { "ztunnel status" }
            ", " code { "curl -X POST localhost:15000/logging?level=debug" }
            " (" code { "?reset" } " undoes it), "
            code { "curl -X POST localhost:15000/quitquitquit" } " (drains and exits)."
        }
    }
}

fn pill(class: &str, word: &str) -> Markup {
    html! { span class={ "pill " (class) } { (word) } }
}

fn tiles(overview: &Overview) -> Markup {
    let failed: u64 = overview.failures.iter().map(|failure| failure.count).sum();
    let soon = |seconds: u64| seconds < 3600;
    let needs_attention =
        |one: &&CertificateOverview| one.state != "Available" || one.expires_in_secs.is_some_and(soon);
    let sick = overview.certificates.iter().filter(needs_attention).count();
    let waiting = overview.pods.iter().filter(|pod| pod.state != "Up").count();
    let tile = |value: String, name: &str, note: String, bad: bool| {
        html! { .tile .bad[bad] { b { (value) } span { (name) } small { (note) } } }
    };
    let served = if waiting == 0 { "all served".to_owned() } else { format!("{waiting} not served yet") };
    let carried = format!("{} tunnels to peers, {} streams", overview.tunnels, overview.streams);
    let valid = if sick == 0 { "all valid".to_owned() } else { format!("{sick} need attention") };
    html! {
        (tile(overview.pods.len().to_string(), "pods", served, waiting > 0))
        (tile(overview.connections_open.to_string(), "open connections", carried, false))
        (tile(overview.certificates.len().to_string(), "certificates", valid, sick > 0))
        (tile(failed.to_string(), "failed connections", "since the start".to_owned(), false))
    }
}

/// A table in a section of its own, with `None.` in place of a table without rows.
fn section(title: &str, about: &Markup, head: &[&str], rows: &[Markup]) -> Markup {
    html! {
        section {
            h2 { (title) }
            p.quiet { (about) }
            @if rows.is_empty() {
                p.none { "None." }
            } @else {
                .scroll {
                    table {
                        thead { tr { @for cell in head { th { (cell) } } } }
                        tbody { @for row in rows { tr { (row) } } }
                    }
                }
            }
        }
    }
}

fn pods(overview: &Overview) -> Markup {
    let row = |pod: &PodOverview| {
        html! {
            td { (pod.name) }
            td { (pod.namespace) }
            td { (pod.service_account) }
            td { @if pod.state == "Up" { (pill("good", "served")) } @else { (pill("bad", "not yet")) } }
            td.n { (pod.inbound) }
            td.n { (pod.outbound) }
        }
    };
    let rows: Vec<_> = overview.pods.iter().map(row).collect();
    let about = html! { "Enrolled pods of this node, and the number of their open connections." };
    let head = ["pod", "namespace", "service account", "state", "inbound", "outbound"];
    section("Pods", &about, &head, &rows)
}

fn connections(overview: &Overview) -> Markup {
    let rows: Vec<_> = overview.connections.iter().take(ROWS).map(connection).collect();
    let about = html! {
        @if overview.connections_open > rows.len() {
            "The first " (rows.len()) " of " (overview.connections_open) " open ones."
        } @else {
            "Open now. → from a pod of this node, ← to one; bytes as the client sees them."
        }
    };
    let head = ["pod here", "", "other end", "towards", "on the wire", "sent", "received", "age"];
    section("Connections", &about, &head, &rows)
}

fn connection(view: &ConnectionView) -> Markup {
    let (namespace, name) = &view.pod;
    let dialled = view.original_dst.as_deref().unwrap_or_default();
    // The target is the address that the client wanted, inside the tunnel; the wire shows the other
    // one.
    let (target, wire) = match view.direction {
        "inbound" => (&*view.actual_dst, dialled),
        _ => (dialled, &*view.actual_dst),
    };
    html! {
        td { (namespace) "/" (name) }
        td { @if view.direction == "inbound" { "←" } @else { "→" } }
        td { (view.peer.as_deref().unwrap_or("outside the mesh")) }
        td { (view.service.as_deref().unwrap_or(target)) br; small { (display(view.src)) " → " (wire) } }
        td {
            @if view.protocol == "HBONE" {
                (pill("good", "encrypted"))
            } @else {
                span.pill { "plain TCP" }
            }
        }
        td.n { (display(Size(view.bytes_sent))) }
        td.n { (display(Size(view.bytes_received))) }
        td.n { (display(Lasts(view.age.as_secs()))) }
    }
}

fn certificates(overview: &Overview) -> Markup {
    let row = |one: &CertificateOverview| {
        let (class, word) = match one.state {
            "Available" => ("good", "valid"),
            "Initializing" => ("", "being fetched"),
            "Expired" => ("bad", "expired"),
            _ => ("bad", "unavailable"),
        };
        html! {
            td { (one.identity) }
            td { (pill(class, word)) }
            td.n { @if let Some(left) = one.expires_in_secs { (display(Lasts(left))) } @else { "–" } }
            td { (one.error.as_deref().unwrap_or_default()) }
        }
    };
    let rows: Vec<_> = overview.certificates.iter().map(row).collect();
    let about = html! {
        "Identities of this node's pods. The tunnel renews them after half of their lifetime."
    };
    section("Certificates", &about, &["identity", "state", "expires in", "last error"], &rows)
}

fn failures(overview: &Overview) -> Markup {
    let row = |failure: &FailureCount| {
        html! {
            td { code { (display(failure.reason)) } }
            td { (failure.reason.meaning()) }
            td { (failure.direction) }
            td.n { (failure.count) }
        }
    };
    let rows: Vec<_> = overview.failures.iter().map(row).collect();
    let about = html! {
        "By reason, since the start: the same words as in the log and in metric "
        code { "ztunnel_connection_failures_total" } "."
    };
    section("Failed connections", &about, &["reason", "what happened", "direction", "how often"], &rows)
}

fn last_failures(overview: &Overview) -> Markup {
    let row = |last: &LastFailure| {
        html! {
            td.n { (display(Lasts(last.seconds_ago))) " ago" }
            td { (display(last.failed.src)) }
            td { (display(last.failed.dst)) }
            td { code { (display(last.failed.reason)) } }
            td { (last.failed.error) }
        }
    };
    let rows: Vec<_> = overview.last_failures.iter().map(row).collect();
    let about = html! { "Newest first, at most fifty." };
    section("Last failures", &about, &["when", "from", "to", "reason", "what happened"], &rows)
}

/// `3 d 4 h`, `5 min 6 s`: the two greatest units.
struct Lasts(u64);

impl Display for Lasts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0;
        let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
        match (days, hours, minutes) {
            (0, 0, 0) => write!(f, "{seconds} s"),
            (0, 0, _) => write!(f, "{minutes} min {} s", seconds % 60),
            (0, ..) => write!(f, "{hours} h {minutes} min"),
            _ => write!(f, "{days} d {hours} h"),
        }
    }
}

/// `1.5 MiB`.
struct Size(u64);

impl Display for Size {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        for unit in ["B", "KiB", "MiB", "GiB"] {
            if value < 1024.0 {
                return if unit == "B" { write!(f, "{value} B") } else { write!(f, "{value:.1} {unit}") };
            }
            value /= 1024.0;
        }
        write!(f, "{value:.1} TiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_for_people() {
        for (seconds, text) in
            [(0, "0 s"), (61, "1 min 1 s"), (3_660, "1 h 1 min"), (90_000, "1 d 1 h"), (59, "59 s")]
        {
            assert_eq!(Lasts(seconds).to_string(), text);
        }
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 40, "1.0 TiB")] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn names_chosen_by_others_stay_text() {
        let pod = PodOverview {
            namespace: "<script>".to_owned(),
            name: "\"&'</td>".to_owned(),
            service_account: String::new(),
            state: "Up".to_owned(),
            inbound: 0,
            outbound: 0,
        };
        let overview = Overview { node: "<b>".to_owned(), pods: vec![pod], ..Overview::default() };
        let page = page(&overview).into_string();
        assert!(page.contains("<title>Tunnel of &lt;b&gt;</title>"), "{page}");
        assert!(page.contains("<td>&quot;&amp;'&lt;/td&gt;</td><td>&lt;script&gt;</td>"), "{page}");
    }
}
