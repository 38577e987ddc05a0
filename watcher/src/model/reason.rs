//! Why a pod's traffic is not carried, or a tunnel is not used: every reason code in one table.
//!
//! To add a reason, add a row to `reasons!` below and use it. Events, `watcher status`, the
//! planner's rules and the watcher's table in `docs/reasons.md` follow from the row.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A reason with its particulars: a stable code for programs, a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Which reason it is.
    pub code: ReasonCode,
    /// What happened here: names, numbers and paths included.
    pub text: String,
}

impl Reason {
    /// The reason `code`, with the particulars in `text`.
    pub fn new(code: ReasonCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.text)
    }
}

/// What ends a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndsWith {
    /// The pod starts: its cgroup, its first process and its addresses appear.
    PodStart,
    /// Something that happens without anybody acting on the pod.
    Itself,
    /// The pod that holds the cgroup, netns or address releases it.
    OwnerRelease,
    /// Somebody changes the pod, its entry or the node.
    Change,
    /// Nothing: the pod is meant to be left alone.
    Nothing,
}

impl EndsWith {
    /// Whether it passes by itself, in the words of `docs/reasons.md`.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::PodStart => "yes, when the pod has started",
            Self::Itself => "yes",
            Self::OwnerRelease => "when the other pod releases it",
            Self::Change => "no",
            Self::Nothing => "intended",
        }
    }
}

/// What happens to the pod's traffic while a reason holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrafficMeanwhile {
    /// It follows the pod's fail mode: refused, or plaintext.
    FailMode,
    /// It leaves and arrives in plaintext.
    Plaintext,
    /// The reason does not change it.
    Unchanged,
}

impl TrafficMeanwhile {
    /// As in `docs/reasons.md`.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::FailMode => "follows the fail mode",
            Self::Plaintext => "plaintext",
            Self::Unchanged => "unchanged",
        }
    }
}

/// One row of the table.
struct Row {
    code: &'static str,
    ends_with: EndsWith,
    traffic: TrafficMeanwhile,
    meaning: &'static str,
    advice: &'static str,
}

macro_rules! reasons {
    ($($variant:ident $code:literal, $ends:ident, $traffic:ident, $meaning:literal, $advice:literal;)*) => {
        /// Every reason that the watcher gives.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum ReasonCode {
            $(#[doc = $meaning] #[serde(rename = $code)] $variant,)*
        }

        impl ReasonCode {
            /// All of them, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            const fn row(self) -> Row {
                match self {
                    $(Self::$variant => Row {
                        code: $code,
                        ends_with: EndsWith::$ends,
                        traffic: TrafficMeanwhile::$traffic,
                        meaning: $meaning,
                        advice: $advice,
                    },)*
                }
            }
        }
    };
}

#[rustfmt::skip]
reasons! {
    BadEntry "bad_entry", Change, Unchanged,
        "the source's entry for the pod cannot be used; the last valid entry stays active",
        "Correct the key that the message names.";
    DuplicateUid "duplicate_uid", Change, Unchanged,
        "an earlier entry of the pods file has the same uid",
        "Give each pod its own uid.";
    BadAnnotation "bad_annotation", Change, Unchanged,
        "an annotation of the pod has a value that cannot be used; it is ignored, the others hold",
        "Correct the annotation that the Event names.";

    HostNetwork "host_network", Nothing, Plaintext,
        "the pod uses the node's network (`hostNetwork: true`), so its traffic is the node's",
        "None is needed: such pods are never enrolled.";
    Sidecar "sidecar", Nothing, Plaintext,
        "the pod has a sidecar that carries its traffic",
        "Remove the sidecar to enrol the pod.";

    Leaving "leaving", Itself, Plaintext,
        "the pod's label is off; for some seconds peers that have not heard of it yet may still connect by HBONE",
        "None is needed; `--leave-grace` says how long.";

    NoCgroup "no_cgroup", PodStart, FailMode,
        "no cgroup matches the pod's uid yet",
        "Wait for the container runtime; if it lasts, compare `--attach` with where the kubelet keeps pods.";
    CgroupGone "cgroup_gone", Itself, Plaintext,
        "the cgroup that the entry names does not exist",
        "Start the pod, or correct `cgroup`.";
    CgroupOutside "cgroup_outside", Change, Plaintext,
        "the pod's cgroup is not below the one that the programs are attached to",
        "Start the watcher with an `--attach` that is above all pods.";
    DuplicateCgroup "duplicate_cgroup", OwnerRelease, Plaintext,
        "another pod holds the same cgroup",
        "Give each pod its own cgroup.";
    CgroupOverlaps "cgroup_overlaps", OwnerRelease, Plaintext,
        "the pod's cgroup is above or below that of another pod",
        "Give each pod a cgroup that contains no other pod's.";

    NotObserved "not_observed", Itself, FailMode,
        "the pod could not be observed, because of an error on the node; it is tried again",
        "Read the message; often the watcher or the node is short of descriptors or memory.";
    OverBudget "over_budget", Change, FailMode,
        "the pod has more processes, netns, addresses or cgroups than the watcher looks at, and the first ones do not decide",
        "Find out what the pod does; in a pods file, name its `addresses`.";

    ObjectGone "object_gone", Itself, Unchanged,
        "the pod is gone from its source, or has failed, and processes of it still run; it stays in the mesh, or closed, until they end",
        "End the processes if the node's container runtime does not; a pod leaves the mesh at once by its label.";
    RunsElsewhere "runs_elsewhere", Change, Plaintext,
        "the API says that containers of the pod run, and no process is in a cgroup of the pod that the programs are attached to",
        "Compare the cgroup drivers of kubelet and container runtime, and `--attach` with where the containers are.";

    GuestBehindPod "guest_behind_pod", Change, Unchanged,
        "a virtual machine or another netns is behind the pod's; what it sends and receives is forwarded past the tunnel, in plaintext and without policy",
        "Give the guest a netns with a pod of its own, or take the pod out of the mesh; no option includes such traffic.";

    NoProcess "no_process", PodStart, FailMode,
        "no process runs in the pod's cgroup yet",
        "Wait for the pod's first process.";
    NoAddress "no_address", PodStart, FailMode,
        "the pod's netns has no address yet",
        "Wait for the CNI plugin; if it lasts, look at its log.";
    HostNetns "host_netns", Change, Plaintext,
        "the pod's processes are in the node's own netns, which must not be cut off",
        "Start the pod in a netns of its own.";
    NetnsUnreadable "netns_unreadable", Change, FailMode,
        "the pod's netns cannot be entered or queried",
        "Read the message; `watcher preflight` names missing capabilities.";
    NetnsDisagree "netns_disagree", Change, FailMode,
        "the pod's processes are in different netns, and no addresses tell which one is its own",
        "Find the process that left the pod's netns (`lsns -t net`), or name the pod's addresses.";
    AddressNotHeld "address_not_held", Change, FailMode,
        "the pod's netns does not hold an address that its source names",
        "Compare the pod's `status.podIPs` (or `addresses` in the pods file) with `ip address` in its netns.";
    NetnsTaken "netns_taken", OwnerRelease, FailMode,
        "another pod holds the same netns",
        "Find out which entry names the wrong cgroup.";
    AddressTaken "address_taken", OwnerRelease, FailMode,
        "another pod of this node holds one of the addresses",
        "Find out why two pods have one address; a pod that is ending releases it soon.";

    NetnsNotPrepared "netns_not_prepared", Change, FailMode,
        "rules, routes or sysctls could not be set in the pod's netns; the watcher tries again",
        "Read the message; `watcher preflight` names missing capabilities and modules.";
    IstioRules "istio_rules", Change, FailMode,
        "Istio's node agent left rules in the pod's netns that redirect its connections, and they cannot be taken out",
        "Restart the pod; rules of nftables, and of iptables that uses them, the watcher takes out by itself.";
    NetnsNotSteered "netns_not_steered", Change, FailMode,
        "the program that steers inbound connections could not be attached to the pod's netns",
        "Read the message; another program may be attached to that netns.";

    ExclusionsNotSet "exclusions_not_set", Change, FailMode,
        "the kernel's maps have no room for the pod's exclusion list; the pod gets none of it, and the others keep theirs",
        "Make the lists of the node's pods shorter, or alike: pods with equal lists share one.";
    NotInMaps "not_in_maps", Change, Plaintext,
        "an entry of the pod could not be written to the kernel's maps; the watcher tries again",
        "Read the message; if a map is full, find the pod with very many cgroups or addresses.";

    NoTunnel "no_tunnel", Itself, FailMode,
        "no tunnel is connected",
        "Start the tunnel; compare its `zds.socket` with `--zds-socket`.";
    NotAcknowledged "not_acknowledged", Itself, FailMode,
        "the tunnel has not acknowledged the pod yet",
        "Wait a moment; if it lasts, read the tunnel's log.";
    TunnelRefused "tunnel_refused", Change, FailMode,
        "the tunnel refused the pod",
        "Read the message.";

    ReservedPort "reserved_port", Change, Unchanged,
        "an application of the pod listens on a port that is the tunnel's there, or tried to; if it came first, the tunnel cannot serve the pod, which then follows its fail mode; if the tunnel came first, the application's bind fails",
        "Have the application listen on another port (`docs/architecture.md#ports` lists the tunnel's), or take the pod out of the mesh.";

    TunnelCgroupUnknown "tunnel_cgroup_unknown", Change, Unchanged,
        "a tunnel connected whose cgroup cannot be found; it is not used",
        "Start the tunnel in a cgroup that the watcher can see.";
    TunnelCgroupShared "tunnel_cgroup_shared", Change, Unchanged,
        "a tunnel connected that runs in a cgroup with the pods or the watcher, or in a pod that is no tunnel; it is not used",
        "Start the tunnel in a cgroup of its own, or name its pod's service account by `--tunnel-account`.";
    TunnelNotAttached "tunnel_not_attached", Change, Unchanged,
        "the programs could not be attached to the cgroup of a tunnel that connected; it is not used",
        "Read the message; `watcher preflight` names what the kernel lacks.";
}

impl ReasonCode {
    /// The stable code, such as `address_not_held`.
    #[must_use]
    pub fn code(self) -> &'static str {
        self.row().code
    }

    /// What happened, in general.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        self.row().meaning
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(self) -> &'static str {
        self.row().advice
    }

    /// What ends it.
    #[must_use]
    pub fn ends_with(self) -> EndsWith {
        self.row().ends_with
    }

    /// What happens to the pod's traffic meanwhile.
    #[must_use]
    pub fn traffic(self) -> TrafficMeanwhile {
        self.row().traffic
    }

    /// Whether it passes without anybody acting on the pod.
    #[must_use]
    pub fn is_transient(self) -> bool {
        matches!(self.ends_with(), EndsWith::PodStart | EndsWith::Itself)
    }

    /// Whether the pod is in order and only has not started fully.
    #[must_use]
    pub fn awaits_start(self) -> bool {
        self.ends_with() == EndsWith::PodStart
    }

    /// Whether another pod's release of a cgroup, netns or address may end it.
    #[must_use]
    pub fn is_claim_conflict(self) -> bool {
        self.ends_with() == EndsWith::OwnerRelease
    }

    /// Whether somebody has to act; only then an Event on the pod reports it.
    #[must_use]
    pub fn needs_action(self) -> bool {
        matches!(self.ends_with(), EndsWith::OwnerRelease | EndsWith::Change)
    }

    /// Whether the pod's cgroup is surely its own, so that what runs in it follows the fail mode
    /// rather than pass in plaintext because of a mistake.
    #[must_use]
    pub fn keeps_closed(self) -> bool {
        self.traffic() == TrafficMeanwhile::FailMode
    }
}

impl fmt::Display for ReasonCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fmt::Write as _};

    use super::*;

    #[test]
    fn a_reason_is_serialized_as_its_code_and_sentence() {
        let mut codes = BTreeSet::new();
        for code in ReasonCode::ALL {
            assert!(codes.insert(code.code()), "{code} is there twice");
            let reason = Reason::new(*code, "text");
            let json = serde_json::json!({"code": code.code(), "text": "text"});
            assert_eq!(serde_json::to_value(&reason).unwrap(), json);
            assert_eq!(serde_json::from_value::<Reason>(json).unwrap(), reason);
        }
    }

    #[test]
    fn only_what_lasts_and_is_not_intended_needs_action() {
        for code in ReasonCode::ALL {
            let intended = code.ends_with() == EndsWith::Nothing;
            assert_eq!(code.needs_action(), !code.is_transient() && !intended, "{code}");
        }
        // Cutting off what runs in the node's own netns could cut off the node.
        assert!(!ReasonCode::HostNetns.keeps_closed());
    }

    /// The watcher's table is made from the rows: `UPDATE_DOCS=1 cargo test -p watcher
    /// documentation`.
    #[test]
    fn the_documentation_has_a_line_for_every_reason() {
        let mut table = String::from(
            "| reason | what happened | what to do | passes by itself | traffic meanwhile |\n|---|---|---|---|---|\n",
        );
        for code in ReasonCode::ALL {
            let _ = writeln!(
                table,
                "| `{code}` | {} | {} | {} | {} |",
                code.meaning(),
                code.advice(),
                code.ends_with().describe(),
                code.traffic().describe()
            );
        }
        let made_from = "watcher reasons: made from watcher/src/model/reason.rs";
        testbed::doc_table::assert_current("docs/reasons.md", made_from, &table);
    }
}
