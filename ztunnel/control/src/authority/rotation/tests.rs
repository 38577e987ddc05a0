//! A rotation, step by step, as several replicas see it, one of which may end at any moment.

use super::*;
use crate::authority::{ders, new_root};

const LIFE: Duration = Duration::from_hours(24);

fn overlap_of_day() -> Duration {
    overlap(LIFE)
}

fn root(secret: &Secret) -> CertificateDer<'static> {
    RootSecret::read(secret).unwrap().authority.trusted()[0].clone()
}

/// What one replica makes of it at `now`, without remembering anything.
fn step(secret: &Secret, now: Timestamp) -> Option<Secret> {
    let read = RootSecret::read(secret).unwrap();
    due(secret, &read, &[], now, overlap_of_day()).map(|change| change.secret)
}

/// Everything that is due at `now`.
fn settle(mut secret: Secret, now: Timestamp) -> Secret {
    for _ in 0..10 {
        match step(&secret, now) {
            Some(changed) => secret = changed,
            None => return secret,
        }
    }
    panic!("it never ends: {secret:?}");
}

fn hours(hours: u64) -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap() + Duration::from_hours(hours)
}

#[test]
fn both_roots_are_trusted_from_before_the_next_signs_until_nothing_leads_to_the_last() {
    let first = secret::made("root", "cluster.local").unwrap();
    assert!(step(&first, hours(0)).is_none(), "nothing goes on");
    let old = root(&first);
    let begun = secret::with_next(first, "cluster.local").unwrap();

    let trusted = settle(begun, hours(0));
    let read = RootSecret::read(&trusted).unwrap();
    let new = read.next.as_ref().unwrap().0.clone();
    assert_eq!(read.authority.trusted(), [old.clone(), new.clone()]);
    assert_eq!(next_time(&read, overlap_of_day()), Some(hours(27)));
    assert_eq!(
        settle(trusted.clone(), hours(26)),
        trusted,
        "the old root signs for as long as certificates last"
    );

    let signing = settle(trusted, hours(27));
    let read = RootSecret::read(&signing).unwrap();
    assert_eq!(read.authority.trusted(), [new.clone(), old.clone()]);
    assert!(read.next.is_none());
    assert_eq!((&read.previous[..], read.previous_until), (&[old][..], Some(hours(54))));
    assert_eq!(settle(signing.clone(), hours(53)), signing);

    let done = settle(signing, hours(54));
    let read = RootSecret::read(&done).unwrap();
    assert_eq!(read.authority.trusted(), [new]);
    assert_eq!((read.previous.len(), next_time(&read, overlap_of_day())), (0, None));
    assert!(done.data.unwrap().keys().eq(["tls.crt", "tls.key"]));
}

#[test]
fn a_rotation_that_is_given_up_leaves_nothing() {
    let first = secret::made("root", "cluster.local").unwrap();
    let trusted = settle(secret::with_next(first.clone(), "cluster.local").unwrap(), hours(0));
    assert_eq!(secret::without_next(trusted).data, first.data);
}

/// What a certificate that is in use says, and until when it is.
struct Leaf {
    root: CertificateDer<'static>,
    trusts: Vec<CertificateDer<'static>>,
    ends: Timestamp,
}

/// Of three replicas one has the right time, one is an hour ahead, one is an hour behind; any of them does
/// what is due. For some hours nobody does anything and nothing is signed, as when all are away.
#[test]
fn at_every_moment_of_a_rotation_each_certificate_is_trusted_by_whoever_has_one() {
    let (first, second) = (secret::made("root", "a").unwrap(), new_root("a").unwrap());
    let begun = {
        let mut secret = secret::with_next(first.clone(), "a").unwrap();
        // The same one each time: keys take long to make.
        let data = secret.data.as_mut().unwrap();
        for (key, text) in [("next.crt", second.0), ("next.key", second.1)] {
            data.insert(key.to_owned(), k8s_openapi::ByteString(text.into_bytes()));
        }
        secret
    };
    let half_hour = Duration::from_mins(30);
    let clocks = [-1, 0, 1].map(|hours: i32| {
        move |now: Timestamp| match hours {
            0 => now,
            1 => now + Duration::from_hours(1),
            _ => now - Duration::from_hours(1),
        }
    });
    for (away_from, away_for) in [(0, 0), (1, 30), (20, 10), (24, 6), (26, 40), (40, 20), (50, 10)] {
        let (mut secret, mut leaves, mut published): (_, Vec<Leaf>, _) = (first.clone(), vec![], vec![]);
        let mut steps = 0;
        for tick in 0..260_u32 {
            let now = hours(0) + half_hour * tick;
            if tick == 48 {
                secret = begun.clone();
            }
            let since_begin = i64::from(tick) - 48;
            let is_away = (2 * away_from..2 * (away_from + away_for)).contains(&since_begin);
            if !is_away {
                for clock in clocks {
                    while let Some(changed) = step(&secret, clock(now)) {
                        (secret, steps) = (changed, steps + 1);
                    }
                    let read = RootSecret::read(&secret).unwrap();
                    let (root, trusts) = (root(&secret), read.authority.trusted().to_vec());
                    leaves.push(Leaf { root, trusts, ends: clock(now) + LIFE });
                }
                published.push(RootSecret::read(&secret).unwrap().authority.trusted().to_vec());
            }
            leaves.retain(|leaf| leaf.ends > now);
            let roots: Vec<_> = leaves.iter().map(|leaf| &leaf.root).collect();
            for leaf in &leaves {
                let distrusted = roots.iter().filter(|root| !leaf.trusts.contains(root)).count();
                assert_eq!(distrusted, 0, "tick {since_begin}, away {away_from} h for {away_for} h");
            }
            // What a kubelet wrote an hour ago leads to the control plane's own certificate.
            if let [.., hour_ago, _, _] = &published[..] {
                assert!(hour_ago.contains(&root(&secret)), "tick {since_begin}");
            }
        }
        assert_eq!(steps, 3, "away {away_from} h for {away_for} h");
        assert_ne!(root(&secret), root(&first));
        assert!(secret.data.unwrap().keys().eq(["tls.crt", "tls.key"]));
    }
}

/// Somebody put another root in the place of the last.
#[test]
fn a_root_that_is_gone_from_the_secret_is_trusted_for_a_while() {
    let (old, new) = (secret::made("root", "a").unwrap(), secret::made("root", "a").unwrap());
    let lost = [root(&old)];
    let read = RootSecret::read(&new).unwrap();
    let kept = due(&new, &read, &lost, hours(0), overlap_of_day()).unwrap().secret;
    let read = RootSecret::read(&kept).unwrap();
    assert_eq!(read.authority.trusted(), [root(&new), root(&old)]);
    assert_eq!(read.previous_until, Some(hours(27)));

    // Another one during that time: none is forgotten early.
    let third = secret::made("root", "a").unwrap();
    let mut swapped = kept;
    for key in ["tls.crt", "tls.key"] {
        let text = third.data.as_ref().unwrap()[key].clone();
        swapped.data.as_mut().unwrap().insert(key.to_owned(), text);
    }
    let read = RootSecret::read(&swapped).unwrap();
    let kept = due(&swapped, &read, &[root(&new)], hours(20), overlap_of_day()).unwrap().secret;
    let read = RootSecret::read(&kept).unwrap();
    assert_eq!(read.authority.trusted(), [root(&third), root(&old), root(&new)]);
    assert_eq!(read.previous_until, Some(hours(47)));
    assert_eq!(RootSecret::read(&settle(kept, hours(47))).unwrap().authority.trusted().len(), 1);
}

/// Written by hand, or by a version that did not know the times.
#[test]
fn times_that_cannot_be_read_are_decided_anew() {
    let first = secret::made("root", "a").unwrap();
    let old = root(&first);
    let mut begun = secret::signing_from(secret::with_next(first, "a").unwrap(), hours(0));
    for time in begun.metadata.annotations.as_mut().unwrap().values_mut() {
        "tomorrow".clone_into(time);
    }
    let read = RootSecret::read(&settle(begun, hours(1))).unwrap();
    assert_eq!(read.next.unwrap().1, Some(hours(28)));
    let previous = secret::with_previous(secret::made("root", "a").unwrap(), &[old], None);
    assert_eq!(RootSecret::read(&settle(previous, hours(1))).unwrap().previous_until, Some(hours(28)));
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let (good, other) = (secret::made("root", "a").unwrap(), new_root("a").unwrap());
    let with = |key: &str, text: &str| {
        let mut secret = secret::with_next(good.clone(), "a").unwrap();
        let text = k8s_openapi::ByteString(text.as_bytes().to_vec());
        secret.data.as_mut().unwrap().insert(key.to_owned(), text);
        RootSecret::read(&secret).unwrap_err().to_string()
    };
    for (key, text, said) in [
        ("tls.crt", "", "tls.crt"),
        ("tls.key", &*other.1, "tls.crt cannot be used"),
        ("ca.crt", &*other.0, "tls.crt cannot be used"),
        ("next.key", &*other.1, "next.crt cannot be used"),
        ("next.key", "", "next.key"),
        ("previous.crt", "nonsense", "previous.crt cannot be used"),
    ] {
        let error = with(key, text);
        assert!(error.contains(said), "{key}: {error}");
    }
    assert_eq!(ders("x", &other.0).unwrap().len(), 1);
}

#[test]
fn a_revoked_certificate_is_listed_until_it_would_have_ended() {
    let first = secret::made("root", "a").unwrap();
    let revoked = [("4a3f".parse().unwrap(), hours(0)), ("ff".parse().unwrap(), hours(20))];
    let listed = secret::with_revoked(first.clone(), &revoked.into());
    assert_eq!(next_time(&RootSecret::read(&listed).unwrap(), overlap_of_day()), Some(hours(27)));
    assert_eq!(settle(listed.clone(), hours(26)), listed);
    let later = settle(listed, hours(27));
    assert_eq!(RootSecret::read(&later).unwrap().revoked.len(), 1);
    assert_eq!(settle(later, hours(47)).data, first.data);
}
