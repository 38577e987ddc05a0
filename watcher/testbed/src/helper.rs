//! Processes that run code of the tests in a cgroup or netns of their own.
//!
//! They are this very executable, started once more with a role in its environment. So an
//! executable that uses them calls [`serve`](crate::roles::serve) first: an example at the start of
//! `main`, the tests of a crate in a test called `helper`, which does nothing in an ordinary run.

use std::{env, process::Command};

use crate::process::Placement;

/// The variable that holds the role: its name and its arguments, in words.
const ROLE: &str = "ADIT_TEST_ROLE";

/// The command that starts this executable once more at `placement`, as a helper with this role.
pub fn command(placement: &Placement, role: &str) -> Command {
    command_of(placement, &[], role)
}

/// The same after a shell has run the script `first` there, in the process that becomes the helper.
pub fn command_after(placement: &Placement, first: &str, role: &str) -> Command {
    let script = format!("{first}\nexec \"$0\" \"$@\"");
    command_of(placement, &["bash", "-c", &script], role)
}

fn command_of(placement: &Placement, before: &[&str], role: &str) -> Command {
    let own = env::current_exe().expect("the path of this executable");
    // For a test harness: only the test `helper`, with no line of its own before what the helper
    // prints. An example ignores them.
    let harness = ["helper", "--exact", "--include-ignored", "--nocapture", "--quiet", "--test-threads=1"];
    let own = own.to_str().expect("UTF-8 path");
    let words = [before, &[own], harness.as_slice()].concat();
    let mut command = placement.command(&words);
    command.env(ROLE, role);
    command
}

/// The role that this process was started with, if it is a helper.
pub fn role() -> Option<String> {
    env::var(ROLE).ok()
}
