//! What the parsers have met before does them no harm.

use std::{collections::BTreeSet, fs, path::Path, time::Instant};

use ztunnel_fuzz::TARGETS;

#[test]
fn seeds_and_what_once_broke_a_parser_pass() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let folders: BTreeSet<String> = fs::read_dir(&seeds)
        .expect("seeds")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(folders, names, "one folder of seeds for each target");
    for (name, target) in TARGETS {
        for entry in fs::read_dir(seeds.join(name)).expect("folder") {
            let path = entry.expect("entry").path();
            let began = Instant::now();
            target(&fs::read(&path).expect("seed"));
            assert!(began.elapsed().as_secs() < 10, "{} takes too long", path.display());
        }
    }
}

/// Short inputs are where parsers look past the end.
#[test]
fn every_parser_takes_every_short_input() {
    for (_, target) in TARGETS {
        target(&[]);
        for first in 0..=u8::MAX {
            target(&[first]);
            for second in [0, 1, b'/', b':', b'=', 0x7f, 0x80, 0xff] {
                target(&[first, second]);
            }
        }
    }
}
