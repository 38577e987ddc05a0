//! The kernel programs, against the kernel.
//!
//! Needs root, `ip` and `nsenter`. Everything happens in private cgroups, netns and bpffs mounts.

mod bench;

use bench::{Bench, INBOUND, OUTBOUND, agent::How, at};

/// Not a test: what the other tests start as the processes of pods and tunnels.
#[test]
#[ignore = "part of the privileged tests: make test"]
fn agent() {
    bench::agent::serve();
}

#[test]
#[ignore = "loads eBPF, needs root: make test"]
fn a_redirected_connection_is_none_the_wiser() {
    let mut bench = Bench::new();
    for (tunnel_at, to, own) in [
        ("0.0.0.0", "192.0.2.9", "10.99.0.1"),
        ("[::]", "2001:db8::9", "fd99::1"),
        ("[::]", "::ffff:192.0.2.9", "::ffff:10.99.0.1"),
        ("[::]", "192.0.2.9", "10.99.0.1"),
    ] {
        let listener = bench.tunnel.listen(&format!("{tunnel_at}:{OUTBOUND}"));
        for how in [How::Tcp, How::NonBlocking] {
            let to = at(to, 80);
            let dialled = bench.app.dial(how, to).unwrap_or_else(|errno| panic!("{how:?} {to}: {errno}"));
            let accepted = bench.tunnel.accept(listener);
            assert_eq!(dialled.peer, to, "the application sees whom it dialled");
            assert_eq!(dialled.local.ip(), at(own, 0).ip(), "and its own address");
            assert_eq!(dialled.original, None, "SO_ORIGINAL_DST is the tunnel's");
            let original = accepted.original.expect("the tunnel knows the original destination");
            assert_eq!((original.ip(), original.port()), (to.ip().to_canonical(), to.port()));
            assert_eq!(accepted.peer.port(), dialled.local.port());
            bench.app.close(dialled.handle);
            bench.tunnel.close(accepted.handle);
        }
        bench.tunnel.close(listener);
    }
    let _ = INBOUND;
}
