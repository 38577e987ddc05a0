//! Certificates of new pods, of which the certificate service may not know yet.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_new_pod_is_asked_for_until_the_authority_knows_it() {
    let bench = bench();
    bench.script.unknown.store(4, Ordering::Relaxed);
    let (id, began) = (identity("a"), Instant::now());
    bench.certificates.serve(&HashSet::new(), &HashSet::from([id.clone()]));
    bench.certificates.get(&id).await.unwrap();
    let took = began.elapsed();
    assert!((Duration::from_millis(200)..Duration::from_millis(500)).contains(&took), "{took:?}");
    assert_eq!(bench.script.requested(), 5);

    // A second one of that account needs no other.
    bench.certificates.expect_newcomer(&id);
    bench.certificates.get(&id).await.unwrap();
    assert_eq!(bench.script.requested(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_stays_unknown_fails_and_asking_does_not_hurry_it() {
    let bench = bench();
    bench.script.unknown.store(usize::MAX, Ordering::Relaxed);
    let (id, began) = (identity("a"), Instant::now());
    bench.certificates.serve(&HashSet::new(), &HashSet::from([id.clone()]));
    let all = futures_util::future::join_all((0..100).map(|_| bench.certificates.get(&id))).await;
    assert!(all.iter().all(Result::is_err));
    assert!((5..7).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    let asked = bench.script.requested();
    assert!(asked < 20, "{asked}");

    // Another pod of it comes: it may be known by now.
    bench.script.unknown.store(1, Ordering::Relaxed);
    bench.certificates.expect_newcomer(&id);
    bench.certificates.get(&id).await.unwrap();
    assert_eq!(bench.script.requested(), asked + 2);
}

#[tokio::test(start_paused = true)]
async fn a_new_pod_is_asked_for_when_it_is_told_and_an_outage_is_told_at_once() {
    let bench = bench();
    bench.script.unknown.store(usize::MAX, Ordering::Relaxed);
    let (id, told) = (identity("a"), HashSet::from([identity("a")]));
    bench.certificates.serve(&HashSet::new(), &told);
    tokio::time::sleep(Duration::from_secs(3)).await;
    bench.script.unknown.store(0, Ordering::Relaxed);
    let asked = bench.script.requested();
    let began = Instant::now();
    bench.certificates.serve(&told, &HashSet::new());
    bench.certificates.get(&id).await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(20), "{:?}", began.elapsed());
    assert_eq!(bench.script.requested(), asked + 1);

    bench.script.break_it(true);
    let other = identity("b");
    bench.certificates.serve(&told, &HashSet::from([other.clone()]));
    bench.certificates.get(&other).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_millis(20), "{:?}", began.elapsed());
}
