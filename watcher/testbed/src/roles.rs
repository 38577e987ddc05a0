//! What the helpers of the testbed do.

use std::{path::Path, time::Duration};

use crate::{fakes::fake_tunnel, helper::role, label_latency::probe, lend, pod_grpc, pod_http, pod_program};

/// Does what the role of this process says, where it is a role of the testbed's own, and returns
/// when that is done. Whether this process is a helper.
///
/// # Panics
/// When the role is unknown.
pub fn serve() -> bool {
    let Some(role) = role() else { return false };
    play(&role.split(' ').collect::<Vec<_>>());
    true
}

/// Does what these words say: a role and its arguments.
///
/// # Panics
/// When the role is unknown.
pub fn play(words: &[&str]) {
    let millis = |word: &str| Duration::from_millis(word.parse().expect("milliseconds"));
    let number = |word: &str| word.parse::<usize>().expect("a number");
    let address = |word: &str| word.parse().expect("an address");
    match *words {
        ["zds", path] => fake_tunnel::serve(path),
        ["transparent", netns, from, to, mark] => {
            lend::serve_transparent(netns, [from, to].map(address), mark.parse().expect("a mark"));
        }
        ["listener", netns, at] => lend::serve_listener(netns, address(at)),
        ["talk", server, period] => probe::talk(address(server), period.parse().expect("microseconds")),
        ["pod", targets, period, patience] => {
            let period = Duration::from_micros(period.parse().expect("microseconds"));
            let patience = Duration::from_millis(patience.parse().expect("milliseconds"));
            pod_program::run(Path::new(targets), period, patience);
        }
        ["connect", server] => probe::connect_once(address(server)),
        ["serve", port] => pod_http::serve(port.parse().expect("a port")),
        ["serve-grpc", port] => pod_grpc::serve(port.parse().expect("a port")),
        ["get", url] => println!("{}", pod_http::get(url).unwrap_or_else(|error| panic!("{url}: {error}"))),
        ["first", url] => pod_http::first(url),
        ["ask", url, period, threads] => pod_http::ask(url, millis(period), number(threads)),
        ["hold", url, period, count] => pod_http::hold(url, millis(period), number(count)),
        _ => panic!("no helper does {words:?}"),
    }
}
