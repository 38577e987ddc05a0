//! What the helpers of the testbed do.

use std::{path::Path, time::Duration};

use crate::{fakes::fake_tunnel, helper::role, label_latency::probe, lend, pod_program};

/// Does what the role of this process says, where it is a role of the testbed's own, and returns
/// when that is done. Whether this process is a helper.
///
/// # Panics
/// When the role is unknown.
pub fn serve() -> bool {
    let Some(role) = role() else { return false };
    let words: Vec<&str> = role.split(' ').collect();
    let address = |word: &str| word.parse().expect("an address");
    match words[..] {
        ["zds", path] => fake_tunnel::serve(path),
        ["transparent", netns, from, to, mark] => {
            lend::serve_transparent(netns, [from, to].map(address), mark.parse().expect("a mark"));
        }
        ["listener", netns, at] => lend::serve_listener(netns, address(at)),
        ["talk", server, period] => probe::talk(address(server), period.parse().expect("microseconds")),
        ["pod", targets, period] => {
            let period = Duration::from_micros(period.parse().expect("microseconds"));
            pod_program::run(Path::new(targets), period);
        }
        ["connect", server] => probe::connect_once(address(server)),
        _ => panic!("no helper does {role:?}"),
    }
    true
}
