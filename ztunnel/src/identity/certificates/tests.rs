use std::{
    sync::atomic::{AtomicI64, AtomicUsize, Ordering},
    time::SystemTime,
};

use tokio::{task::JoinHandle, time::timeout};

use super::*;
use crate::identity::authority::Issuing;

mod newcomers;
mod outages;

const HOUR: Duration = Duration::from_hours(1);

/// Signs with a development CA, when and whether the test says.
struct Scripted {
    ca: DevelopmentCa,
    _folder: tempfile::TempDir,
    script: Arc<Script>,
}

#[derive(Default)]
struct Script {
    /// Every identity that was requested, in order.
    requested: Mutex<Vec<Identity>>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
    broken: std::sync::atomic::AtomicBool,
    /// How many further fetches panic.
    panics: AtomicUsize,
    /// An identity that it never signs.
    refused: Mutex<Option<Identity>>,
    /// How many further requests it refuses, since it does not know the pod.
    unknown: AtomicUsize,
    takes: Mutex<Duration>,
}

impl Script {
    fn requested(&self) -> usize {
        self.requested.lock().unwrap().len()
    }

    fn break_it(&self, broken: bool) {
        self.broken.store(broken, Ordering::Relaxed);
    }
}

impl Authority for Scripted {
    fn issue(&self, identity: &Identity) -> Issuing {
        let script = Arc::clone(&self.script);
        script.requested.lock().unwrap().push(identity.clone());
        let now = script.under_way.fetch_add(1, Ordering::Relaxed) + 1;
        script.most_under_way.fetch_max(now, Ordering::Relaxed);
        let signing = self.ca.issue(identity);
        let refused = script.refused.lock().unwrap().as_ref() == Some(identity);
        Box::pin(async move {
            let takes = *script.takes.lock().unwrap();
            tokio::time::sleep(takes).await;
            script.under_way.fetch_sub(1, Ordering::Relaxed);
            let left =
                script.panics.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            assert!(left.is_err(), "on purpose");
            let unknown =
                script.unknown.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            if unknown.is_ok() {
                let status = Arc::new(tonic::Status::permission_denied("no such pod"));
                return Err(IdentityError::Refused { address: "https://ca".to_owned(), status });
            }
            if script.broken.load(Ordering::Relaxed) || refused {
                return Err(IdentityError::TimedOut { address: "https://ca".to_owned() });
            }
            signing.await
        })
    }
}

struct Bench {
    certificates: Arc<Certificates>,
    script: Arc<Script>,
    /// How far the node's clock is ahead of the authority's, in seconds.
    ahead: Arc<AtomicI64>,
    /// Of `a`, `b`, and whoever the test adds.
    leases: HashMap<String, AccountLease>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Bench {
    fn lease(&mut self, account: &str) {
        let lease = self.certificates.lease("default".into(), account.into());
        self.leases.insert(account.to_owned(), lease);
    }
}

fn bench() -> Bench {
    bench_of(HOUR)
}

/// Certificates last for `life`.
fn bench_of(life: Duration) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let (start, started, ahead) = (SystemTime::now(), Instant::now(), Arc::new(AtomicI64::new(0)));
    let right = move || start + started.elapsed();
    let ca = DevelopmentCa::open(folder.path(), life, TlsParameters::default()).unwrap();
    let ca = ca.with_clock(WallClock::new(right));
    let script = Arc::new(Script::default());
    let authority = Scripted { ca, _folder: folder, script: Arc::clone(&script) };
    let offset = Arc::clone(&ahead);
    let clock = WallClock::new(move || {
        let seconds = offset.load(Ordering::Relaxed);
        let by = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 { right() - by } else { right() + by }
    });
    let certificates = Certificates::with_authority(Box::new(authority), clock, Arc::default());
    let stop = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&certificates).run(stop.clone()));
    let mut bench = Bench { certificates, script, ahead, leases: HashMap::new(), stop, running };
    bench.lease("a");
    bench.lease("b");
    bench
}

fn identity(account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap()
}

/// Waits until the certificate is another one than `old`.
async fn renewed(bench: &Bench, old: &Arc<Credentials>, within: Duration) -> Arc<Credentials> {
    let changed = async {
        loop {
            match bench.certificates.get(&old.identity).await {
                Ok(new) if !Arc::ptr_eq(&new, old) => return new,
                _ => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    };
    timeout(within, changed).await.expect("renewed in time")
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_panics_is_told_to_who_waits_and_tried_again() {
    let bench = bench();
    bench.script.panics.store(1, Ordering::Relaxed);
    let id = identity("a");
    let told = timeout(Duration::from_secs(5), bench.certificates.get(&id)).await.expect("an answer");
    assert!(matches!(told, Err(IdentityError::Panicked)), "{told:?}");
    let fetched = async {
        while bench.certificates.get(&id).await.is_err() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    timeout(Duration::from_mins(1), fetched).await.expect("it is tried again");
    assert_eq!(bench.script.requested(), 2);
}

#[tokio::test(start_paused = true)]
async fn many_who_wait_share_one_fetch() {
    let bench = bench();
    *bench.script.takes.lock().unwrap() = Duration::from_secs(1);
    let ids = [identity("a"), identity("a"), identity("a"), identity("b")];
    let got = futures_util::future::join_all(ids.iter().map(|id| bench.certificates.get(id))).await;
    assert!(got.iter().all(Result::is_ok));
    assert!(Arc::ptr_eq(got[0].as_ref().unwrap(), got[2].as_ref().unwrap()));
    bench.certificates.get(&ids[0]).await.unwrap();
    assert_eq!(bench.script.requested(), 2);
}

#[tokio::test(start_paused = true)]
async fn renewal_comes_at_half_life() {
    let bench = bench();
    let first = bench.certificates.get(&identity("a")).await.unwrap();
    let start = Instant::now();
    renewed(&bench, &first, HOUR).await;
    let minutes = start.elapsed().as_secs() / 60;
    // The certificate begins two minutes in the past, and the moment varies.
    assert!((24..=34).contains(&minutes), "after {minutes} minutes");
}

#[tokio::test(start_paused = true)]
async fn a_failing_renewal_keeps_what_is_valid_until_it_expires() {
    let bench = bench();
    let first = bench.certificates.get(&identity("a")).await.unwrap();
    bench.script.break_it(true);
    tokio::time::sleep(Duration::from_mins(50)).await;
    assert!(bench.script.requested() > 5, "tried again only {} times", bench.script.requested());
    let kept = bench.certificates.get(&identity("a")).await.unwrap();
    assert!(Arc::ptr_eq(&first, &kept));
    assert!(bench.certificates.list()[0].error.is_some());

    tokio::time::sleep(Duration::from_mins(12)).await;
    let error = bench.certificates.get(&identity("a")).await.unwrap_err();
    assert!(!matches!(error, IdentityError::Stopped), "{error}");

    bench.script.break_it(false);
    renewed(&bench, &first, Duration::from_mins(3)).await;
    assert!(bench.certificates.list()[0].error.is_none());
}

/// At whatever moment the hour begins, and if the next one begins 20 minutes after it.
#[tokio::test(start_paused = true)]
async fn with_an_authority_that_is_away_for_an_hour_again_and_again_there_is_always_a_certificate() {
    // The default, and the shortest for which it holds.
    for (life, hours) in [(24 * HOUR, 72), (HOUR * 5 / 2, 24)] {
        let bench = bench_of(life);
        bench.certificates.get(&identity("a")).await.unwrap();
        let mut fewest = life;
        for minute in 0..hours * 60 {
            bench.script.break_it(minute % 80 < 60);
            tokio::time::sleep(Duration::from_mins(1)).await;
            let kept = bench.certificates.get(&identity("a")).await;
            let kept = kept.unwrap_or_else(|error| panic!("{life:?}: minute {minute}: {error}"));
            let left = kept.not_after.duration_since(bench.certificates.clock.now()).unwrap();
            fewest = fewest.min(left);
        }
        // At the latest it is renewed with 0.45 of its life left. Then the hour, the longest pause between
        // two attempts, and the minute in which the test looks.
        let lost = HOUR + Duration::from_mins(3 + 1);
        assert!(fewest + lost > life.mul_f64(0.45), "{fewest:?} of {life:?}");
        assert!(bench.script.requested() > 10);
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_fetch_is_told_at_once_and_retried_by_itself() {
    let bench = bench();
    bench.script.break_it(true);
    for _ in 0..20 {
        bench.certificates.get(&identity("a")).await.unwrap_err();
    }
    assert_eq!(bench.script.requested(), 1, "asking does not hurry it");
    bench.script.break_it(false);
    tokio::time::sleep(Duration::from_secs(2)).await;
    bench.certificates.get(&identity("a")).await.unwrap();
    assert_eq!(bench.script.requested(), 2);
}

#[tokio::test(start_paused = true)]
async fn eight_fetches_at_a_time_and_who_waits_comes_first() {
    let mut bench = bench();
    *bench.script.takes.lock().unwrap() = Duration::from_secs(1);
    let warm: HashSet<_> = (0..20).map(|n| identity(&format!("warm-{n}"))).collect();
    for one in &warm {
        bench.lease(&one.service_account);
    }
    bench.lease("urgent");
    bench.certificates.serve(&warm, &HashSet::new());
    tokio::time::sleep(Duration::from_millis(100)).await;
    bench.certificates.get(&identity("urgent")).await.unwrap();
    let requested = bench.script.requested.lock().unwrap().clone();
    assert_eq!(requested.iter().position(|id| *id == identity("urgent")), Some(8));
    assert_eq!(bench.script.most_under_way.load(Ordering::Relaxed), 8);
}

/// What a connection of a pod that has left asks for.
#[tokio::test(start_paused = true)]
async fn who_is_forgotten_is_neither_renewed_nor_asked_for_again() {
    let mut bench = bench();
    for account in ["a", "b"] {
        bench.certificates.get(&identity(account)).await.unwrap();
    }
    let connection = bench.certificates.lease("default".into(), "b".into());
    bench.leases.remove("b");
    bench.certificates.get(&identity("b")).await.expect("the last connection of the pod still has it");
    drop(connection);
    let gone = bench.certificates.get(&identity("b")).await;
    assert!(matches!(gone, Err(IdentityError::Removed { .. })), "{gone:?}");
    bench.certificates.serve(&HashSet::from([identity("a"), identity("b")]), &HashSet::new());
    tokio::time::sleep(HOUR).await;
    let known = bench.certificates.list();
    assert_eq!(known.len(), 1);
    let of_b = bench.script.requested.lock().unwrap().iter().filter(|id| **id == identity("b")).count();
    assert_eq!(of_b, 1);
}

#[tokio::test(start_paused = true)]
async fn the_end_releases_who_waits() {
    let bench = bench();
    *bench.script.takes.lock().unwrap() = HOUR;
    let id = identity("a");
    let (got, ()) = tokio::join!(bench.certificates.get(&id), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        bench.stop.cancel();
    });
    assert!(matches!(got, Err(IdentityError::Stopped)));
    bench.running.await.unwrap();
    assert!(matches!(bench.certificates.get(&id).await, Err(IdentityError::Stopped)));
}

#[tokio::test(start_paused = true)]
async fn a_trust_domain_that_is_not_told_any_more_is_forgotten() {
    let bench = bench();
    bench.certificates.get(&identity("a")).await.unwrap();
    bench.certificates.get(&identity("b")).await.unwrap();
    let new: Identity = "spiffe://example.org/ns/default/sa/a".parse().unwrap();
    bench.certificates.serve(&HashSet::from([new.clone()]), &HashSet::new());
    let known: Vec<_> = bench.certificates.list().into_iter().map(|known| known.identity).collect();
    assert_eq!(known, [identity("b"), new.clone()], "nothing is told of the pods of b");
    bench.certificates.get(&new).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn certificates_that_were_fetched_together_are_not_renewed_together() {
    let mut bench = bench();
    let all: Vec<_> = (0..40).map(|n| identity(&format!("pod-{n}"))).collect();
    for one in &all {
        bench.lease(&one.service_account);
    }
    bench.certificates.serve(&all.iter().cloned().collect(), &HashSet::new());
    let mut most = 0;
    let mut before = 40;
    tokio::time::sleep(Duration::from_mins(5)).await;
    for _ in 0..35 {
        tokio::time::sleep(Duration::from_mins(1)).await;
        most = most.max(bench.script.requested() - before);
        before = bench.script.requested();
    }
    assert!(before >= 80, "all were renewed: {before}");
    assert!(most <= 25, "{most} of 40 in one minute");
}
