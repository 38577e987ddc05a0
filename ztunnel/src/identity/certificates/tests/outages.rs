//! Clocks that jump, and authorities that are away, stale or refuse.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_node_that_was_suspended_recovers_within_a_minute() {
    let bench = bench();
    let [a, b] = [identity("a"), identity("b")];
    let (first_a, first_b) =
        (bench.certificates.get(&a).await.unwrap(), bench.certificates.get(&b).await.unwrap());
    // The wall clock went on for two hours, the monotonic one stood still.
    let asleep = 2 * 3600;
    bench.ahead.fetch_add(asleep, Ordering::Relaxed);
    // The authority's clock is right, and so is the node's from now on.
    bench.script.break_it(true);
    let error = bench.certificates.get(&a).await.unwrap_err();
    assert!(matches!(error, IdentityError::TimedOut { .. }), "never an expired one: {error}");
    bench.script.break_it(false);
    bench.ahead.fetch_sub(asleep, Ordering::Relaxed);
    let of_a = bench.script.requested.lock().unwrap().iter().filter(|id| **id == a).count();
    assert_eq!(of_a, 2, "asked for at once");
    let again = renewed(&bench, &first_a, Duration::from_mins(1)).await;
    assert!(!Arc::ptr_eq(&again, &first_a));
    // Nobody asks for this one; the tick finds it.
    bench.ahead.fetch_add(40 * 60, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_mins(1)).await;
    let held = bench.certificates.list().into_iter().find(|known| known.identity == b).unwrap();
    assert!(!Arc::ptr_eq(held.credentials.as_ref().unwrap(), &first_b), "past half of its lifetime");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_set_back_does_not_put_renewal_off() {
    let bench = bench();
    let first = bench.certificates.get(&identity("a")).await.unwrap();
    bench.ahead.fetch_sub(24 * 3600, Ordering::Relaxed);
    renewed(&bench, &first, Duration::from_mins(35)).await;
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_arrives_stale_is_not_fetched_in_a_loop() {
    let bench = bench();
    bench.ahead.store(50 * 60, Ordering::Relaxed);
    bench.certificates.get(&identity("a")).await.expect("still valid for some minutes");
    tokio::time::sleep(Duration::from_mins(9)).await;
    let requested = bench.script.requested();
    assert!((5..=20).contains(&requested), "{requested} times in nine minutes");
    // Further ahead than it lives: nothing to use, and no loop either.
    bench.ahead.store(3 * 3600, Ordering::Relaxed);
    let error = bench.certificates.get(&identity("b")).await.unwrap_err();
    assert!(matches!(error, IdentityError::Expired { .. }), "{error}");
    bench.ahead.store(0, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(10)).await;
    bench.certificates.get(&identity("b")).await.expect("the clock is right again");
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_everything_is_fetched_at_once() {
    let mut bench = bench();
    let all: Vec<_> = (0..6).map(|n| identity(&format!("waits-{n}"))).collect();
    for one in &all {
        bench.lease(&one.service_account);
    }
    bench.script.break_it(true);
    bench.certificates.serve(&all.iter().cloned().collect(), &HashSet::new());
    tokio::time::sleep(Duration::from_mins(20)).await;
    bench.script.break_it(false);
    // The delays are at 150 s by now. Somebody asks for one of them.
    timeout(Duration::from_secs(1), bench.certificates.get(&all[0])).await.expect("at once").unwrap();
    tokio::time::sleep(Duration::from_secs(8)).await;
    let held = bench.certificates.list().iter().filter(|known| known.credentials.is_some()).count();
    assert_eq!(held, all.len(), "the first success shows that the outage is over");
}

#[tokio::test(start_paused = true)]
async fn a_refused_identity_is_not_asked_for_whenever_another_one_is_signed() {
    let mut bench = bench();
    *bench.script.refused.lock().unwrap() = Some(identity("b"));
    *bench.script.takes.lock().unwrap() = Duration::from_millis(100);
    let mut all: HashSet<_> = (0..80).map(|n| identity(&format!("pod-{n}"))).collect();
    for one in &all {
        bench.lease(&one.service_account);
    }
    all.insert(identity("b"));
    bench.certificates.serve(&all, &HashSet::new());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(bench.script.requested() >= 81, "all were asked for");
    let of_b = bench.script.requested.lock().unwrap().iter().filter(|id| **id == identity("b")).count();
    assert!(of_b <= 3, "{of_b} times in two seconds");
}

#[tokio::test(start_paused = true)]
async fn who_asks_during_an_outage_does_not_hammer_the_authority() {
    let bench = bench();
    bench.script.break_it(true);
    let end = Instant::now() + Duration::from_mins(5);
    while Instant::now() < end {
        bench.certificates.get(&identity("a")).await.unwrap_err();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let requested = bench.script.requested();
    assert!((30..=130).contains(&requested), "every 5 s, more or less: {requested} in five minutes");
}
