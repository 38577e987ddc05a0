use adit_ebpf_common::{
    address::mapped,
    enrolment::flag::{DNS_CAPTURE, FAIL_OPEN, IN_MESH, READY},
};

use crate::plan::{PodPlan, Reason, ReasonCode, address16};

use super::*;

/// The flags of pod `a`, alone, in both maps.
fn flags(setting: &Setting, observed: Observed) -> (u32, Option<u32>) {
    let plan = &setting.plan(vec![(pod("a"), observed)])["a"];
    assert!(plan.cgroups.values().all(|info| info.flags == plan.cgroups[&10].flags));
    (plan.cgroups[&10].flags, plan.addresses.values().next().map(|record| record.flags))
}

#[test]
fn a_pod_is_closed_until_a_tunnel_serves_it() {
    let mut setting = Setting::default();
    assert_eq!(flags(&setting, seen(1, vec![])), (IN_MESH, None), "closed before its first process");
    assert_eq!(flags(&setting, in_order(1)), (IN_MESH, Some(IN_MESH)));
    setting.in_grace = ["a".to_owned()].into();
    assert_eq!(flags(&setting, in_order(1)), (IN_MESH | FAIL_OPEN, Some(IN_MESH | FAIL_OPEN)));
    setting.ready = ["a".to_owned()].into();
    assert_eq!(flags(&setting, in_order(1)), (IN_MESH | READY, Some(IN_MESH | READY)));
}

#[test]
fn the_pods_own_fail_mode_beats_the_default() {
    let mut setting = Setting { fail_mode: FailMode::Open, ..Setting::default() };
    assert_eq!(flags(&setting, in_order(1)).0, IN_MESH | FAIL_OPEN);
    let mut strict = pod("a");
    strict.fail_mode = Some(FailMode::Closed);
    assert_eq!(setting.plan(vec![(strict, in_order(1))])["a"].cgroups[&10].flags, IN_MESH);
    setting.fail_mode = FailMode::Closed;
    let mut soft = pod("a");
    soft.fail_mode = Some(FailMode::Open);
    assert_eq!(setting.plan(vec![(soft, in_order(1))])["a"].cgroups[&10].flags, IN_MESH | FAIL_OPEN);
}

#[test]
fn host_network_is_left_alone_but_a_wrong_address_stays_closed() {
    let plan = Setting::default().plan(vec![(pod("a"), seen(1, vec![ObservedNetns::Host]))]);
    assert_eq!(plan["a"], PodPlan::default());
    let mut wrong = pod("a");
    wrong.addresses = [IpAddr::from([9, 9, 9, 9])].into();
    let plan = Setting::default().plan(vec![(wrong, in_order(1))]);
    let plan = &plan["a"];
    assert_eq!((plan.cgroups.len(), plan.addresses.len(), plan.workload.is_some()), (2, 0, false));
}

/// The flags of each netns of pod `a` for arrivals, and whether it is prepared.
fn netns(plan: &PodPlan) -> Vec<(u64, u32, bool)> {
    assert!(plan.netns.keys().eq(plan.arrivals.keys()), "{plan:?}");
    plan.arrivals.iter().map(|(cookie, info)| (*cookie, info.flags, plan.netns[cookie].prepared)).collect()
}

fn not_known() -> Gap {
    Gap::NotKnown(Reason::new(ReasonCode::NotObserved, "too many open files"))
}

#[test]
fn a_pod_that_is_closed_is_closed_both_ways_in_every_netns_of_its_own() {
    let setting = Setting { fail_mode: FailMode::Closed, ..Setting::default() };
    let plan = |pod: Pod, observed| setting.plan(vec![(pod, observed)]).remove("a").unwrap();
    let told = |last: u8| Pod { addresses: [IpAddr::from([10, 0, 0, last])].into(), ..pod("a") };
    let found = plan(told(1), in_order(1));
    assert_eq!(netns(&found), [(1001, IN_MESH, true)]);
    assert_eq!(found.arrivals[&1001].cgroup_id, 10, "the pod's own cgroup");
    let not_held = plan(told(99), in_order(1));
    assert_eq!(netns(&not_held), [(1001, IN_MESH, false)]);
    assert_eq!(not_held.cgroups[&10].netns_cookie, 1001, "what is in another netns is none of it");
    let no_address = NetnsFacts { addresses: vec![], ..facts(1) };
    let waits = plan(pod("a"), seen(1, vec![ObservedNetns::Pod(no_address.clone())]));
    assert_eq!(netns(&waits), [(1001, IN_MESH, false)]);
    let child = NetnsFacts { cookie: 7, ..no_address };
    let several = [facts(1), facts(2), child].map(ObservedNetns::Pod).to_vec();
    let disagree = plan(pod("a"), seen(1, several));
    assert_eq!(netns(&disagree), [(1001, IN_MESH, false), (1002, IN_MESH, false)]);
    assert_eq!(disagree.cgroups[&10].netns_cookie, 0, "closed in all of them");
    let host = plan(told(1), Observed { gap: Some(not_known()), ..seen(1, vec![ObservedNetns::Host]) });
    assert!(host.netns.is_empty() && host.arrivals.is_empty() && !host.cgroups.is_empty());
    let neighbours = setting.plan(vec![(pod("b"), in_order(1)), (pod("a"), in_order(1))]);
    assert!(neighbours["a"].netns.is_empty(), "another pod's");
    let left_alone = Pod { selection: Selection::Plain, ..told(99) };
    assert_eq!(plan(left_alone, in_order(1)), PodPlan::default());
}

#[test]
fn the_netns_that_a_pod_was_enrolled_with_stays_closed_when_it_is_not_seen() {
    let observed = Observed { gap: Some(not_known()), ..seen(1, vec![]) };
    let views = evaluate_all(placed(vec![(pod("a"), observed)]), &[("a".to_owned(), 1001)].into());
    let steered = Setting::default().plan(vec![(pod("a"), in_order(1))]).remove("a").unwrap().netns;
    let circumstances = Circumstances { steered, ..Circumstances::default() };
    let plan = pod_plan(&views[0], &circumstances);
    assert_eq!(netns(&plan), [(1001, IN_MESH, false)]);
    assert_eq!(plan.cgroups[&10].netns_cookie, 1001);

    let without_process = seen(1, vec![]);
    let views = evaluate_all(placed(vec![(pod("a"), without_process)]), &[("a".to_owned(), 1001)].into());
    let plan = pod_plan(&views[0], &circumstances);
    assert_eq!(netns(&plan), [(1001, IN_MESH, false)]);
    assert_eq!(plan.cgroups[&10].netns_cookie, 0, "its next process may have another");
}

#[test]
fn every_container_and_address_has_its_entry() {
    let mut setting = Setting::default();
    setting.exclusion_ids.insert("a".to_owned(), 5);
    let plan = &setting.plan(vec![(pod("a"), in_order(1))])["a"];
    assert_eq!(plan.cgroups.keys().copied().collect::<Vec<_>>(), [10, 11]);
    let info = plan.cgroups[&11];
    assert_eq!((info.v4, info.exclusion_id), (mapped([10, 0, 0, 1]), 5));
    assert_eq!(info.v6, address16("fd00::1".parse().unwrap()));
    assert_eq!(plan.addresses.len(), 2);
    assert_eq!(plan.exclusions.as_ref().map(|(id, _)| *id), Some(5));
}

#[test]
fn the_pods_own_choice_of_dns_capture_beats_the_nodes() {
    for (node, own, captured) in
        [(false, None, false), (true, None, true), (false, Some(true), true), (true, Some(false), false)]
    {
        let setting = Setting { dns_capture: node, ..Setting::default() };
        let pod = Pod { dns_capture: own, ..pod("a") };
        let plan = &setting.plan(vec![(pod, in_order(1))])["a"];
        assert_eq!(plan.cgroups[&10].flags & DNS_CAPTURE != 0, captured, "{node} {own:?}");
        assert!(
            plan.addresses.values().all(|record| record.flags & DNS_CAPTURE == 0),
            "inbound has no use for it"
        );
    }
}

#[test]
fn what_a_pod_makes_below_its_containers_takes_no_room_in_the_map() {
    let mut observed = in_order(1);
    let dir = observed.dir.clone().unwrap();
    observed.cgroups.extend((0..1000).map(|n| (dir.join(format!("c/{n}")), 1000 + n)));
    observed.cgroups.extend((0..1000).map(|n| (dir.join(format!("c{n}")), 5000 + n)));
    let plan = Setting::default().plan(vec![(pod("a"), observed)]).remove("a").unwrap();
    assert!(plan.cgroups.contains_key(&10) && plan.cgroups.len() <= 33, "{} entries", plan.cgroups.len());
}

#[test]
fn a_pod_that_leaves_keeps_its_hbone_listener_and_nothing_else() {
    let (mut leaving, observed) = (pod("a"), in_order(1));
    leaving.selection = Selection::Plain;
    let dir = observed.dir.clone().unwrap();
    let served = &Setting::default().plan(vec![(pod("a"), in_order(1))])["a"];
    let view = PodView {
        pod: Arc::new(leaving),
        observed: Observed { dir: Some(dir), ..Observed::default() },
        eligibility: Eligibility::Plain(None),
        closed_netns: BTreeMap::new(),
    };
    let steered = served.netns.clone();
    let circumstances = Circumstances { leaving: true, steered, ..Circumstances::default() };
    let plan = pod_plan(&view, &circumstances);
    assert!(plan.cgroups.is_empty() && plan.addresses.is_empty() && plan.exclusions.is_none());
    assert_eq!(netns(&plan), [(1001, IN_MESH | FAIL_OPEN, true)], "what arrives passes");
    assert_eq!(plan.workload.as_ref().map(|workload| workload.cookie), Some(1001));
    let over = Circumstances { leaving: false, ..circumstances };
    assert_eq!(pod_plan(&view, &over), PodPlan::default());
}
