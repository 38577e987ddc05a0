//! Labels at a real API server, on pods that talk: their connections change kind, and none of them fails.

mod api_server;
mod bed;
mod labelled;

use labelled::Labelled;

/// Where this program is started as a probe of a pod.
#[test]
#[ignore = "is started by the others"]
fn probe() {
    labelled::probe();
}

const PROBE: [&str; 4] = ["--exact", "probe", "--ignored", "--nocapture"];

#[test]
#[ignore = "needs root: make test"]
fn labels_of_talking_pods_change_their_connections_and_fail_none() {
    for (pods, rounds) in [(1, 10), (20, 5)] {
        let mut labelled = Labelled::new(pods, &PROBE);
        for round in 0..rounds {
            for on in [true, false] {
                let flip = labelled.flip(on);
                assert_eq!(flip.took.len(), pods);
                assert!(
                    flip.failures.is_empty(),
                    "{pods} pods, round {round}, on: {on}: {:?}\n{}",
                    flip.failures,
                    labelled.story()
                );
            }
        }
        let failures = labelled.failures();
        assert!(failures.is_empty(), "{failures:?}\n{}", labelled.story());
    }
}
