//! These very tests, on the other kernels of the support range: this binary boots them with itself
//! as the passenger.

use std::path::Path;

/// What rests on the oldest kernel's features alone, such as links and maps, is tried on both ends of
/// the range. Whatever decides about a connection is tried on every kernel.
const ON_THE_ENDS: &str =
    "--skip entries:: --skip exclusions:: --skip explain:: --skip lifetime:: --skip upgrade::";

fn run_on(kernel: &str, skipped: &str) {
    if adit_vm::is_inside() {
        return;
    }
    let own = std::env::current_exe().expect("our own path");
    let programs = [own.as_path(), Path::new("ip"), Path::new("nsenter")];
    // Side by side tests would only share one emulated processor.
    let command = format!("{} --include-ignored --test-threads=1 --skip matrix:: {skipped}", own.display());
    let said = adit_vm::run(kernel, &programs, &command).unwrap_or_else(|error| panic!("{error:#}"));
    let result = said.lines().rev().find(|line| line.starts_with("test result:")).expect("a result");
    assert!(!result.contains(" 0 passed"), "{said}");
    eprintln!("Linux {kernel}: {result}");
}

#[test]
#[ignore = "boots a kernel: make test"]
fn linux_6_1() {
    run_on("6.1", ON_THE_ENDS);
}

#[test]
#[ignore = "boots a kernel: make test"]
fn linux_6_12() {
    run_on("6.12", ON_THE_ENDS);
}

#[test]
#[ignore = "boots a kernel: make test"]
fn linux_5_10() {
    run_on("5.10", "");
}

#[test]
#[ignore = "boots a kernel: make test"]
fn linux_7_2() {
    run_on("7.2", "");
}
