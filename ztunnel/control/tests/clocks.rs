//! Replicas whose clocks differ: what one signs, tunnels of the others accept.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, SystemTime},
};

use testbed::api_server::ApiServer;

use crate::{
    rig::Control,
    tunnels::{Tunnel, connect},
};

const HOUR: i64 = 3600;

/// A library for `LD_PRELOAD`: the wall clock of a program with it is `seconds` ahead.
fn clock_ahead(folder: &Path, seconds: i64) -> PathBuf {
    let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
    let text = format!(
        "#include <sys/syscall.h>\n#include <time.h>\n#include <unistd.h>\n\
         int clock_gettime(clockid_t clock, struct timespec *time) {{\n\
         int failed = syscall(SYS_clock_gettime, clock, time);\n\
         if (!failed && (clock == CLOCK_REALTIME || clock == 5)) time->tv_sec += {seconds};\n\
         return failed;\n}}\n"
    );
    fs::write(&source, text).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
    let output = compiler.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// The root is made by the replica with the wrong clock, or by the other one.
#[test]
#[ignore = "needs an API server: make test"]
fn what_a_replica_signs_whose_clock_is_off_by_an_hour_is_accepted() {
    for (seconds, is_first) in [(HOUR, true), (HOUR, false), (-HOUR, true), (-HOUR, false)] {
        let api = Arc::new(ApiServer::start());
        let folder = tempfile::tempdir().unwrap();
        let clock = clock_ahead(folder.path(), seconds);
        let wrong = || {
            let preload = [("LD_PRELOAD", clock.to_str().unwrap())];
            Control::start_in(Arc::clone(&api), &preload, &[])
        };
        let right = || Control::start_at(Arc::clone(&api), &[]);
        let [wrong, right] = if is_first {
            let wrong = wrong();
            [wrong, right()]
        } else {
            let right = right();
            [wrong(), right]
        };
        assert_eq!(wrong.root, right.root);
        let of_wrong = Tunnel::start(&api, &right.runtime, wrong.grpc.port(), &wrong.root);
        let of_right = Tunnel::start(&api, &right.runtime, right.grpc.port(), &right.root);
        let credentials = right.runtime.block_on(of_wrong.credentials());
        // The clock is as wrong as it should be: a day from its hour.
        let day = SystemTime::now() + Duration::from_hours(24);
        let difference = match credentials.not_after.duration_since(day) {
            Ok(ahead) => i64::try_from(ahead.as_secs()).unwrap(),
            Err(behind) => -i64::try_from(behind.duration().as_secs()).unwrap(),
        };
        assert!((difference - seconds).abs() < 120, "{difference}");
        for (from, to) in [(&of_wrong, &of_right), (&of_right, &of_wrong)] {
            assert_eq!(right.runtime.block_on(connect(from, to)), Ok(()), "{seconds} s, first {is_first}");
        }
    }
}
