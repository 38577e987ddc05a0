use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::{task::JoinHandle, time::timeout};

use super::*;
use crate::identity::authority::Issuing;

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
        Box::pin(async move {
            let takes = *script.takes.lock().unwrap();
            tokio::time::sleep(takes).await;
            script.under_way.fetch_sub(1, Ordering::Relaxed);
            if script.broken.load(Ordering::Relaxed) {
                return Err(IdentityError::TimedOut { address: "https://ca".to_owned() });
            }
            signing.await
        })
    }
}

struct Bench {
    certificates: Arc<Certificates>,
    script: Arc<Script>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let ca = DevelopmentCa::open(folder.path(), HOUR, TlsParameters::default()).unwrap();
    let script = Arc::new(Script::default());
    let authority = Scripted { ca, _folder: folder, script: Arc::clone(&script) };
    let certificates = Certificates::with_authority(Box::new(authority));
    let stop = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&certificates).run(stop.clone()));
    Bench { certificates, script, stop, running }
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
    // The certificate begins two minutes in the past.
    assert!((28..=31).contains(&minutes), "after {minutes} minutes");
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
    let bench = bench();
    *bench.script.takes.lock().unwrap() = Duration::from_secs(1);
    for n in 0..20 {
        bench.certificates.prefetch(&identity(&format!("warm-{n}")));
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    bench.certificates.get(&identity("urgent")).await.unwrap();
    let requested = bench.script.requested.lock().unwrap().clone();
    assert_eq!(requested.iter().position(|id| *id == identity("urgent")), Some(8));
    assert_eq!(bench.script.most_under_way.load(Ordering::Relaxed), 8);
}

#[tokio::test(start_paused = true)]
async fn who_is_forgotten_is_not_renewed() {
    let bench = bench();
    for account in ["a", "b"] {
        bench.certificates.get(&identity(account)).await.unwrap();
    }
    bench.certificates.retain(&HashSet::from([identity("a")]));
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
