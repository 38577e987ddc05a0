//! What Istio's node agent leaves in the netns of pods when it goes: rules that redirect every
//! connection to a tunnel, by netfilter.
//!
//! With those in place connections through our programs hang: what a tunnel sends to other nodes is
//! sent back to it, and what arrives for an application is turned into a connection to port 15006,
//! which nobody may dial. So they are taken out when a pod is enrolled. Nothing puts them back: the
//! agent does so itself for each pod that is labelled and that no agent has marked as its own.
//!
//! All of its kinds have the routing rule `fwmark 0x111/0xfff lookup 100`, which nothing else has;
//! without it nothing is looked at. iptables of the legacy kind are left alone, and named: the
//! kernel takes them only as whole tables, with everybody's rules.

use std::{fs, io, ops::ControlFlow};

use rtnetlink::{
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        route::RouteProtocol,
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
    sys::protocols::NETLINK_ROUTE,
};

use crate::observe::{
    netlink::{self, LO},
    nftables::{self, Chain, Jump, Removal},
};

use super::netns_setup::{Request, local_route, send_all};

/// The agent's routing rule.
const MARK: u32 = 0x111;
const MASK: u32 = 0xfff;
const TABLE: u32 = 100;
/// The agent's chains in iptables' tables.
const CHAINS: [&str; 2] = ["ISTIO_PRERT", "ISTIO_OUTPUT"];
/// What the names of its own tables of nftables begin with.
const TABLES: &str = "istio-ambient-";
/// Tables of iptables that it has rules in.
const IPTABLES: [&str; 3] = ["nat", "mangle", "raw"];

/// Why they cannot be taken out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RulesError {
    #[error(
        "Istio's node agent left iptables rules of the legacy kind in the pod's netns, in tables {0}; restart the pod"
    )]
    Legacy(String),
    #[error("cannot take out the rules that Istio's node agent left in the pod's netns")]
    Io(#[from] io::Error),
}

/// What the agent left in a netns.
#[derive(Debug)]
enum Left {
    Nothing,
    /// What has to go beside the routing rule.
    Nftables(Vec<Removal>),
    /// The tables of the legacy kind.
    Legacy(String),
}

/// What the agent left in the calling thread's netns.
fn left() -> io::Result<Left> {
    if !has_routing_rule()? {
        return Ok(Left::Nothing);
    }
    let removals = removals(&nftables::chains()?, &nftables::jumps()?);
    let tables = if removals.is_empty() { legacy_tables() } else { String::new() };
    Ok(if tables.is_empty() { Left::Nftables(removals) } else { Left::Legacy(tables) })
}

/// Whether the agent left rules in the calling thread's netns, and whether they can be taken out.
///
/// # Errors
/// The netns cannot be queried.
pub(crate) fn can_be_taken_out() -> io::Result<Option<bool>> {
    Ok(match left()? {
        Left::Nothing => None,
        Left::Nftables(_) => Some(true),
        Left::Legacy(_) => Some(false),
    })
}

/// Takes the agent's rules out of the calling thread's netns. The tables that it had rules in, as
/// far as there were any.
///
/// # Errors
/// They are of a kind that cannot be taken out, or the kernel refuses a change.
pub(crate) fn take_out() -> Result<Option<String>, RulesError> {
    let removals = match left()? {
        Left::Nothing => return Ok(None),
        Left::Legacy(tables) => return Err(RulesError::Legacy(tables)),
        Left::Nftables(removals) => removals,
    };
    if !removals.is_empty() {
        nftables::remove(&removals)?;
    }
    // Last: where it is, all of this is done again.
    remove_routing()?;
    let mut tables: Vec<&str> = removals.iter().map(Removal::table).collect();
    tables.dedup();
    Ok(Some(tables.join(", ")))
}

/// What has to go, in this order: tables that are the agent's as a whole, else the rules that lead
/// to its chains, and these.
fn removals(chains: &[Chain], jumps: &[Jump]) -> Vec<Removal> {
    let mut removals: Vec<Removal> = Vec::new();
    let own_table = |table: &str| table.starts_with(TABLES);
    let own_chain = |chain: &str| CHAINS.contains(&chain);
    for Chain { family, table, .. } in chains.iter().filter(|chain| own_table(&chain.table)) {
        let removal = Removal::Table { family: *family, table: table.clone() };
        if !removals.contains(&removal) {
            removals.push(removal);
        }
    }
    for Jump { family, table, chain, handle, .. } in
        jumps.iter().filter(|jump| own_chain(&jump.to) && !own_chain(&jump.chain) && !own_table(&jump.table))
    {
        let (table, chain) = (table.clone(), chain.clone());
        removals.push(Removal::Rule { family: *family, table, chain, handle: *handle });
    }
    for Chain { family, table, name, .. } in
        chains.iter().filter(|chain| own_chain(&chain.name) && !own_table(&chain.table))
    {
        removals.push(Removal::Chain { family: *family, table: table.clone(), chain: name.clone() });
    }
    removals
}

fn has_routing_rule() -> io::Result<bool> {
    let all = rules(AddressFamily::Inet)?;
    Ok(all.iter().any(|rule| {
        let has = |wanted: &RuleAttribute| rule.attributes.contains(wanted);
        has(&RuleAttribute::FwMark(MARK)) && has(&RuleAttribute::FwMask(MASK)) && is_of_table(rule)
    }))
}

/// How many rules lead to the table that the agent's does.
fn rules_of_table(family: AddressFamily) -> io::Result<usize> {
    Ok(rules(family)?.iter().filter(|rule| is_of_table(rule)).count())
}

fn is_of_table(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Table(TABLE)) || u32::from(rule.header.table) == TABLE
}

/// The routing rules of the calling thread's netns.
fn rules(family: AddressFamily) -> io::Result<Vec<RuleMessage>> {
    let mut request = RuleMessage::default();
    request.header.family = family;
    let mut found = Vec::new();
    netlink::dump(&netlink::socket(NETLINK_ROUTE)?, RouteNetlinkMessage::GetRule(request), |answer| {
        if let RouteNetlinkMessage::NewRule(rule) = answer {
            found.push(rule);
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// Tables of the legacy kind that the netns has, of those where the agent has rules.
fn legacy_tables() -> String {
    let names = fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    let found: Vec<&str> = names.lines().filter(|name| IPTABLES.contains(name)).collect();
    found.join(", ")
}

fn remove_routing() -> io::Result<()> {
    let mut requests = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        rule.header.action = RuleAction::ToTable;
        rule.attributes =
            vec![RuleAttribute::FwMark(MARK), RuleAttribute::FwMask(MASK), RuleAttribute::Table(TABLE)];
        // Others use that table, too, such as whoever redirects by TPROXY.
        if rules_of_table(family).unwrap_or(1) == 1 {
            let mut route = local_route(family == AddressFamily::Inet, TABLE, LO);
            // Whoever set it: the agent says another protocol than we do.
            route.header.protocol = RouteProtocol::Unspec;
            requests.push(Request::new("Istio's route", RouteNetlinkMessage::DelRoute(route), false));
        }
        requests.push(Request::new("Istio's rule", RouteNetlinkMessage::DelRule(rule), false));
    }
    // IPv6 may have none, or not be there.
    send_all(&requests, 0, &[libc::ENOENT, libc::ESRCH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP])
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::fd::{AsFd, OwnedFd},
        process::Command,
        thread,
    };

    use testbed::istio_rules::{Kind, script};

    use crate::observe::netns::run_in;

    use super::*;

    fn netns(script: &str) -> OwnedFd {
        thread::scope(|scope| {
            let made = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
                let done = Command::new("sh").args(["-ec", script]).status()?;
                assert!(done.success(), "{script}");
                File::open("/proc/thread-self/ns/net")
            });
            made.join().unwrap().unwrap().into()
        })
    }

    /// The netns' rules and routes, as the tools list them.
    fn listed(netns: &OwnedFd) -> String {
        run_in(netns.as_fd(), || {
            let script =
                "nft list ruleset 2>/dev/null; ip rule; ip -6 rule; ip route show table 100; ip -6 route show table 100";
            let output = Command::new("sh").args(["-c", script]).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })
        .unwrap()
    }

    #[test]
    #[ignore = "makes netns, needs root: make test"]
    fn the_agents_rules_are_taken_out_and_those_of_others_stay() {
        const OTHERS: &str = "ip link set lo up; ip rule add fwmark 0x7 lookup 100
            iptables-nft -t nat -A OUTPUT -p tcp --dport 9 -j ACCEPT
            nft 'add table inet mine; add chain inet mine c; add chain inet mine d; add rule inet mine c jump d'\n";
        let before = listed(&netns(OTHERS));
        for kind in [Kind::IptablesNft, Kind::Nftables] {
            let prepared = netns(&format!("{OTHERS}{}", script(kind)));
            assert!(listed(&prepared).contains("15001"), "{kind:?}");
            let taken = run_in(prepared.as_fd(), || Ok(take_out())).unwrap().unwrap();
            assert!(taken.as_ref().is_some_and(|tables| tables.contains("nat")), "{kind:?}: {taken:?}");
            let after = listed(&prepared);
            assert!(!after.to_lowercase().contains("istio"), "{kind:?}: {after}");
            // What iptables makes by itself stays, empty.
            for line in before.lines() {
                assert!(after.contains(line.trim()), "{kind:?}: {line}\n{after}");
            }
            assert_eq!(run_in(prepared.as_fd(), || Ok(take_out())).unwrap().unwrap(), None, "{kind:?}");
        }
    }

    #[test]
    #[ignore = "makes netns, needs root: make test"]
    fn the_agents_routes_go_unless_others_use_their_table() {
        let routes = |netns: &OwnedFd| -> Vec<bool> {
            let text = listed(netns);
            ["local default dev lo scope host", "local default dev lo metric 1024"]
                .iter()
                .map(|route| text.contains(route))
                .collect()
        };
        for (others, stay) in [("", [false, false]), ("ip rule add fwmark 0x7 lookup 100\n", [true, false])] {
            let prepared = netns(&format!("{others}{}", script(Kind::IptablesNft)));
            assert_eq!(routes(&prepared), [true, true]);
            run_in(prepared.as_fd(), || Ok(take_out())).unwrap().unwrap();
            assert_eq!(routes(&prepared), stay, "{others:?}");
        }
    }

    #[test]
    #[ignore = "makes netns, needs root: make test"]
    fn legacy_rules_are_named_and_a_netns_without_the_agents_routing_rule_is_left_alone() {
        let legacy = netns(&script(Kind::IptablesLegacy));
        let said = run_in(legacy.as_fd(), || Ok(take_out())).unwrap().unwrap_err().to_string();
        assert!(said.contains("legacy") && said.contains("nat"), "{said}");
        // A sidecar has a chain of the same name.
        let sidecar = netns(
            "iptables-nft -t nat -N ISTIO_OUTPUT; iptables-nft -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT
             iptables-nft -t nat -A ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports 15001",
        );
        let before = listed(&sidecar);
        assert_eq!(run_in(sidecar.as_fd(), || Ok(take_out())).unwrap().unwrap(), None);
        assert_eq!(listed(&sidecar), before);
    }

    /// Who may change its netns can add rules without end, and would have the watcher list them at
    /// each attempt.
    #[test]
    #[ignore = "makes netns, needs root: make test"]
    fn a_netns_with_rules_without_end_is_refused_and_named() {
        let many = netns(&format!(
            "(echo 'add table inet mine'; echo 'add chain inet mine c'; \
             for i in $(seq 40000); do echo 'add rule inet mine c counter'; done) | nft -f -\n{}",
            script(Kind::Nftables)
        ));
        let error = run_in(many.as_fd(), || Ok(take_out())).unwrap().unwrap_err();
        let said = error_reporter::Report::new(&error).to_string();
        assert!(said.contains("more nftables rules than are looked through"), "{said}");
    }

    #[test]
    fn what_leads_to_a_chain_goes_before_it_and_a_table_goes_whole() {
        let chain = |table: &str, name: &str| Chain {
            family: 2,
            table: table.to_owned(),
            name: name.to_owned(),
            kind: None,
        };
        let jump = |table: &str, chain: &str, to: &str| Jump {
            family: 2,
            table: table.to_owned(),
            chain: chain.to_owned(),
            handle: 7,
            to: to.to_owned(),
        };
        let chains = [
            chain("nat", "OUTPUT"),
            chain("nat", "ISTIO_OUTPUT"),
            chain("nat", "KUBE"),
            chain("istio-ambient-nat", "output"),
            chain("istio-ambient-nat", "istio-output"),
        ];
        let jumps = [
            jump("nat", "OUTPUT", "ISTIO_OUTPUT"),
            jump("nat", "OUTPUT", "KUBE"),
            jump("istio-ambient-nat", "output", "istio-output"),
        ];
        let table = || "nat".to_owned();
        assert_eq!(
            removals(&chains, &jumps),
            [
                Removal::Table { family: 2, table: "istio-ambient-nat".to_owned() },
                Removal::Rule { family: 2, table: table(), chain: "OUTPUT".to_owned(), handle: 7 },
                Removal::Chain { family: 2, table: table(), chain: "ISTIO_OUTPUT".to_owned() },
            ]
        );
        assert_eq!(removals(&[], &[]), []);
    }
}
