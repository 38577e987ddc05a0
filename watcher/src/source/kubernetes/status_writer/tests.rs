use super::*;

fn api_pod(marked: bool, notes: &[&str]) -> ApiPod {
    let pod = json!({"metadata": {"uid": "u", "name": "n", "namespace": "d"}});
    let pod = serde_json::from_value(pod).unwrap();
    let mut api_pod = crate::source::kubernetes::pod::read(
        &pod,
        &crate::source::kubernetes::pod::ReadRules::default(),
        None,
    )
    .unwrap()
    .unwrap();
    api_pod.marked = marked;
    api_pod.pod.notes = notes.iter().map(|note| (*note).to_owned()).collect();
    api_pod
}

fn outcome(state: State, code: Option<ReasonCode>) -> Outcome {
    let reason = code.map(|code| Reason::new(code, "text"));
    Outcome { name: "n".to_owned(), namespace: "d".to_owned(), state, reason, addresses: Vec::new() }
}

fn tracked(api_pod: ApiPod, outcome: Outcome, now: Instant) -> TrackedPod {
    let mut tracked = TrackedPod { api_pod: Some(api_pod), ..TrackedPod::default() };
    tracked.set_outcome(Some(outcome), now);
    tracked
}

#[test]
fn the_annotation_follows_the_state_and_only_a_difference_is_written() {
    let now = Instant::now();
    for (state, marked, write) in [
        (State::Open, false, Some(Write::Annotation(true))),
        (State::Open, true, None),
        (State::Plain, true, Some(Write::Annotation(false))),
        (State::Plain, false, None),
        (State::Refused, true, Some(Write::Annotation(false))),
        // The tunnel is away for a moment.
        (State::Closed, true, None),
        (State::Closed, false, None),
    ] {
        let next = tracked(api_pod(marked, &[]), outcome(state, None), now).next(now);
        assert_eq!(next.map(|(write, _)| write), write, "{state:?} {marked}");
    }
}

#[test]
fn a_reason_is_told_once_and_only_if_it_lasts() {
    let now = Instant::now();
    let mut pod = tracked(api_pod(false, &[]), outcome(State::Closed, Some(ReasonCode::TunnelRefused)), now);
    let (write, at) = pod.next(now).unwrap();
    let Write::Event(warning) = write else { panic!("{write:?}") };
    assert_eq!((warning.reason.as_str(), at), ("TunnelRefused", now + EVENT_DELAY));
    pod.reported.insert(warning);
    assert_eq!(pod.next(now), None);
    // What passes by itself, and what is meant to be so, is no Event.
    for code in ReasonCode::ALL.iter().filter(|code| !code.needs_action()) {
        assert_eq!(
            tracked(api_pod(false, &[]), outcome(State::Closed, Some(*code)), now).next(now),
            None,
            "{code}"
        );
    }
    pod.set_outcome(Some(outcome(State::Closed, Some(ReasonCode::AddressNotHeld))), now);
    pod.set_outcome(Some(outcome(State::Open, None)), now + EVENT_DELAY);
    assert_eq!(pod.next(now + EVENT_DELAY).map(|(write, _)| write), Some(Write::Annotation(true)));
}

#[test]
fn nonsense_in_annotations_is_told_at_once() {
    let now = Instant::now();
    let pod = tracked(api_pod(true, &["key: \"x\" ignored"]), outcome(State::Open, None), now);
    let Some((Write::Event(warning), at)) = pod.next(now) else { panic!("{pod:?}") };
    assert_eq!((warning.reason.as_str(), at), ("BadAnnotation", now));
    let long = PodWarning::new(ReasonCode::BadAnnotation, &"ü".repeat(MAX_NOTE_BYTES));
    assert!(long.note.len() <= MAX_NOTE_BYTES);
}

#[tokio::test(start_paused = true)]
async fn a_limit_lets_a_burst_pass_and_then_one_at_a_time() {
    let mut limit = RateLimit::new(Duration::from_secs(1), 3);
    for _ in 0..3 {
        assert!(limit.next() <= Instant::now());
        limit.take(Instant::now());
    }
    assert_eq!(limit.next() - Instant::now(), Duration::from_secs(1));
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(limit.next() <= Instant::now());
    limit.take(Instant::now());
    assert_eq!(limit.next() - Instant::now(), Duration::from_secs(1));
}
