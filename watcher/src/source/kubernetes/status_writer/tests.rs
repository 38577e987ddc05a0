use super::*;

fn seen(marked: bool, notes: &[&str]) -> Seen {
    let pod = json!({"metadata": {"uid": "u", "name": "n", "namespace": "d"}});
    let pod = serde_json::from_value(pod).unwrap();
    let mut seen =
        crate::source::kubernetes::pod::read(&pod, &crate::source::kubernetes::pod::Rules::default())
            .unwrap()
            .unwrap();
    seen.marked = marked;
    seen.pod.notes = notes.iter().map(|note| (*note).to_owned()).collect();
    seen
}

fn outcome(state: State, code: Option<ReasonCode>) -> Outcome {
    let reason = code.map(|code| Reason::new(code, "text"));
    Outcome { name: "n".to_owned(), namespace: "d".to_owned(), state, reason, addresses: Vec::new() }
}

fn known(seen: Seen, outcome: Outcome, now: Instant) -> Known {
    let mut known = Known { seen: Some(seen), ..Known::default() };
    known.set_outcome(Some(outcome), now);
    known
}

#[test]
fn the_annotation_follows_the_state_and_only_a_difference_is_written() {
    let now = Instant::now();
    for (state, marked, job) in [
        (State::Open, false, Some(Job::Mark(true))),
        (State::Open, true, None),
        (State::Plain, true, Some(Job::Mark(false))),
        (State::Plain, false, None),
        (State::Refused, true, Some(Job::Mark(false))),
        // The tunnel is away for a moment.
        (State::Closed, true, None),
        (State::Closed, false, None),
    ] {
        let next = known(seen(marked, &[]), outcome(state, None), now).next(now);
        assert_eq!(next.map(|(job, _)| job), job, "{state:?} {marked}");
    }
}

#[test]
fn a_reason_is_told_once_and_only_if_it_lasts() {
    let now = Instant::now();
    let mut pod = known(seen(false, &[]), outcome(State::Closed, Some(ReasonCode::TunnelRefused)), now);
    let (job, at) = pod.next(now).unwrap();
    let Job::Tell(complaint) = job else { panic!("{job:?}") };
    assert_eq!((complaint.reason.as_str(), at), ("TunnelRefused", now + LASTS));
    pod.told.insert(complaint);
    assert_eq!(pod.next(now), None);
    // What passes by itself, and what is meant to be so, is no Event.
    for code in ReasonCode::ALL.iter().filter(|code| !code.needs_action()) {
        assert_eq!(
            known(seen(false, &[]), outcome(State::Closed, Some(*code)), now).next(now),
            None,
            "{code}"
        );
    }
    pod.set_outcome(Some(outcome(State::Closed, Some(ReasonCode::AddressNotHeld))), now);
    pod.set_outcome(Some(outcome(State::Open, None)), now + LASTS);
    assert_eq!(pod.next(now + LASTS).map(|(job, _)| job), Some(Job::Mark(true)));
}

#[test]
fn nonsense_in_annotations_is_told_at_once() {
    let now = Instant::now();
    let pod = known(seen(true, &["key: \"x\" ignored"]), outcome(State::Open, None), now);
    let Some((Job::Tell(complaint), at)) = pod.next(now) else { panic!("{pod:?}") };
    assert_eq!((complaint.reason.as_str(), at), ("BadAnnotation", now));
    let long = Complaint::new(ReasonCode::BadAnnotation, &"ü".repeat(NOTE_BYTES));
    assert!(long.note.len() <= NOTE_BYTES);
}

#[tokio::test(start_paused = true)]
async fn a_limit_lets_a_burst_pass_and_then_one_at_a_time() {
    let mut limit = Limit::new(Duration::from_secs(1), 3);
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
