use adit_ebpf_common::enrolment::flag::{FAIL_OPEN, IN_MESH, TUNNEL};

use crate::plan::diff::{MapWrite, NetnsStep, TunnelStep};

use super::*;

fn kind(step: &ApplyStep) -> &'static str {
    match step {
        ApplyStep::Map(write) => match write {
            MapWrite::RemoveCgroup(_) => "remove cgroup",
            MapWrite::RemoveAddress(_) => "remove address",
            MapWrite::SetExpected(..) => "set expected",
            MapWrite::RemoveExpected(_) => "remove expected",
            MapWrite::SetCgroup(..) => "set cgroup",
            MapWrite::SetAddress(..) => "set address",
            MapWrite::SetArrivals(..) => "set arrivals",
            MapWrite::RemoveArrivals(_) => "remove arrivals",
            MapWrite::RemoveExclusions(_) => "remove exclusions",
        },
        ApplyStep::Netns(NetnsStep::Unsteer(_)) => "unsteer",
        ApplyStep::Netns(NetnsStep::Release(_)) => "release",
        ApplyStep::Netns(NetnsStep::Steer(_)) => "steer",
        ApplyStep::Tunnel(TunnelStep::Withdraw(_)) => "withdraw",
        ApplyStep::Tunnel(TunnelStep::Offer(..)) => "offer",
    }
}

/// The kinds of `steps`, each once where several of a kind follow each other.
fn kinds(steps: &[ApplyStep]) -> Vec<&'static str> {
    let mut kinds: Vec<&str> = steps.iter().map(kind).collect();
    kinds.dedup();
    kinds
}

fn kinds_between(applied: &Plan, plan: &Plan) -> Vec<&'static str> {
    kinds(&Node::with(applied).all_steps(plan))
}

#[test]
fn a_pod_without_a_cgroup_is_expected_until_it_has_one() {
    let setting = Setting::default();
    let mut plain = pod("plain");
    plain.selection = Selection::Plain;
    let before = setting.plan(vec![(pod("a"), Observed::default()), (plain, Observed::default())]);
    let expected: Vec<_> = before["a"].expected.iter().map(|(name, info)| (*name, info.flags)).collect();
    assert_eq!(expected, [(name(b"a").unwrap(), IN_MESH)]);
    assert!(before["plain"].expected.is_empty());
    assert_eq!(kinds_between(&Plan::new(), &before), ["set expected"]);
    let after = setting.plan(vec![(pod("a"), seen(1, vec![]))]);
    // The cgroup's own entry is there before its name is forgotten.
    assert_eq!(kinds_between(&before, &after), ["set cgroup", "remove expected"]);
    assert!(before["a"].expects_more_than(&after["a"]) && !after["a"].expects_more_than(&before["a"]));
}

#[test]
fn leaving_is_the_reverse_of_coming() {
    let setting = Setting { exclusion_ids: [("a".to_owned(), 1)].into(), ..Setting::default() };
    let enrolled = setting.plan(vec![(pod("a"), in_order(1))]);
    assert_eq!(
        kinds_between(&Plan::new(), &enrolled),
        ["set cgroup", "set address", "set arrivals", "steer", "set cgroup", "offer"]
    );
    assert_eq!(
        kinds_between(&enrolled, &Plan::new()),
        [
            // Before the entry of the cgroup goes, its netns is not enrolled any more.
            "set arrivals",
            "remove cgroup",
            "remove address",
            "unsteer",
            "remove arrivals",
            "withdraw",
            "release",
            "remove exclusions"
        ]
    );
    assert!(Node::with(&enrolled).all_steps(&enrolled).is_empty());
}

/// Without its cgroup's entry, a pod of a netns that is known as closed would be refused.
#[test]
fn a_netns_is_open_before_the_entries_of_a_pod_go_that_leaves_and_is_served_on() {
    let enrolled = Setting::default().plan(vec![(pod("a"), in_order(1))]);
    let mut leaving = enrolled.clone();
    let plan = leaving.get_mut("a").unwrap();
    (plan.cgroups, plan.addresses) = (BTreeMap::new(), BTreeMap::new());
    plan.arrivals.values_mut().for_each(|info| info.flags = IN_MESH | FAIL_OPEN);
    assert_eq!(kinds_between(&enrolled, &leaving), ["set arrivals", "remove cgroup", "remove address"]);
    assert_eq!(kinds_between(&leaving, &enrolled), ["set cgroup", "set address", "set arrivals"]);
}

/// A pod that was open and is refused: nothing arrives in between, and its netns is not let go.
#[test]
fn a_pod_that_is_refused_keeps_its_netns() {
    let setting = Setting::default();
    let open = setting.plan(vec![(pod("a"), in_order(1))]);
    let wrong = Pod { addresses: [IpAddr::from([9, 9, 9, 9])].into(), ..pod("a") };
    let refused = setting.plan(vec![(wrong, in_order(1))]);
    // Ready before: the entries change.
    let ready = Setting { ready: ["a".to_owned()].into(), ..Setting::default() };
    let ready = ready.plan(vec![(pod("a"), in_order(1))]);
    let closing = ["remove address", "withdraw", "set cgroup", "set arrivals", "steer"];
    assert_eq!(kinds_between(&ready, &refused), closing);
    assert_eq!(kinds_between(&refused, &open), ["set cgroup", "set address", "steer", "offer"]);
    assert_eq!(
        kinds_between(&refused, &Plan::new()),
        ["set arrivals", "remove cgroup", "unsteer", "remove arrivals", "release"]
    );
    assert!(Node::with(&refused).all_steps(&refused).is_empty());
}

#[test]
fn only_entries_that_earlier_plans_name_are_removed_when_a_few_pods_are_compared() {
    let setting = Setting { exclusion_ids: [("a".to_owned(), 1)].into(), ..Setting::default() };
    let whole = setting.plan(vec![(pod("a"), in_order(1)), (pod("b"), in_order(2))]);
    let node = Node::with(&whole);
    let before: Vec<_> = setting.plan(vec![(pod("a"), in_order(1))]).into_iter().collect();
    let scope = DiffScope::Pods { before: &before, lists: &BTreeSet::new() };
    let only_a: Plan = before.iter().cloned().collect();
    assert!(node.steps(scope, &only_a).is_empty(), "a pod is planned alone as it is with others");
    let removed = node.steps(scope, &Plan::new());
    assert_eq!(removed, Node::with(&only_a).all_steps(&Plan::new()));
    // Of what a plan named and the kernel does not have, nothing is to be removed.
    assert!(Node::default().steps(scope, &Plan::new()).is_empty());
}

#[test]
fn a_list_stays_as_long_as_one_pod_uses_it() {
    let exclusion_ids = ["a", "b"].map(|uid| (uid.to_owned(), 1)).into();
    let setting = Setting { exclusion_ids, ..Setting::default() };
    let plan = setting.plan(vec![(pod("a"), in_order(1)), (pod("b"), in_order(2))]);
    let node = Node::with(&plan);
    let before = [("a".to_owned(), plan["a"].clone())];
    for (used, removed) in [(BTreeSet::from([1]), false), (BTreeSet::new(), true)] {
        let steps = node.steps(DiffScope::Pods { before: &before, lists: &used }, &Plan::new());
        assert_eq!(kinds(&steps).contains(&"remove exclusions"), removed);
    }
    let only_b: Plan = [("b".to_owned(), plan["b"].clone())].into();
    assert!(!kinds(&node.all_steps(&only_b)).contains(&"remove exclusions"));
}

#[test]
fn the_entries_of_tunnels_stay_when_everything_is_compared() {
    let tunnels: BTreeSet<CgroupId> = [77].into();
    let added = Node::default().steps(DiffScope::All { tunnels: &tunnels }, &Plan::new());
    let [ApplyStep::Map(MapWrite::SetCgroup(77, info))] = added[..] else { panic!("{added:?}") };
    assert_eq!(info.flags, TUNNEL);
    let mut node = Node::default();
    node.maps.cgroups.insert(77, info);
    assert!(node.steps(DiffScope::All { tunnels: &tunnels }, &Plan::new()).is_empty());
    assert!(node.steps(DiffScope::Pods { before: &[], lists: &BTreeSet::new() }, &Plan::new()).is_empty());
    assert_eq!(kinds(&node.all_steps(&Plan::new())), ["remove cgroup"]);
}

#[test]
fn netns_come_in_batches_each_followed_by_its_offers() {
    let pods = (1..=20).map(|n| (pod(&format!("p{n}")), in_order(n))).collect();
    let plan = Setting::default().plan(pods);
    let steps = Node::default().all_steps(&plan);
    assert_eq!(
        kinds(&steps),
        [
            "set cgroup",
            "set address",
            "set arrivals",
            "steer",
            "set cgroup",
            "offer",
            "steer",
            "set cgroup",
            "offer"
        ]
    );
    let batches: Vec<BTreeSet<u64>> = steps
        .iter()
        .filter_map(|step| match step {
            ApplyStep::Netns(NetnsStep::Steer(batch)) => {
                Some(batch.iter().map(|(cookie, _)| *cookie).collect())
            }
            _ => None,
        })
        .collect();
    assert_eq!(batches.iter().map(BTreeSet::len).collect::<Vec<_>>(), [16, 4]);
    let mut current = &BTreeSet::new();
    let mut next = batches.iter();
    for step in &steps {
        match step {
            ApplyStep::Netns(NetnsStep::Steer(_)) => current = next.next().unwrap(),
            ApplyStep::Tunnel(TunnelStep::Offer(_, workload)) => assert!(current.contains(&workload.cookie)),
            _ => {}
        }
    }
}

#[test]
fn an_acknowledgement_changes_three_maps_and_nothing_else() {
    let before = Setting::default().plan(vec![(pod("a"), in_order(1)), (pod("b"), in_order(2))]);
    let after = Setting { ready: ["a".to_owned()].into(), ..Setting::default() }
        .plan(vec![(pod("a"), in_order(1)), (pod("b"), in_order(2))]);
    let found = Node::with(&before).all_steps(&after);
    assert_eq!(found.len(), 5, "two cgroups, two addresses and the netns of pod a: {found:?}");
    assert_eq!(kinds(&found), ["set cgroup", "set address", "set arrivals"]);
}

#[test]
fn a_new_netns_of_the_same_pod_replaces_without_a_withdrawal() {
    let before = Setting::default().plan(vec![(pod("a"), in_order(1))]);
    let moved = seen(1, vec![ObservedNetns::Pod(NetnsFacts { cookie: 5, ..facts(1) })]);
    let after = Setting::default().plan(vec![(pod("a"), moved)]);
    let expected = [
        "set arrivals",
        "unsteer",
        "remove arrivals",
        "release",
        "set cgroup",
        "set address",
        "set arrivals",
        "steer",
        "set cgroup",
        "offer",
    ];
    assert_eq!(kinds_between(&before, &after), expected);
}

#[test]
fn an_entry_names_a_netns_only_while_that_is_steered() {
    let setting = Setting { fail_mode: FailMode::Closed, ..Setting::default() };
    let plan = setting.plan(vec![(pod("a"), in_order(1)), (pod("b"), in_order(2))]);
    let mut lost = Node::with(&plan);
    lost.netns.remove(&1001);
    let mut expected = Node::default();
    let closed = setting.plan(vec![(pod("a"), seen(1, vec![]))]);
    expected.maps.cgroups = closed["a"].cgroups.clone();
    for node in [Node::default(), Node::with(&closed), expected, lost] {
        let mut steered: BTreeSet<u64> = node.netns.keys().copied().collect();
        let mut entries = node.maps.cgroups.clone();
        for step in node.all_steps(&plan) {
            match step {
                ApplyStep::Netns(NetnsStep::Steer(batch)) => {
                    steered.extend(batch.iter().map(|(cookie, _)| *cookie));
                }
                ApplyStep::Map(MapWrite::SetCgroup(id, info)) => {
                    let is_named = info.netns_cookie == 0 || steered.contains(&info.netns_cookie);
                    assert!(is_named, "{id}: {info:?}, steered: {steered:?}");
                    entries.insert(id, info);
                }
                _ => {}
            }
        }
        assert_eq!(entries, Node::with(&plan).maps.cgroups);
    }
}
