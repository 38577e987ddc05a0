//! Clients of the side servers that ask and never read, or never ask.

use std::{
    io::{self, Write},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};
use testbed::{
    mesh_pod::read_line,
    tunnel_mesh::{TunnelMesh, local},
    wait::wait_for,
};

/// How long anything may take while they are there. Without them it takes milliseconds.
const SOON: Duration = Duration::from_secs(2);

/// From another address than those who probe and scrape.
fn from_elsewhere(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into())?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// Between two of one thread's connections.
const PACE: Duration = Duration::from_millis(2);

fn sample(metrics: &str, name: &str) -> u64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name}")).parse().expect("a number")
}

#[test]
#[ignore = "needs root: make test"]
fn a_thousand_slow_scrapers_delay_no_connection_no_order_and_no_probe() {
    let mut mesh = TunnelMesh::new();
    let [client, server, late] = ["client", "server", "late"].map(|name| mesh.enrolled("a", name));
    server.serve_double_echo(8080);
    let mut node = mesh.node("a", &[&client, &server]);
    let netns = node.netns.alias();
    let before = node.metrics();
    let (done, opened) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (netns, done, opened) = (&netns, &done, &opened);
            scope.spawn(move || {
                netns.enter(|| {
                    let mut open = Vec::new();
                    while !done.load(Ordering::Relaxed) {
                        let Ok(mut stream) = from_elsewhere(local(15020)) else { continue };
                        // The others never ask.
                        if worker != 0 {
                            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
                        }
                        open.push(stream);
                        if open.len() > 500 {
                            open.drain(..250);
                        }
                        opened.fetch_add(1, Ordering::Relaxed);
                        // Other tests run beside this one.
                        std::thread::sleep(PACE);
                    }
                });
            });
        }
        wait_for("a thousand of them", || opened.load(Ordering::Relaxed) > 1000);
        let timed = |what: &str, work: &mut dyn FnMut()| {
            let began = Instant::now();
            work();
            assert!(began.elapsed() < SOON, "{what} took {:?}", began.elapsed());
        };
        for _ in 0..20 {
            timed("a connection", &mut || {
                read_line(&mut client.netns.connect(server.at(8080))).expect("greeting");
            });
            timed("a probe", &mut || assert!(node.is_ready()));
        }
        timed("an order", &mut || assert_eq!(node.agent().add(&late), ""));
        let mut metrics = String::new();
        timed("an honest scrape", &mut || metrics = node.metrics());
        done.store(true, Ordering::Relaxed);
        let grown = |name| sample(&metrics, name).saturating_sub(sample(&before, name));
        let (memory, descriptors) = (grown("process_resident_memory_bytes"), grown("process_open_fds"));
        assert!(memory < 64 << 20, "{memory} bytes more");
        assert!(descriptors < 250, "{descriptors} descriptors more");
    });
    assert!(opened.load(Ordering::Relaxed) > 1000);
}
