//! Dials an application from its client's address.
//!
//! The client's own connections to the pod end in the same netns, at the same address and port of
//! the pod. The kernel does not compare them with ours when it gives us a source port, since they
//! go the other way. If both have one port, the later of the two is lost: its SYN goes to the
//! socket of the earlier one, and nobody answers. So we choose the port: one that clients hardly
//! ever have. If nobody answers all the same, we take another one, long before the caller's patience
//! ends.

use std::{
    hash::{BuildHasher as _, RandomState},
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::Socket;
use tokio::{net::TcpStream, time::Instant};

use super::{CONNECT_TIMEOUT, Connecting, Dialler, no_answer};

/// By default Linux gives clients the ports from 32768 to 60999, and below them applications
/// listen.
const FIRST_PORT: u16 = 61_000;
/// As many as there are above.
const PORTS: u32 = 65_536 - FIRST_PORT as u32;
/// Has no factor in common with [`PORTS`], so that all ports come round. Two tunnels, such as
/// during an upgrade, do not follow each other port by port.
const STRIDE: u32 = 1_021;

/// How often a port may be in use before the kernel chooses from its own range.
const TRIES: u32 = 8;

/// How long the first SYN may stay without an answer; twice that for the next one, and so on. The
/// packets do not leave this machine.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// Connects to `to` with `from` as the source address.
pub(super) async fn connect(dialler: &Dialler<'_>, to: SocketAddr, from: IpAddr) -> io::Result<TcpStream> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let (mut wait, mut tries, mut unanswered) = (FIRST_WAIT, 0, 0);
    loop {
        // A client that meets us once has such ports, so every other time the kernel chooses.
        let port = if tries < TRIES && unanswered % 2 == 0 { next_port() } else { 0 };
        let is_taken = |error: &io::Error| {
            port != 0 && matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL))
        };
        let socket = dialler.socket(to, dialler.options.mark, true)?;
        let bound = bind(&socket, SocketAddr::new(from, port)).map(|()| socket);
        let socket = match bound {
            Err(error) if is_taken(&error) => {
                tries += 1;
                continue;
            }
            bound => bound?,
        };
        let until = deadline.min(Instant::now() + wait);
        let connected = match Connecting::begin(socket, to) {
            Ok(connecting) => connecting.done(until).await,
            Err(error) => Some(Err(error)),
        };
        match connected {
            Some(Err(error)) if is_taken(&error) => tries += 1,
            Some(connected) => return connected,
            None if until == deadline => return Err(no_answer()),
            None => (wait, unanswered) = (wait * 2, unanswered + 1),
        }
    }
}

/// The port after the one that was given last, to whichever dial.
fn next_port() -> u16 {
    static COUNT: LazyLock<AtomicU32> = LazyLock::new(|| {
        let start = RandomState::new().hash_one(()) % u64::from(PORTS);
        AtomicU32::new(u32::try_from(start).unwrap_or(0))
    });
    let number = COUNT.fetch_add(1, Ordering::Relaxed) % PORTS;
    FIRST_PORT + u16::try_from(number * STRIDE % PORTS).unwrap_or(0)
}

/// Binds a transparent socket, whose address need not be its netns' own. Port 0: the kernel chooses at connect, for
/// that destination.
fn bind(socket: &Socket, from: SocketAddr) -> io::Result<()> {
    if from.port() == 0 {
        // Otherwise all destinations of a source address would share the ports.
        setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
    } else {
        // Dials of other destinations may have the same port; connect compares destinations too.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&from.into())
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeSet, HashSet},
        net::TcpListener,
        sync::mpsc,
    };

    use adit_netns::Netns;
    use socket2::{Domain, Type};
    use testbed::{command::run, netns::TestNetns};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::socket::{ReadySockets, SocketOptions};

    const MARK: u32 = 0x539;
    /// What clients have by default.
    const CLIENTS: std::ops::Range<u16> = 32_768..61_000;

    #[test]
    fn all_ports_come_round() {
        let ports: BTreeSet<u16> = (0..PORTS).map(|_| next_port()).collect();
        // Other tests may take some in between.
        assert!(ports.len() > 4_400 && ports.iter().all(|port| *port >= FIRST_PORT), "{}", ports.len());
    }

    /// A pod whose application keeps every connection, and a client on another node.
    struct Bench {
        pod: TestNetns,
        client: TestNetns,
        _accepted: mpsc::Receiver<std::net::TcpStream>,
    }

    impl Bench {
        fn new(name: &str) -> Self {
            // Both ends of every connection are in this process.
            let hard = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap().1;
            nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard).unwrap();
            let name = format!("zt{}{name}", std::process::id());
            let (pod, client) = (TestNetns::new(format!("{name}p")), TestNetns::new(format!("{name}c")));
            let (p, c) = (pod.name(), client.name());
            run(&format!("ip link add eth0 netns {p} type veth peer name eth0 netns {c}"));
            for (netns, last) in [(p, 1), (c, 2)] {
                run(&format!(
                    "ip -n {netns} addr add 10.66.0.{last}/24 dev eth0; \
                     ip -n {netns} addr add fd66::{last}/64 dev eth0 nodad; ip -n {netns} link set eth0 up"
                ));
            }
            // As the watcher prepares it.
            pod.run(
                "sysctl -qw net.ipv4.tcp_fwmark_accept=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0 \
                 net.ipv4.tcp_syncookies=0; \
                 for f in -4 -6; do ip $f rule add fwmark 0x539 lookup 1337; \
                 ip $f route add local default dev lo table 1337; done",
            );
            let (keep, accepted) = mpsc::channel();
            let listener = pod.enter(|| {
                let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
                socket.set_only_v6(false).unwrap();
                socket.bind(&"[::]:8080".parse::<SocketAddr>().unwrap().into()).unwrap();
                socket.listen(4096).unwrap();
                TcpListener::from(socket)
            });
            std::thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    if keep.send(stream).is_err() {
                        return;
                    }
                }
            });
            Self { pod, client, _accepted: accepted }
        }

        /// The client connects from `count` random ports of `range`; those that were answered.
        fn connects(&self, to: IpAddr, range: std::ops::Range<u16>, count: usize) -> Vec<TcpStreamOf> {
            let mut ports = HashSet::new();
            while ports.len() < count {
                let random = RandomState::new().hash_one(()) % u64::from(range.end - range.start);
                ports.insert(range.start + u16::try_from(random).unwrap());
            }
            let (from, ports) = (client_of(to), ports.into_iter().collect::<Vec<u16>>());
            self.client.enter(|| {
                std::thread::scope(|scope| {
                    let one = |port: u16| -> io::Result<TcpStreamOf> {
                        let to = SocketAddr::new(to, 8080);
                        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                        socket.bind(&SocketAddr::new(from, port).into())?;
                        socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
                        Ok(socket.into())
                    };
                    // Each thread stays in the netns of the one that starts it.
                    let shares = ports.chunks(count.div_ceil(8));
                    let threads: Vec<_> = shares
                        .map(|share| {
                            scope.spawn(move || {
                                share.iter().filter_map(|port| one(*port).ok()).collect::<Vec<_>>()
                            })
                        })
                        .collect();
                    threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
                })
            })
        }

        /// The tunnel dials `count` times as the client; those that were answered.
        async fn dials(&self, to: IpAddr, count: usize) -> Vec<TcpStream> {
            let netns = Netns::new(self.pod.open()).unwrap();
            let options = SocketOptions { mark: MARK, ..SocketOptions::default() };
            let (ready, closed) = (ReadySockets::default(), CancellationToken::new());
            let dialler = Dialler { netns: &netns, options: &options, ready: Some((&ready, &closed)) };
            let dial = |_| dialler.connect(SocketAddr::new(to, 8080), Some(client_of(to)));
            let dials = futures_util::future::join_all((0..count).map(dial)).await;
            dials.into_iter().filter_map(Result::ok).collect()
        }
    }

    type TcpStreamOf = std::net::TcpStream;

    fn client_of(pod: IpAddr) -> IpAddr {
        if pod.is_ipv4() { [10, 66, 0, 2].into() } else { "fd66::2".parse().unwrap() }
    }

    const PODS: [IpAddr; 2] = [
        IpAddr::V4(std::net::Ipv4Addr::new(10, 66, 0, 1)),
        IpAddr::V6(std::net::Ipv6Addr::new(0xfd66, 0, 0, 0, 0, 0, 0, 1)),
    ];

    #[tokio::test]
    #[ignore = "needs root: make test"]
    async fn a_dial_never_meets_a_connection_of_its_client() {
        let bench = Bench::new("m");
        for pod in PODS {
            let held = bench.connects(pod, CLIENTS, 1_000);
            assert_eq!((held.len(), bench.dials(pod, 500).await.len()), (1_000, 500), "{pod}");
        }
    }

    #[tokio::test]
    #[ignore = "needs root: make test"]
    async fn a_client_never_meets_a_dial_in_its_name() {
        let bench = Bench::new("c");
        for pod in PODS {
            let held = bench.dials(pod, 1_000).await;
            assert_eq!((held.len(), bench.connects(pod, CLIENTS, 500).len()), (1_000, 500), "{pod}");
        }
    }

    /// Its ports are our own.
    #[tokio::test]
    #[ignore = "needs root: make test"]
    async fn where_a_client_has_such_ports_too_another_one_is_tried_soon() {
        let bench = Bench::new("w");
        let held = bench.connects(PODS[0], FIRST_PORT..65_535, 1_500);
        let start = Instant::now();
        assert_eq!((held.len(), bench.dials(PODS[0], 300).await.len()), (1_500, 300));
        assert!(start.elapsed() < CONNECT_TIMEOUT, "some waited for their whole time");
    }

    /// More than there are ports of ours.
    #[tokio::test]
    #[ignore = "needs root: make test"]
    async fn the_kernel_chooses_where_our_ports_are_used_up() {
        let bench = Bench::new("u");
        let held = bench.dials(PODS[0], PORTS as usize + 100).await;
        assert_eq!(held.len(), PORTS as usize + 100);
        let of_clients =
            held.iter().filter(|stream| stream.local_addr().unwrap().port() < FIRST_PORT).count();
        assert!((100..1_000).contains(&of_clients), "{of_clients}");
    }
}
