//! Commands of the testbed's own, such as `ip` and `mount`, which end at once.

use std::process::{Command, Output};

/// Runs `script` with `sh -e` and returns its standard output.
///
/// # Panics
/// When it fails; the message contains what it wrote to standard error.
pub fn run(script: &str) -> String {
    let output = shell(script);
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same where failure is no fault: when things are taken down.
pub fn run_quietly(script: &str) {
    let _ = shell(script);
}

fn shell(script: &str) -> Output {
    Command::new("sh").args(["-ec", script]).output().expect("sh starts")
}

/// Everything that a finished program wrote: standard output, then standard error.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), output.stderr.as_slice()].concat()).into_owned()
}
