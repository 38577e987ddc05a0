//! Why a connection failed, in one word: the `reason` of its access record, of
//! `ztunnel_connection_failures_total`, of `ztunnel status` and of the admin page.
//!
//! To add a reason, add a row to the table and to `docs/reasons.md`, which a test compares with it.

use std::fmt;

use serde::{Serialize, Serializer};

/// Whether a cause goes away without anybody changing something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lasts {
    /// Such as a peer that restarts: the next connections may succeed.
    Passes,
    /// Until somebody changes configuration, policy or a program.
    Stays,
}

/// What the table says of a reason.
struct Row {
    code: &'static str,
    lasts: Lasts,
    meaning: &'static str,
    advice: &'static str,
}

macro_rules! reasons {
    ($($name:ident = $code:literal, $lasts:ident, $meaning:literal, $advice:literal;)+) => {
        /// Why a connection failed. The set is closed and its codes are stable: dashboards and
        /// alerts rely on them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum FailureReason {
            $(#[doc = $meaning] $name,)+
        }

        impl FailureReason {
            /// All of them, by their codes.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            fn row(self) -> Row {
                match self {
                    $(Self::$name => Row {
                        code: $code,
                        lasts: Lasts::$lasts,
                        meaning: $meaning,
                        advice: $advice,
                    },)+
                }
            }
        }
    };
}

reasons! {
    Authority = "authority", Stays,
        "a peer's CONNECT request names no valid address and port",
        "The peer does not speak HBONE. Check which program connects to port 15008.";
    Broken = "broken", Passes,
        "the connection broke while it was open: a reset, or a peer that no longer answers",
        "The record's error names the side. A reset by an application comes from that application.";
    ClientLeft = "client_left", Passes,
        "the client gave up before its destination was connected",
        "Look for a slow destination: the client's own timeout is shorter than the connect took.";
    Connect = "connect", Passes,
        "the destination refused the connection or did not answer",
        "Check that the application listens and that no NetworkPolicy blocks the connection.";
    Cut = "cut", Passes,
        "the tunnel closed the connection: the pod was deleted, or the drain deadline passed",
        "Expected when a pod or the tunnel stops. For longer drains raise `drain.deadline`.";
    Denied = "denied", Stays,
        "authorization policy forbids the connection",
        "The record names the policy that denies it, or says that no policy allows it.";
    H2 = "h2", Passes,
        "the HTTP/2 connection of a peer broke",
        "Read the log of the peer's tunnel at the same time.";
    H2Handshake = "h2_handshake", Stays,
        "HTTP/2 with the peer's tunnel could not start",
        "Check which program listens on port 15008 of the peer.";
    H2Stream = "h2_stream", Passes,
        "the peer's tunnel went away before it answered",
        "Check whether the peer's tunnel is restarting.";
    HalfClosedLimit = "half_closed_limit", Stays,
        "one side closed, and the other sent nothing for as long as is allowed",
        "Check whether the other application hangs; otherwise raise `stream.half_closed_limit`.";
    Identity = "identity", Passes,
        "the tunnel has no certificate for the pod",
        "`ztunnel status` shows the pod's certificate and its last error.";
    IdleLimit = "idle_limit", Stays,
        "no data moved for as long as is allowed",
        "Expected with a limit. Raise `stream.idle_limit`, or let the application send keepalives.";
    InvalidRequest = "invalid_request", Stays,
        "the CONNECT request to the peer cannot be written",
        "A name from the control plane holds a character that no header may hold. Report it.";
    IpMismatch = "ip_mismatch", Stays,
        "a peer requested another address than the one it dialled",
        "The peer's view of the mesh is outdated or wrong, or the peer is not honest.";
    Lookup = "lookup", Passes,
        "the endpoint has only a host name, and no resolver gave an address for it",
        "Query the node's resolver (`dns.upstream`, or `/etc/resolv.conf`) for the name in the record.";
    Method = "method", Stays,
        "a peer sent a request other than CONNECT",
        "The peer does not speak HBONE. Check which program connects to port 15008.";
    NoAnswer = "no_answer", Passes,
        "the peer's tunnel did not answer the request in time (`hbone.answer_limit`)",
        "Check whether the application's node is overloaded. Read the log of the peer's tunnel.";
    NoGateway = "no_gateway", Stays,
        "the destination is on another network, and no gateway into that network is known",
        "Check that the network has an east-west gateway. A pod may be reachable by its service only.";
    NoHealthyUpstream = "no_healthy_upstream", Passes,
        "the service has no endpoint that may be used",
        "Check that its pods are ready; `/config_dump` shows what the tunnel knows.";
    NoOriginalDst = "no_original_dst", Stays,
        "the address that the application dialled cannot be found",
        "Check that the watcher (or the CNI agent) runs: `watcher status`.";
    NoSuchPort = "no_such_port", Stays,
        "the service does not have the dialled port, or no endpoint serves it",
        "Compare the dialled port with the ports of the service.";
    NoWaypoint = "no_waypoint", Passes,
        "the destination's waypoint is unknown or has no healthy endpoint in the pod's network",
        "Check that the waypoint's pods are ready. Traffic never bypasses a waypoint.";
    NotOwnAddress = "not_own_address", Stays,
        "a plaintext connection that came to the pod is for an address that is not the pod's",
        "A neighbour on the pod's network sends it the traffic of others. If the address is the pod's, add it to its interface.";
    PolicyChange = "policy_change", Stays,
        "a change of policy forbids a connection that was open",
        "Expected. `/config_dump` shows the policy.";
    Recursive = "recursive", Stays,
        "a client dialled one of the tunnel's own ports",
        "No client should. The record's `src` names the client.";
    RefusedByPeer = "refused_by_peer", Stays,
        "the peer's tunnel refused the request; the record has its HTTP status",
        "401: policy of the peer. 503: the application there. Read the log of the peer's tunnel.";
    Revoked = "revoked", Stays,
        "a certificate of the peer, or of its issuer, is on a revocation list (`tls.crl`)",
        "Expected after a compromise. Issue a new certificate; the peer's `/config_dump` has its serial number.";
    Tls = "tls", Stays,
        "the TLS handshake with the peer failed: no common root, another identity, or an expired certificate",
        "The record's error has the expected and the presented identity.";
    TooManyConnections = "too_many_connections", Passes,
        "the pod holds as many file descriptors as one pod may",
        "Look for connections that are never closed; otherwise raise the limit of open files, or `budget.pod_descriptors`.";
    TooManyDials = "too_many_dials", Passes,
        "too many connects to the pod's applications wait for an answer (`budget.pod_dials`)",
        "Check whether an application of the pod hangs, or whether somebody scans its ports.";
    TooManyHandshakes = "too_many_handshakes", Passes,
        "too many peers have begun a TLS handshake with the pod and not ended it (`budget.pod_handshakes`)",
        "Check whether somebody floods port 15008 of the pod.";
    TooManyUnanswered = "too_many_unanswered", Passes,
        "1,024 names that the pod's connections need have no answer of the control plane yet (`xds.on_demand`)",
        "Check the connection to the control plane. With one, find out why the pod dials so many addresses.";
    Unanswered = "unanswered", Passes,
        "the control plane did not resolve the destination within 5 s (`xds.on_demand`)",
        "Check the connection to the control plane. Until then unknown destinations are refused, not sent in plaintext.";
    UnknownGateway = "unknown_gateway", Passes,
        "the gateway of the destination's network is unknown or has no healthy endpoint",
        "Check that the gateway's pods are ready; `/config_dump` shows what the tunnel knows.";
    UnknownHost = "unknown_host", Stays,
        "a peer requested a host name that is not known here",
        "Check whether the peer's control plane knows more than ours.";
    UnknownPolicy = "unknown_policy", Passes,
        "the pod's workload names a policy of which the control plane has said nothing",
        "The record names the policy. Check the connection to the control plane, or that the policy is in the mesh file.";
    UnknownWorkload = "unknown_workload", Passes,
        "no source described the pod's own workload within 5 s",
        "Check the connection to the control plane, or that the pod is in the mesh file.";
    Untrusted = "untrusted", Stays,
        "clients of the peer's trust domain are no longer accepted: it is no alias of this mesh (`node.trust_domain_aliases`), and the control plane does not list it",
        "Expected at the end of a migration. The record has the identity of the client.";
}

impl FailureReason {
    /// The word in logs and metrics, such as `no_such_port`.
    #[must_use]
    pub fn code(self) -> &'static str {
        self.row().code
    }

    /// What happened, in a sentence without a full stop.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        self.row().meaning
    }

    /// What an operator can do about it.
    #[must_use]
    pub fn advice(self) -> &'static str {
        self.row().advice
    }

    /// Whether the cause usually goes away by itself, as a restart of the peer does. Others fail
    /// again until somebody changes configuration, policy or a program.
    #[must_use]
    pub fn is_transient(self) -> bool {
        self.row().lasts == Lasts::Passes
    }
}

impl fmt::Display for FailureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

impl Serialize for FailureReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::FailureReason;

    #[test]
    fn every_reason_is_listed_once_by_its_code() {
        let codes: Vec<&str> = FailureReason::ALL.iter().map(|reason| reason.code()).collect();
        assert!(codes.is_sorted_by(|one, next| one < next), "{codes:?}");
    }

    /// The table of the tunnel in `docs/reasons.md` has a row for every reason, in these words.
    #[test]
    fn every_reason_of_a_failure_is_explained() {
        let document = include_str!("../../docs/reasons.md");
        let (_, section) =
            document.split_once("\n## Why a connection failed\n").expect("the tunnel's section");
        let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
        let found: Vec<&str> = section.lines().filter(|line| line.starts_with("| `")).collect();
        let expected = FailureReason::ALL.iter().map(|reason| {
            let passes = if reason.is_transient() { "yes" } else { "no" };
            format!("| `{reason}` | {} | {} | {passes} |", reason.meaning(), reason.advice())
        });
        assert_eq!(found, expected.collect::<Vec<_>>(), "left: docs/reasons.md, right: the code");
    }
}
