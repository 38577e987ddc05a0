use adit_ebpf_common::enrolment::flag::{FAIL_OPEN, IN_MESH, READY};

use crate::{
    model::{
        reason::{Reason, ReasonCode},
        state::State,
    },
    plan::{
        cgroup_info,
        pod_state::{PodProgress, pod_state},
    },
};

use super::*;

const NOTHING: PodProgress<'_> = PodProgress {
    info: None,
    fail_mode: FailMode::Closed,
    tunnel_up: true,
    connected: true,
    problem: None,
    refusal: None,
};

fn view(observed: Observed) -> PodView {
    evaluate_all(placed(vec![(pod("a"), observed)]), &BTreeMap::new()).remove(0)
}

fn state(view: &PodView, progress: &PodProgress<'_>) -> (State, String) {
    let (state, reason) = pod_state(view, progress);
    (state, reason.map(|reason| reason.code.code().to_owned()).unwrap_or_default())
}

#[test]
fn a_served_pod_is_open_and_any_other_says_why_it_is_not() {
    let eligible = view(in_order(1));
    let problem = Reason::new(ReasonCode::NetnsNotPrepared, "EPERM");
    let [ready, closed, open] =
        [IN_MESH | READY, IN_MESH, IN_MESH | FAIL_OPEN].map(|flags| cgroup_info(flags, 0, &[]));
    let with = |info| PodProgress { info: Some(info), ..NOTHING };
    for (progress, expected) in [
        (with(&ready), (State::Open, "")),
        (PodProgress { tunnel_up: false, connected: false, ..with(&ready) }, (State::Closed, "no_tunnel")),
        (with(&closed), (State::Closed, "not_acknowledged")),
        (with(&open), (State::Bypassed, "not_acknowledged")),
        // Its entry is gone: the programs leave it alone.
        (NOTHING, (State::Bypassed, "not_acknowledged")),
        (PodProgress { refusal: Some("no"), ..with(&closed) }, (State::Closed, "tunnel_refused")),
        (PodProgress { connected: false, ..with(&closed) }, (State::Closed, "no_tunnel")),
        (
            PodProgress { problem: Some(&problem), connected: false, ..with(&closed) },
            (State::Closed, "netns_not_prepared"),
        ),
    ] {
        let (expected, code) = expected;
        assert_eq!(state(&eligible, &progress), (expected, code.to_owned()), "{progress:?}");
    }
}

#[test]
fn a_pod_that_is_not_eligible_has_the_reason_of_that() {
    let closed = cgroup_info(IN_MESH, 0, &[]);
    let empty = PodProgress { info: Some(&closed), ..NOTHING };
    assert_eq!(state(&view(seen(1, vec![])), &empty), (State::Closed, "no_process".to_owned()));
    assert_eq!(
        state(&view(seen(1, vec![ObservedNetns::Host])), &NOTHING),
        (State::Refused, "host_netns".to_owned())
    );
    let mut plain = view(in_order(1));
    plain.eligibility = Eligibility::Plain(None);
    assert_eq!(state(&plain, &empty), (State::Plain, String::new()));
}

#[test]
fn before_its_cgroup_is_made_a_pod_is_as_its_first_connection_will_find_it() {
    let mut early = view(Observed::default());
    early.eligibility = Eligibility::Waiting(Reason::new(ReasonCode::NoCgroup, ""));
    assert_eq!(state(&early, &NOTHING).0, State::Closed);
    assert_eq!(state(&early, &PodProgress { fail_mode: FailMode::Open, ..NOTHING }).0, State::Bypassed);
}
