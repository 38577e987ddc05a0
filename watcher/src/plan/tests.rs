use std::{path::Path, sync::Arc};

use adit_ebpf_common::{
    lifecycle::name,
    pods::flag::{FAIL_OPEN, IN_MESH, READY, TUNNEL},
};

use crate::{
    model::pod::Pod,
    observe::{Observed, Seen, netns::NetnsFacts},
};

use super::{eligibility::Claims, *};

const ATTACHED: &str = "/cgroup/pods";

fn pod(uid: &str) -> Pod {
    Pod {
        uid: uid.to_owned(),
        name: uid.to_owned(),
        namespace: "demo".to_owned(),
        service_account: "sa".to_owned(),
        cgroup: Some(Path::new(ATTACHED).join(uid)),
        selection: Selection::Enrolled,
        fail_mode: None,
        dns_capture: None,
        addresses: BTreeSet::new(),
        exclusions: Exclusions::default(),
        notes: Vec::new(),
    }
}

fn facts(n: u8) -> NetnsFacts {
    NetnsFacts {
        id: NetnsId { dev: 4, inode: u64::from(n) },
        cookie: 1000 + u64::from(n),
        addresses: vec![IpAddr::from([10, 0, 0, n]), format!("fd00::{n}").parse().unwrap()],
    }
}

/// A pod's cgroup with one container, whose processes are in netns `n`.
fn seen(n: u8, netns: Vec<Seen>) -> Observed {
    let id = u64::from(n) * 10;
    let dir = PathBuf::from(format!("/observed/{n}"));
    Observed { dir: None, cgroups: [(dir.join("c"), id + 1), (dir, id)].into(), netns }
}

fn in_order(n: u8) -> Observed {
    seen(n, vec![Seen::Pod(facts(n))])
}

/// Each pod with its own directory, as the node gives it.
fn placed(pods: Vec<(Pod, Observed)>) -> Vec<(Arc<Pod>, Observed)> {
    let place = |(pod, observed): (Pod, Observed)| {
        let observed = Observed { dir: pod.cgroup.clone(), ..observed };
        (Arc::new(pod), observed)
    };
    pods.into_iter().map(place).collect()
}

/// One after the other.
fn judge(pods: Vec<(Arc<Pod>, Observed)>, current: &BTreeMap<String, u64>) -> Vec<Judged> {
    let mut claims = Claims::default();
    pods.into_iter()
        .map(|(pod, observed)| {
            let current = current.get(&pod.uid).copied();
            let verdict = claims.judge(&pod, &observed, Path::new(ATTACHED), current);
            Judged { pod, observed, verdict }
        })
        .collect()
}

fn verdicts(pods: Vec<(Pod, Observed)>) -> Vec<Verdict> {
    judge(placed(pods), &BTreeMap::new()).into_iter().map(|judged| judged.verdict).collect()
}

fn code(verdict: &Verdict) -> &str {
    match verdict {
        Verdict::Plain(_) => "plain",
        Verdict::Verified(_) => "verified",
        Verdict::Waiting(reason) | Verdict::Refused { reason, .. } => reason.code.code(),
    }
}

#[test]
fn each_bad_pod_is_refused_with_its_reason_and_the_others_are_not() {
    let with = |change: &dyn Fn(&mut Pod)| {
        let mut bad = pod("bad");
        change(&mut bad);
        bad
    };
    let table: Vec<(&str, Pod, Observed)> = vec![
        ("duplicate_cgroup", with(&|bad| bad.cgroup = pod("a").cgroup), in_order(3)),
        (
            "cgroup_overlaps",
            with(&|bad| bad.cgroup = pod("a").cgroup.map(|dir| dir.join("below"))),
            in_order(3),
        ),
        ("cgroup_outside", with(&|bad| bad.cgroup = Some(ATTACHED.into())), in_order(3)),
        ("cgroup_outside", with(&|bad| bad.cgroup = Some("/cgroup/elsewhere".into())), in_order(3)),
        ("cgroup_gone", pod("bad"), Observed::default()),
        ("host_netns", pod("bad"), seen(3, vec![Seen::Host])),
        ("netns_disagree", pod("bad"), seen(3, vec![Seen::Host, Seen::Pod(facts(3))])),
        ("netns_unreadable", pod("bad"), seen(3, vec![Seen::Unreadable("EPERM".to_owned())])),
        ("no_process", pod("bad"), seen(3, vec![])),
        ("no_address", pod("bad"), seen(3, vec![Seen::Pod(NetnsFacts { addresses: vec![], ..facts(3) })])),
        ("address_not_held", with(&|bad| bad.addresses = [IpAddr::from([10, 0, 0, 99])].into()), in_order(3)),
        ("netns_taken", pod("bad"), in_order(1)),
        ("address_taken", pod("bad"), seen(3, vec![Seen::Pod(NetnsFacts { cookie: 7, ..facts(1) })])),
    ];
    for (expected, bad, observed) in table {
        let found = verdicts(vec![(pod("a"), in_order(1)), (bad, observed), (pod("b"), in_order(2))]);
        let codes: Vec<&str> = found.iter().map(code).collect();
        assert_eq!(codes, ["verified", expected, "verified"]);
    }
}

#[test]
fn whoever_holds_an_address_keeps_it_until_it_is_released() {
    let mut claims = Claims::default();
    let judge = |claims: &mut Claims, uid: &str, n: u8, seen: NetnsFacts| {
        let mut observed = seen_at(n, seen);
        observed.dir = pod(uid).cgroup;
        claims.judge(&pod(uid), &observed, Path::new(ATTACHED), None)
    };
    let second = NetnsFacts { cookie: 7, ..facts(1) };
    assert_eq!(code(&judge(&mut claims, "a", 1, facts(1))), "verified");
    assert_eq!(code(&judge(&mut claims, "b", 2, second.clone())), "address_taken");
    // Judged again, the first one still has it.
    assert_eq!(code(&judge(&mut claims, "a", 1, facts(1))), "verified");
    let held = claims.held("a");
    claims.release("a");
    assert!(held.frees(&claims.held("a")));
    assert_eq!(code(&judge(&mut claims, "b", 2, second)), "verified");
    assert_eq!(claims.owner(&Path::new(ATTACHED).join("b/container/nested")), Some("b"));
    assert_eq!(claims.owner(Path::new(ATTACHED)), None);
}

fn seen_at(n: u8, facts: NetnsFacts) -> Observed {
    seen(n, vec![Seen::Pod(facts)])
}

#[test]
fn a_pod_without_a_cgroup_is_expected_until_it_has_one() {
    let (nothing, setting) = (Plan::default(), Setting::default());
    let mut plain = pod("plain");
    plain.selection = Selection::Plain;
    let before = setting.plan(vec![(pod("a"), Observed::default()), (plain, Observed::default())]);
    let expected: Vec<_> = before.expected.iter().map(|(name, info)| (*name, info.flags)).collect();
    assert_eq!(expected, [(name(b"a").unwrap(), IN_MESH)]);
    assert_eq!(kinds(&nothing, &before), ["set expected"]);
    let after = setting.plan(vec![(pod("a"), seen(1, vec![]))]);
    // The cgroup's own entry is there before its name is forgotten.
    assert_eq!(kinds(&before, &after), ["set cgroup", "remove expected"]);
}

#[test]
fn the_part_of_one_pod_is_planned_as_the_whole_is() {
    let setting = Setting { policies: [("a".to_owned(), 1)].into(), ..Setting::default() };
    let (a, b) = ((pod("a"), in_order(1)), (pod("b"), in_order(2)));
    let (whole, only_a) = (setting.plan(vec![a.clone(), b]), setting.plan(vec![a]));
    assert_eq!(whole.part(&only_a.keys()), only_a);
    assert!(steps(&whole.part(&only_a.keys()), &only_a).is_empty());
}

#[test]
fn a_pod_stays_in_its_netns_while_one_process_does() {
    let observed = seen(1, vec![Seen::Pod(facts(9)), Seen::Pod(facts(1)), Seen::Host]);
    let current = [("a".to_owned(), facts(1).cookie)].into();
    let judged = judge(placed(vec![(pod("a"), observed)]), &current);
    assert_eq!(judged[0].verdict, Verdict::Verified(facts(1)));
}

#[test]
fn named_addresses_are_the_only_ones() {
    let mut narrow = pod("a");
    narrow.addresses = [IpAddr::from([10, 0, 0, 1])].into();
    let Verdict::Verified(found) = verdicts(vec![(narrow, in_order(1))]).remove(0) else { panic!() };
    assert_eq!(found.addresses, [IpAddr::from([10, 0, 0, 1])]);
}

#[derive(Default)]
struct Setting {
    ready: BTreeSet<String>,
    lenient: BTreeSet<String>,
    policies: BTreeMap<String, u32>,
    tunnels: BTreeSet<CgroupId>,
    fail_mode: FailMode,
    dns_capture: bool,
}

impl Setting {
    fn plan(&self, pods: Vec<(Pod, Observed)>) -> Plan {
        let judged = judge(placed(pods), &BTreeMap::new());
        wanted(
            &judged,
            &Circumstances {
                default_fail_mode: self.fail_mode,
                default_dns_capture: self.dns_capture,
                ready: &|uid, _| self.ready.contains(uid),
                lenient: &|uid| self.lenient.contains(uid),
                policy: &|uid| self.policies.get(uid).copied().unwrap_or(0),
                names: &|pod| vec![name(pod.uid.as_bytes()).unwrap()],
                tunnels: &self.tunnels,
            },
        )
    }

    /// The flags of pod `a`, alone, in both maps.
    fn flags(&self, observed: Observed) -> (u32, Option<u32>) {
        let plan = self.plan(vec![(pod("a"), observed)]);
        assert!(plan.cgroups.values().all(|info| info.flags == plan.cgroups[&10].flags));
        (plan.cgroups[&10].flags, plan.addresses.values().next().map(|record| record.flags))
    }
}

#[test]
fn a_pod_is_closed_until_a_tunnel_has_it() {
    let mut setting = Setting::default();
    assert_eq!(setting.flags(seen(1, vec![])), (IN_MESH, None), "closed before its first process");
    assert_eq!(setting.flags(in_order(1)), (IN_MESH, Some(IN_MESH)));
    setting.lenient = ["a".to_owned()].into();
    assert_eq!(setting.flags(in_order(1)), (IN_MESH | FAIL_OPEN, Some(IN_MESH | FAIL_OPEN)));
    setting.ready = ["a".to_owned()].into();
    assert_eq!(setting.flags(in_order(1)), (IN_MESH | READY, Some(IN_MESH | READY)));
}

#[test]
fn the_pods_own_fail_mode_beats_the_default() {
    let mut setting = Setting { fail_mode: FailMode::Open, ..Setting::default() };
    assert_eq!(setting.flags(in_order(1)).0, IN_MESH | FAIL_OPEN);
    let mut strict = pod("a");
    strict.fail_mode = Some(FailMode::Closed);
    assert_eq!(setting.plan(vec![(strict, in_order(1))]).cgroups[&10].flags, IN_MESH);
    setting.fail_mode = FailMode::Closed;
    let mut soft = pod("a");
    soft.fail_mode = Some(FailMode::Open);
    assert_eq!(setting.plan(vec![(soft, in_order(1))]).cgroups[&10].flags, IN_MESH | FAIL_OPEN);
}

#[test]
fn host_network_is_left_alone_but_a_wrong_address_stays_closed() {
    let plan = Setting::default().plan(vec![(pod("a"), seen(1, vec![Seen::Host]))]);
    assert_eq!(plan, Plan::default());
    let mut wrong = pod("a");
    wrong.addresses = [IpAddr::from([9, 9, 9, 9])].into();
    let plan = Setting::default().plan(vec![(wrong, in_order(1))]);
    assert_eq!((plan.cgroups.len(), plan.addresses.len(), plan.workloads.len()), (2, 0, 0));
}

#[test]
fn every_container_and_address_has_its_entry() {
    let mut setting = Setting { tunnels: [77].into(), ..Setting::default() };
    setting.policies.insert("a".to_owned(), 5);
    let plan = setting.plan(vec![(pod("a"), in_order(1))]);
    assert_eq!(plan.cgroups.keys().copied().collect::<Vec<_>>(), [10, 11, 77]);
    assert_eq!(plan.cgroups[&77].flags, TUNNEL);
    let info = plan.cgroups[&11];
    assert_eq!((info.v4, info.redirect_v4, info.policy_id), (mapped([10, 0, 0, 1]), info.v4, 5));
    assert_eq!(info.v6, address16("fd00::1".parse().unwrap()));
    assert_eq!(plan.addresses.len(), 2);
    assert_eq!(plan.policies.len(), 1);
}

fn kind(step: &Step) -> &'static str {
    match step {
        Step::RemoveCgroup(_) => "remove cgroup",
        Step::RemoveAddress(_) => "remove address",
        Step::Unsteer(_) => "unsteer",
        Step::Withdraw(_) => "withdraw",
        Step::Release(_) => "release",
        Step::SetPolicy(..) => "set policy",
        Step::SetExpected(..) => "set expected",
        Step::RemoveExpected(_) => "remove expected",
        Step::SetCgroup(..) => "set cgroup",
        Step::SetAddress(..) => "set address",
        Step::Prepare(..) => "prepare",
        Step::Steer(..) => "steer",
        Step::Offer(..) => "offer",
        Step::ClearPolicy(_) => "clear policy",
    }
}

fn kinds(applied: &Plan, wanted: &Plan) -> Vec<&'static str> {
    let mut kinds: Vec<&str> = steps(applied, wanted).iter().map(kind).collect();
    kinds.dedup();
    kinds
}

#[test]
fn leaving_is_the_reverse_of_coming() {
    let setting = Setting { policies: [("a".to_owned(), 1)].into(), ..Setting::default() };
    let enrolled = setting.plan(vec![(pod("a"), in_order(1))]);
    let nothing = Plan::default();
    assert_eq!(
        kinds(&nothing, &enrolled),
        ["set policy", "set cgroup", "set address", "prepare", "steer", "offer"]
    );
    assert_eq!(
        kinds(&enrolled, &nothing),
        ["remove cgroup", "remove address", "unsteer", "withdraw", "release", "clear policy"]
    );
    assert!(steps(&enrolled, &enrolled).is_empty());
}

#[test]
fn an_acknowledgement_changes_two_maps_and_nothing_else() {
    let before = Setting::default().plan(vec![(pod("a"), in_order(1)), (pod("b"), in_order(2))]);
    let after = Setting { ready: ["a".to_owned()].into(), ..Setting::default() }
        .plan(vec![(pod("a"), in_order(1)), (pod("b"), in_order(2))]);
    let found = steps(&before, &after);
    assert_eq!(found.len(), 4, "two cgroups and two addresses of pod a: {found:?}");
    assert_eq!(kinds(&before, &after), ["set cgroup", "set address"]);
}

#[test]
fn a_new_netns_of_the_same_pod_replaces_without_a_withdrawal() {
    let before = Setting::default().plan(vec![(pod("a"), in_order(1))]);
    let moved = seen(1, vec![Seen::Pod(NetnsFacts { cookie: 5, ..facts(1) })]);
    let after = Setting::default().plan(vec![(pod("a"), moved)]);
    assert_eq!(
        kinds(&before, &after),
        ["unsteer", "release", "set cgroup", "set address", "prepare", "steer", "offer"]
    );
}

#[test]
fn the_pods_own_word_on_its_dns_beats_the_nodes() {
    use adit_ebpf_common::pods::flag::NAMES;
    for (node, own, captured) in
        [(false, None, false), (true, None, true), (false, Some(true), true), (true, Some(false), false)]
    {
        let setting = Setting { dns_capture: node, ..Setting::default() };
        let pod = Pod { dns_capture: own, ..pod("a") };
        let plan = setting.plan(vec![(pod, in_order(1))]);
        assert_eq!(plan.cgroups[&10].flags & NAMES != 0, captured, "{node} {own:?}");
        assert!(plan.addresses.values().all(|record| record.flags & NAMES == 0), "inbound has no use for it");
    }
}
