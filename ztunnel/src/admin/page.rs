//! The page at `/`: pods, connections and certificates at a glance, for a reader who need not know Istio. It loads
//! nothing, runs nothing, and follows the browser's light or dark theme.

use std::fmt::{self, Display, Write};

use super::overview::Overview;
use crate::metrics::open::ConnectionView;

/// Rows of the table of connections: enough to see, little enough to scroll.
const ROWS: usize = 100;

const STYLE: &str = include_str!("page.css");

/// The whole document.
pub(super) fn page(overview: &Overview) -> String {
    let mut html = String::new();
    // Writing to a String does not fail.
    let _ = write(&mut html, overview);
    html
}

/// Text from pods, peers and the control plane stays text.
struct Text<T>(T);

impl<T: Display> Display for Text<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.to_string().chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
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

fn write(html: &mut String, overview: &Overview) -> fmt::Result {
    let node = if overview.node.is_empty() { "this node" } else { &overview.node };
    write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>Tunnel of {0}</title><style>{STYLE}</style></head><body>\n\
         <header><h1>Tunnel of {0}</h1>",
        Text(node)
    )?;
    if overview.ready {
        html.push_str("<span class=\"pill good\">ready</span>");
    } else {
        write!(html, "<span class=\"pill bad\">not ready: {}</span>", Text(overview.pending.join(", ")))?;
    }
    writeln!(
        html,
        "<span class=\"quiet\">version {} · up {}</span></header>\n\
         <p class=\"quiet lead\">Carries the TCP connections of this node's enrolled pods to other pods, encrypted and with \
         both ends proven by certificates.</p>",
        overview.version,
        Lasts(overview.up_secs)
    )?;
    html.push_str("<div class=\"tiles\">\n");
    tiles(html, overview)?;
    html.push_str("</div>\n");
    pods(html, overview)?;
    connections(html, overview)?;
    certificates(html, overview)?;
    failures(html, overview)?;
    html.push_str(
        "<footer>More: <a href=\"config_dump\">everything as JSON</a> · <a href=\"status\">this page as JSON</a> · \
         <a href=\"debug/pprof/profile?seconds=10\">CPU profile, 10 s</a> · <a href=\"debug/pprof/heap\">heap profile</a>. \
         On a shell: <code>ztunnel status</code>, <code>curl -X POST localhost:15000/logging?level=debug</code> \
         (<code>?reset</code> undoes it), <code>curl -X POST localhost:15000/quitquitquit</code> (drains and \
         exits).</footer></body></html>\n",
    );
    Ok(())
}

fn tiles(html: &mut String, overview: &Overview) -> fmt::Result {
    let failed: u64 = overview.failures.iter().map(|failure| failure.count).sum();
    let soon = |seconds: u64| seconds < 3600;
    let sick = overview
        .certificates
        .iter()
        .filter(|one| one.state != "Available" || one.expires_in_secs.is_some_and(soon))
        .count();
    let waiting = overview.pods.iter().filter(|pod| pod.state != "Up").count();
    let mut tile = |value: String, name: &str, note: String, bad: bool| {
        let class = if bad { "tile bad" } else { "tile" };
        writeln!(html, "<div class=\"{class}\"><b>{value}</b><span>{name}</span><small>{note}</small></div>")
    };
    tile(
        overview.pods.len().to_string(),
        "pods",
        if waiting == 0 { "all served".to_owned() } else { format!("{waiting} not served yet") },
        waiting > 0,
    )?;
    tile(
        overview.connections_open.to_string(),
        "open connections",
        format!("{} tunnels to peers, {} streams", overview.tunnels, overview.streams),
        false,
    )?;
    tile(
        overview.certificates.len().to_string(),
        "certificates",
        if sick == 0 { "all valid".to_owned() } else { format!("{sick} need attention") },
        sick > 0,
    )?;
    tile(failed.to_string(), "failed connections", "since the start".to_owned(), false)
}

/// A table in a section of its own; without rows, what that means.
fn section(html: &mut String, title: &str, about: &str, head: &[&str], rows: &[String]) -> fmt::Result {
    write!(html, "<section><h2>{title}</h2><p class=\"quiet\">{about}</p>")?;
    if rows.is_empty() {
        return writeln!(html, "<p class=\"none\">None.</p></section>");
    }
    html.push_str("<div class=\"scroll\"><table><thead><tr>");
    for cell in head {
        write!(html, "<th>{cell}</th>")?;
    }
    html.push_str("</tr></thead><tbody>\n");
    for row in rows {
        writeln!(html, "<tr>{row}</tr>")?;
    }
    writeln!(html, "</tbody></table></div></section>")
}

fn pods(html: &mut String, overview: &Overview) -> fmt::Result {
    let row = |pod: &super::overview::PodOverview| {
        let state = if pod.state == "Up" {
            "<span class=\"pill good\">served</span>"
        } else {
            "<span class=\"pill bad\">not yet</span>"
        };
        format!(
            "<td>{}</td><td>{}</td><td>{}</td><td>{state}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>",
            Text(&pod.name),
            Text(&pod.namespace),
            Text(&pod.service_account),
            pod.inbound,
            pod.outbound
        )
    };
    let rows: Vec<_> = overview.pods.iter().map(row).collect();
    let head = ["pod", "namespace", "service account", "state", "inbound", "outbound"];
    section(
        html,
        "Pods",
        "Enrolled pods of this node, and how many connections come in and go out now.",
        &head,
        &rows,
    )
}

fn connections(html: &mut String, overview: &Overview) -> fmt::Result {
    let row = |view: &ConnectionView| {
        let pod = format!("{}/{}", view.pod.0, view.pod.1);
        let peer = view.peer.as_deref().unwrap_or("outside the mesh");
        let arrow = if view.direction == "inbound" { "←" } else { "→" };
        let secured = if view.protocol == "HBONE" {
            "<span class=\"pill good\">encrypted</span>"
        } else {
            "<span class=\"pill\">plain TCP</span>"
        };
        // Inside the tunnel, which is what the client wanted; below it, what is on the wire.
        let dialled = view.original_dst.as_deref().unwrap_or_default();
        let (target, wire) = match view.direction {
            "inbound" => (&*view.actual_dst, dialled),
            _ => (dialled, &*view.actual_dst),
        };
        let towards = view.service.as_deref().unwrap_or(target);
        format!(
            "<td>{}</td><td>{arrow}</td><td>{}</td><td>{}<br><small>{} → {}</small></td><td>{secured}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>",
            Text(pod),
            Text(peer),
            Text(towards),
            Text(view.src),
            Text(wire),
            Size(view.bytes_sent),
            Size(view.bytes_received),
            Lasts(view.age.as_secs())
        )
    };
    let rows: Vec<_> = overview.connections.iter().take(ROWS).map(row).collect();
    let about = if overview.connections_open > rows.len() {
        format!("The first {} of {} open ones.", rows.len(), overview.connections_open)
    } else {
        "Open now. → from a pod of this node, ← to one; bytes as the client sees them.".to_owned()
    };
    let head = ["pod here", "", "other end", "towards", "on the wire", "sent", "received", "age"];
    section(html, "Connections", &about, &head, &rows)
}

fn certificates(html: &mut String, overview: &Overview) -> fmt::Result {
    let row = |one: &super::overview::CertificateOverview| {
        let (class, word) = match one.state {
            "Available" => ("good", "valid"),
            "Initializing" => ("", "being fetched"),
            "Expired" => ("bad", "expired"),
            _ => ("bad", "cannot be had"),
        };
        let left = one.expires_in_secs.map_or_else(|| "–".to_owned(), |left| Lasts(left).to_string());
        let error = one.error.as_deref().unwrap_or_default();
        format!(
            "<td>{}</td><td><span class=\"pill {class}\">{word}</span></td><td class=\"n\">{left}</td><td>{}</td>",
            Text(&one.identity),
            Text(error)
        )
    };
    let rows: Vec<_> = overview.certificates.iter().map(row).collect();
    let about = "Who the pods of this node are to others. Renewed by themselves at half of their life.";
    section(html, "Certificates", about, &["identity", "state", "holds for", "last problem"], &rows)
}

fn failures(html: &mut String, overview: &Overview) -> fmt::Result {
    let row = |failure: &super::overview::FailureCount| {
        format!(
            "<td><code>{}</code></td><td>{}</td><td>{}</td><td class=\"n\">{}</td>",
            Text(failure.reason),
            Text(failure.reason.meaning()),
            failure.direction,
            failure.count
        )
    };
    let rows: Vec<_> = overview.failures.iter().map(row).collect();
    let about = "By reason, since the start: the same words as in the log and in metric \
                 <code>ztunnel_connection_failures_total</code>.";
    section(
        html,
        "Failed connections",
        about,
        &["reason", "what happened", "direction", "how often"],
        &rows,
    )?;
    let row = |last: &super::overview::LastFailure| {
        format!(
            "<td class=\"n\">{} ago</td><td>{}</td><td>{}</td><td><code>{}</code></td><td>{}</td>",
            Lasts(last.seconds_ago),
            Text(last.failed.src),
            Text(last.failed.dst),
            Text(last.failed.reason),
            Text(&last.failed.error)
        )
    };
    let rows: Vec<_> = overview.last_failures.iter().map(row).collect();
    let head = ["when", "from", "to", "reason", "what happened"];
    section(html, "The last of them", "The latest first, at most fifty.", &head, &rows)
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
    fn what_others_name_themselves_stays_text() {
        assert_eq!(Text("<script>\"&'").to_string(), "&lt;script&gt;&quot;&amp;&#39;");
    }
}
