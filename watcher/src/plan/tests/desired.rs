use adit_ebpf_common::{
    address::mapped,
    enrolment::flag::{DNS_CAPTURE, FAIL_OPEN, IN_MESH, READY},
};

use crate::plan::{PodPlan, address16};

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

#[test]
fn every_container_and_address_has_its_entry() {
    let mut setting = Setting::default();
    setting.exclusion_ids.insert("a".to_owned(), 5);
    let plan = &setting.plan(vec![(pod("a"), in_order(1))])["a"];
    assert_eq!(plan.cgroups.keys().copied().collect::<Vec<_>>(), [10, 11]);
    let info = plan.cgroups[&11];
    assert_eq!((info.v4, info.redirect_v4, info.exclusion_id), (mapped([10, 0, 0, 1]), info.v4, 5));
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
