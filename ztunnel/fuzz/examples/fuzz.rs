//! libFuzzer over the target that `FUZZ_TARGET` names. `.ci/fuzz` runs it.
#![no_main]
#![allow(unsafe_code, reason = "libFuzzer calls C functions, which the macro defines")]
#![expect(clippy::disallowed_methods, reason = "libFuzzer owns the arguments")]

use std::sync::OnceLock;

use ztunnel_fuzz::TARGETS;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
        let found = TARGETS.iter().find(|(target, _)| *target == name);
        found.unwrap_or_else(|| panic!("FUZZ_TARGET={name}: expected one of the names in TARGETS")).1
    })(data);
});
