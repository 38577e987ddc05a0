use crate::plan::{Reason, ReasonCode};

use super::*;

fn not_known(code: ReasonCode) -> Gap {
    Gap::NotKnown(Reason::new(code, "too many open files"))
}

fn results(pods: Vec<(Pod, Observed)>) -> Vec<Eligibility> {
    evaluate_all(placed(pods), &BTreeMap::new()).into_iter().map(|view| view.eligibility).collect()
}

fn code(eligibility: &Eligibility) -> &str {
    match eligibility {
        Eligibility::Plain(_) => "plain",
        Eligibility::Eligible(_) => "eligible",
        Eligibility::Waiting(reason) | Eligibility::Refused { reason, .. } => reason.code.code(),
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
        ("host_netns", pod("bad"), seen(3, vec![ObservedNetns::Host])),
        ("netns_disagree", pod("bad"), seen(3, vec![ObservedNetns::Host, ObservedNetns::Pod(facts(3))])),
        (
            "netns_unreadable",
            pod("bad"),
            Observed { gap: Some(not_known(ReasonCode::NetnsUnreadable)), ..in_order(3) },
        ),
        (
            "not_observed",
            pod("bad"),
            Observed { gap: Some(not_known(ReasonCode::NotObserved)), ..Observed::default() },
        ),
        (
            "over_budget",
            pod("bad"),
            Observed { gap: Some(Gap::OverBudget(Reason::new(ReasonCode::OverBudget, ""))), ..in_order(3) },
        ),
        ("no_process", pod("bad"), seen(3, vec![])),
        (
            "no_address",
            pod("bad"),
            seen(3, vec![ObservedNetns::Pod(NetnsFacts { addresses: vec![], ..facts(3) })]),
        ),
        ("address_not_held", with(&|bad| bad.addresses = [IpAddr::from([10, 0, 0, 99])].into()), in_order(3)),
        ("netns_taken", pod("bad"), in_order(1)),
        (
            "address_taken",
            pod("bad"),
            seen(3, vec![ObservedNetns::Pod(NetnsFacts { cookie: 7, ..facts(1) })]),
        ),
    ];
    for (expected, bad, observed) in table {
        let found = results(vec![(pod("a"), in_order(1)), (bad, observed), (pod("b"), in_order(2))]);
        let codes: Vec<&str> = found.iter().map(code).collect();
        assert_eq!(codes, ["eligible", expected, "eligible"]);
    }
}

#[test]
fn the_first_owner_of_an_address_keeps_it_until_it_is_released() {
    let mut claims = Claims::default();
    let evaluate = |claims: &mut Claims, uid: &str, n: u8, facts: NetnsFacts| {
        let mut observed = seen(n, vec![ObservedNetns::Pod(facts)]);
        observed.dir = pod(uid).cgroup;
        evaluate(&pod(uid), &observed, Path::new(ATTACHED), None, claims)
    };
    let second = NetnsFacts { cookie: 7, ..facts(1) };
    assert_eq!(code(&evaluate(&mut claims, "a", 1, facts(1))), "eligible");
    assert_eq!(code(&evaluate(&mut claims, "b", 2, second.clone())), "address_taken");
    // Evaluated again, the first one still has it.
    assert_eq!(code(&evaluate(&mut claims, "a", 1, facts(1))), "eligible");
    let claimed = claims.of("a");
    claims.release("a");
    assert!(claimed.frees(&claims.of("a")));
    assert_eq!(code(&evaluate(&mut claims, "b", 2, second)), "eligible");
    assert_eq!(claims.owner(&Path::new(ATTACHED).join("b/container/nested")), Some("b"));
    assert_eq!(claims.owner(Path::new(ATTACHED)), None);
}

#[test]
fn a_pod_stays_in_its_netns_while_one_process_does() {
    let observed =
        seen(1, vec![ObservedNetns::Pod(facts(9)), ObservedNetns::Pod(facts(1)), ObservedNetns::Host]);
    let current = [("a".to_owned(), facts(1).cookie)].into();
    let views = evaluate_all(placed(vec![(pod("a"), observed)]), &current);
    assert_eq!(views[0].eligibility, Eligibility::Eligible(facts(1)));
}

#[test]
fn of_several_netns_the_one_with_the_pods_addresses_is_its_own() {
    let told = |last: u8| Pod { addresses: [IpAddr::from([10, 0, 0, last])].into(), ..pod("a") };
    let child = || ObservedNetns::Pod(NetnsFacts { addresses: vec![], ..facts(9) });
    let [own, other] = [1, 2].map(|n| ObservedNetns::Pod(facts(n)));
    let found = |pod: Pod, netns: Vec<ObservedNetns>| results(vec![(pod, seen(1, netns))]).remove(0);
    let cookie = |found: &Eligibility| found.facts().map(|facts| facts.cookie);
    assert_eq!(cookie(&found(told(1), vec![own.clone(), other.clone(), ObservedNetns::Host])), Some(1001));
    assert_eq!(cookie(&found(told(2), vec![own.clone(), other.clone()])), Some(1002));
    assert_eq!(code(&found(told(3), vec![own.clone(), other.clone()])), "netns_disagree");
    assert_eq!(cookie(&found(pod("a"), vec![child(), own.clone()])), Some(1001), "a child reaches nobody");
    assert_eq!(code(&found(pod("a"), vec![own.clone(), other])), "netns_disagree");
    assert_eq!(code(&found(pod("a"), vec![own, ObservedNetns::Host])), "netns_disagree");
}

#[test]
fn an_address_belongs_to_the_pod_that_it_is_told_of() {
    let mut claims = Claims::default();
    let mut evaluate = |uid: &str, n: u8, told: bool| {
        let addresses = if told { facts(1).addresses.into_iter().collect() } else { BTreeSet::new() };
        let pod = Pod { addresses, ..pod(uid) };
        let mut observed = seen(n, vec![ObservedNetns::Pod(NetnsFacts { cookie: u64::from(n), ..facts(1) })]);
        observed.dir = pod.cgroup.clone();
        let found = evaluate(&pod, &observed, Path::new(ATTACHED), None, &mut claims);
        (code(&found).to_owned(), claims.take_evicted().into_iter().collect::<Vec<_>>())
    };
    assert_eq!(evaluate("thief", 2, false), ("eligible".to_owned(), vec![]));
    assert_eq!(evaluate("victim", 3, true), ("eligible".to_owned(), vec!["thief".to_owned()]));
    assert_eq!(evaluate("thief", 2, false), ("address_taken".to_owned(), vec![]));
    assert_eq!(evaluate("victim", 3, true), ("eligible".to_owned(), vec![]));
    assert_eq!(evaluate("other", 4, true), ("address_taken".to_owned(), vec![]), "told of both");
}

#[test]
fn named_addresses_come_first_and_then_those_that_no_other_pod_has() {
    let [named, second, link] = [[10, 0, 0, 1], [192, 168, 0, 1], [169, 254, 0, 1]].map(IpAddr::from);
    let several = |n: u8, others: usize| {
        let more = (0..others).map(|last| IpAddr::from([192, 168, 1, u8::try_from(last).unwrap()]));
        let mut facts = NetnsFacts { link_local_v4: vec![link], ..facts(n) };
        facts.addresses = [second].into_iter().chain(facts.addresses).chain(more).collect();
        seen(n, vec![ObservedNetns::Pod(facts)])
    };
    let named_in = |n: u8| {
        let mut pod = pod(&n.to_string());
        pod.addresses = [IpAddr::from([10, 0, 0, n])].into();
        pod
    };
    let addresses = |found: &Eligibility| found.facts().map(|facts| facts.addresses.clone()).unwrap();
    let found = results(vec![(named_in(1), several(1, 0)), (named_in(2), several(2, 0))]);
    assert_eq!(addresses(&found[0]), [named, second, "fd00::1".parse().unwrap(), link]);
    let v6 = "fd00::2".parse().unwrap();
    assert_eq!(addresses(&found[1]), [IpAddr::from([10, 0, 0, 2]), v6], "the first pod has the others");
    let many = results(vec![(named_in(1), several(1, 100))]);
    assert_eq!(addresses(&many[0]).len(), 1 + 8);
}

#[test]
fn a_pod_that_was_never_observed_is_closed() {
    use adit_ebpf_common::enrolment::flag::IN_MESH;
    for (cgroups, expected) in [(in_order(1).cgroups, 0), (BTreeMap::new(), 1)] {
        let known = cgroups.len();
        let observed = Observed { cgroups, gap: Some(not_known(ReasonCode::NotObserved)), ..seen(1, vec![]) };
        let plan = Setting::default().plan(vec![(pod("a"), observed)]).remove("a").unwrap();
        assert_eq!((plan.cgroups.len(), plan.expected.len()), (known, expected));
        assert!(plan.cgroups.values().chain(plan.expected.values()).all(|info| info.flags == IN_MESH));
        assert!(plan.netns.is_empty());
    }
}
