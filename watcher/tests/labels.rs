//! Labels at a real API server on pods that talk: their connections change kind, and none of them
//! fails.

use testbed::label_latency::LabelLatency;

#[test]
#[ignore = "needs root: make test"]
fn labels_of_talking_pods_change_their_connections_and_fail_none() {
    for (pods, rounds) in [(1, 10), (20, 5)] {
        let mut measured = LabelLatency::new(pods);
        for round in 0..rounds {
            for on in [true, false] {
                let flip = measured.flip(on);
                assert_eq!(flip.took.len(), pods);
                assert!(
                    flip.failures.is_empty(),
                    "{pods} pods, round {round}, on: {on}: {:?}\n{}",
                    flip.failures,
                    measured.story()
                );
            }
        }
        let failures = measured.failures();
        assert!(failures.is_empty(), "{failures:?}\n{}", measured.story());
    }
}
