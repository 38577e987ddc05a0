//! The socket options on which the design rests: the netns of a socket, its mark, its source
//! address, and the original destination.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    time::Duration,
};

use adit_netns::Netns;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{Instant, sleep, timeout_at},
};

use tokio_util::sync::CancellationToken;

use crate::config::Config;

mod client_source;
mod ready;

use ready::Kind;
pub(crate) use ready::ReadySockets;

/// How long a TCP connect may take; Istio's tunnel has the same limit.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Large enough for a burst of a thousand clients. The kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Options for every socket of the tunnel.
#[derive(Clone, Debug, Default)]
pub(crate) struct SocketOptions {
    /// `SO_MARK`, by which the pod's netns distinguishes the tunnel's packets from the
    /// application's. 0: none.
    pub mark: u32,
    pub keepalive: Option<TcpKeepalive>,
    pub user_timeout: Option<Duration>,
    /// Other sockets may listen on the same port (`SO_REUSEPORT`): the other workers, and another
    /// process during an upgrade.
    pub port_reuse: bool,
}

impl SocketOptions {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            mark: config.packet_mark.unwrap_or(0),
            keepalive: config.keepalive.map(|k| {
                TcpKeepalive::new().with_time(k.time).with_interval(k.interval).with_retries(k.retries)
            }),
            user_timeout: config.user_timeout,
            port_reuse: config.port_reuse,
        }
    }

    fn apply(&self, socket: &Socket) -> io::Result<()> {
        if self.mark != 0 {
            socket.set_mark(self.mark)?;
        }
        if let Some(keepalive) = &self.keepalive {
            socket.set_tcp_keepalive(keepalive)?;
        }
        if self.user_timeout.is_some() {
            socket.set_tcp_user_timeout(self.user_timeout)?;
        }
        // Set on listeners too: accepted sockets inherit it.
        socket.set_tcp_nodelay(true)
    }
}

/// How accepted connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AcceptedEnd {
    /// As is usual: what is dropped is closed.
    Close,
    /// What is dropped is reset, until it [has ended](crate::stream) well.
    Reset,
}

/// `count` listeners on `port` of every address, in one group; or, where the port may not be
/// shared, `count` handles of one listener. Call inside the netns that they shall serve.
pub(crate) fn listen(
    port: u16,
    count: usize,
    ipv6: bool,
    end: AcceptedEnd,
    options: &SocketOptions,
) -> io::Result<Vec<std::net::TcpListener>> {
    let one = || {
        let socket = bind_first(port, ipv6, options)?;
        if end == AcceptedEnd::Reset {
            // Accepted sockets inherit it.
            socket.set_linger(Some(Duration::ZERO))?;
        }
        socket.listen(BACKLOG)?;
        Ok(std::net::TcpListener::from(socket))
    };
    if options.port_reuse {
        return (0..count).map(|_| one()).collect();
    }
    let first = one()?;
    (0..count).map(|_| first.try_clone()).collect()
}

/// Whether others listen on `port` of any address and share it, as tunnels do. Call inside the netns.
///
/// # Errors
/// The kernel gives no socket, or refuses to bind it for another reason.
pub(crate) fn is_shared(port: u16, ipv6: bool, options: &SocketOptions) -> io::Result<bool> {
    let is_refused = |port_reuse| {
        let options = SocketOptions { port_reuse, ..options.clone() };
        match bind_first(port, ipv6, &options) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(true),
            Err(error) => Err(error),
        }
    };
    // Who does not share it is refused beside any listener, and who does, beside one that does not.
    // Accepted connections are in nobody's way.
    Ok(is_refused(false)? && !is_refused(true)?)
}

/// A socket bound to `port` of every address, of both families where that can be.
fn bind_first(port: u16, ipv6: bool, options: &SocketOptions) -> io::Result<Socket> {
    let v6 = if ipv6 { bind_wildcard(Ipv6Addr::UNSPECIFIED.into(), port, options) } else { Err(no_ipv6()) };
    match v6 {
        // A netns without IPv6 has no such family or no such address.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            bind_wildcard(Ipv4Addr::UNSPECIFIED.into(), port, options)
        }
        other => other,
    }
}

fn no_ipv6() -> io::Error {
    io::Error::from_raw_os_error(libc::EAFNOSUPPORT)
}

fn bind_wildcard(address: IpAddr, port: u16, options: &SocketOptions) -> io::Result<Socket> {
    let address = SocketAddr::new(address, port);
    let socket = new_socket(address, options)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.port_reuse)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn new_socket(family_of: SocketAddr, options: &SocketOptions) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(family_of), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    options.apply(&socket)?;
    Ok(socket)
}

/// From where, and how, connections are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dialler<'a> {
    pub netns: &'a Netns,
    pub options: &'a SocketOptions,
    /// Those of the calling worker, until what is left over was closed. `None`: nobody would close it.
    pub ready: Option<(&'a ReadySockets, &'a CancellationToken)>,
}

impl Dialler<'_> {
    /// Connects to `to` from inside the netns. With `from`, the peer sees that address (and any port).
    /// Binding a foreign address needs `IP_TRANSPARENT` and therefore `CAP_NET_ADMIN`.
    pub(crate) async fn connect(&self, to: SocketAddr, from: Option<IpAddr>) -> io::Result<TcpStream> {
        if let Some(from) = from.filter(|from| may_be_source(*from, to.ip())) {
            return client_source::connect(self, to, from).await;
        }
        self.connect_as(to, None).await
    }

    /// Connects to `to` from inside the netns, with `source`, which is an address there, or the one
    /// that the kernel chooses. A socket that has a source keeps its mark (kernel program
    /// `tunnel_mark`), which would keep its packets in the pod: it gets none.
    pub(crate) async fn connect_as(&self, to: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
        let mark = if source.is_some() { 0 } else { self.options.mark };
        let socket = self.socket(to, mark, false)?;
        if let Some(source) = source {
            // The port is chosen for the destination, so that others can have it too.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        let connecting = Connecting::begin(socket, to)?;
        let connected = connecting.done(Instant::now() + CONNECT_TIMEOUT).await;
        connected.unwrap_or_else(|| Err(no_answer()))
    }

    /// A socket in the netns.
    fn socket(&self, family_of: SocketAddr, mark: u32, is_transparent: bool) -> io::Result<Socket> {
        let is_ipv4 = family_of.is_ipv4();
        let kind = Kind { netns: self.netns.id(), is_ipv4, mark, is_transparent };
        let make = || {
            let socket = new_socket(family_of, &SocketOptions { mark, ..self.options.clone() })?;
            match (is_transparent, is_ipv4) {
                (true, true) => socket.set_ip_transparent_v4(true)?,
                (true, false) => socket.set_ip_transparent_v6(true)?,
                (false, _) => {}
            }
            Ok(socket)
        };
        match self.ready {
            Some((ready, closed)) if !closed.is_cancelled() => ready.take(self.netns, kind, make),
            _ => self.netns.enter(make),
        }
    }
}

/// A connect that has begun.
struct Connecting {
    stream: TcpStream,
    is_done: bool,
}

impl Connecting {
    /// On one machine the handshake is mostly done when this returns.
    fn begin(socket: Socket, to: SocketAddr) -> io::Result<Self> {
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        // Else there is nobody at the other end yet.
        let is_done = socket.peer_addr().is_ok();
        Ok(Self { stream: TcpStream::from_std(socket.into())?, is_done })
    }

    /// `None`: nobody has answered until then. Sets a timer only if there is something to wait for: it
    /// would wake the worker.
    async fn done(self, until: Instant) -> Option<io::Result<TcpStream>> {
        let Self { stream, is_done } = self;
        if is_done {
            return Some(Ok(stream));
        }
        let answered = timeout_at(until, stream.writable()).await.ok()?;
        Some(answered.and_then(|()| stream.take_error()).and_then(|error| error.map_or(Ok(stream), Err)))
    }
}

/// The source must have the destination's family, and must differ from its address. To a link-local
/// address no other one leads back over the loopback, and one as the source means nothing without
/// its interface, which differs here.
fn may_be_source(from: IpAddr, to: IpAddr) -> bool {
    let is_link_local = |ip| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    from.is_ipv4() == to.is_ipv4() && from != to && !is_link_local(from) && !is_link_local(to)
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {CONNECT_TIMEOUT:?}"))
}

/// Whether the calling thread's netns delivers packets with `mark` locally, whatever their
/// destination.
///
/// A pod's netns may be prepared in two ways. Istio's CNI exempts all packets with the mark from
/// capture, so every socket of the tunnel must have it; the application's answers get another mark.
/// Our watcher exempts the tunnel by its cgroup and uses the mark for the answers. Then only the
/// last hop may have it: packets of any other marked socket would never leave the pod.
pub(crate) fn mark_stays_local(mark: u32) -> bool {
    // TEST-NET-1 (RFC 5737) and the documentation prefix (RFC 3849) belong to no host, and no
    // packet is sent. For a local route the kernel chooses the destination itself as the source
    // address, which only a transparent socket may use.
    let nowhere =
        [SocketAddr::from(([192, 0, 2, 1], 9)), SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 9))];
    let stays = |to: SocketAddr| -> io::Result<bool> {
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
        socket.set_mark(mark)?;
        if to.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
        socket.connect(&to.into())?;
        Ok(socket.local_addr()?.as_socket().is_some_and(|from| from.ip() == to.ip()))
    };
    mark != 0 && nowhere.into_iter().any(|to| stays(to).unwrap_or(false))
}

/// Whether this process may use source addresses of others.
pub(crate) fn may_speak_as_others() -> bool {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))
        .and_then(|socket| socket.set_ip_transparent_v4(true))
        .is_ok()
}

/// Where a client wanted to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OriginalDst {
    pub address: SocketAddr,
    /// By netfilter or our getsockopt program. Otherwise it is the local address, which is the
    /// dialled one under `sk_lookup` and TPROXY.
    pub is_recorded: bool,
}

/// The original destination: the recorded one, IPv4 then IPv6, or the local address.
pub(crate) fn original_dst(stream: &TcpStream) -> io::Result<OriginalDst> {
    let socket = SockRef::from(stream);
    let recorded = |answer: io::Result<socket2::SockAddr>| {
        answer.ok().and_then(|a| a.as_socket()).filter(|a| !a.ip().is_unspecified() && a.port() != 0)
    };
    let found = recorded(socket.original_dst_v4()).or_else(|| recorded(socket.original_dst_v6()));
    let address = match found {
        Some(recorded) => recorded,
        None => stream.local_addr()?,
    };
    Ok(OriginalDst { address: canonical(address), is_recorded: found.is_some() })
}

/// Converts `::ffff:a.b.c.d`, as a dual-stack listener sees IPv4, to the IPv4 address. A link-local
/// address keeps its interface, without which it leads nowhere.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => {
            SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into()
        }
        _ => SocketAddr::new(address.ip().to_canonical(), address.port()),
    }
}

/// How long a client that closed its half waits for the connection that it asked for. Such a client
/// may be gone, which looks the same, or may have said all that it has to say.
const HALF_CLOSED_PATIENCE: Duration = Duration::from_secs(3);

/// Resolves when the client at the other end of `stream` is gone, or has closed its half a while
/// ago. Reads nothing.
pub(crate) async fn client_left(stream: &TcpStream) {
    // Besides errors, `PRIORITY` waits for the end of the client's half; urgent data, which it is
    // made for, is not subscribed to.
    match stream.ready(Interest::PRIORITY | Interest::ERROR).await {
        Ok(ready) if !ready.is_error() && !ready.is_write_closed() => {}
        _ => return,
    }
    tokio::select! {
        () = sleep(HALF_CLOSED_PATIENCE) => {}
        _ = stream.ready(Interest::ERROR) => {}
    }
}

/// Whether `netns` has the address of `address`, on its interface if it is a link-local one: others
/// cannot be bound.
pub(crate) fn is_local(netns: &Netns, mut address: SocketAddr) -> bool {
    address.set_port(0);
    let bound = netns.enter(|| {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        socket.bind(&address.into())
    });
    bound.is_ok()
}

/// Closes so that the peer sees a reset and not an end.
pub(crate) fn reset(stream: TcpStream) {
    // Fails only if the socket is already gone, and then no peer is left.
    let _ = stream.set_zero_linger();
    drop(stream);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::AsyncReadExt, time::timeout};

    #[tokio::test]
    async fn a_reset_is_seen_as_a_reset() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        reset(server);
        let error = client.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_resets_has_left_and_one_that_closed_its_half_waits_for_a_while() {
        use tokio::io::AsyncWriteExt;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connected = async || {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(b"data that nobody has read yet").await.unwrap();
            (client, listener.accept().await.unwrap().0)
        };
        let (mut client, server) = connected().await;
        // The data alone does not wake it: the time passes only while everybody sleeps.
        assert!(timeout(Duration::from_mins(1), client_left(&server)).await.is_err());
        client.shutdown().await.unwrap();
        let begun = Instant::now();
        client_left(&server).await;
        assert!(begun.elapsed() >= HALF_CLOSED_PATIENCE);
        let (client, server) = connected().await;
        reset(client);
        let begun = Instant::now();
        client_left(&server).await;
        assert!(begun.elapsed() < HALF_CLOSED_PATIENCE);
    }

    #[tokio::test]
    async fn without_a_redirect_the_local_address_was_dialled() {
        let listener = tokio::net::TcpListener::bind("[::]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let _client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let local = SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(original_dst(&server).unwrap().address, local);
    }

    #[test]
    fn only_an_address_that_leads_back_is_a_source() {
        for (from, to, may) in [
            ("10.0.0.2", "10.0.0.1", true),
            ("fd00::2", "fd00::1", true),
            ("10.0.0.1", "10.0.0.1", false),
            ("10.0.0.2", "fd00::1", false),
            ("fe80::2", "fd00::1", false),
            ("fd00::2", "fe80::1", false),
        ] {
            assert_eq!(may_be_source(from.parse().unwrap(), to.parse().unwrap()), may, "{from} {to}");
        }
    }

    #[test]
    fn only_a_link_local_address_keeps_its_interface() {
        for (address, expected) in [
            ("[fe80::1%3]:80", "[fe80::1%3]:80"),
            ("[fd00::1%3]:80", "[fd00::1]:80"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
        ] {
            assert_eq!(canonical(address.parse().unwrap()).to_string(), expected);
        }
    }

    #[test]
    fn listeners_share_a_port_and_take_both_families() {
        let options = SocketOptions { port_reuse: true, ..SocketOptions::default() };
        let first = listen(0, 1, true, AcceptedEnd::Close, &options).unwrap();
        let port = first[0].local_addr().unwrap().port();
        let group = listen(port, 2, true, AcceptedEnd::Close, &options).unwrap();
        assert_eq!(group.len(), 2);
        std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    }

    #[test]
    fn accepted_sockets_end_as_their_listener_says() {
        for (end, linger) in [(AcceptedEnd::Close, None), (AcceptedEnd::Reset, Some(Duration::ZERO))] {
            let listener = listen(0, 1, true, end, &SocketOptions::default()).unwrap().remove(0);
            listener.set_nonblocking(false).unwrap();
            let _client =
                std::net::TcpStream::connect(("127.0.0.1", listener.local_addr().unwrap().port())).unwrap();
            let accepted = listener.accept().unwrap().0;
            assert_eq!(SockRef::from(&accepted).linger().unwrap(), linger);
            assert!(accepted.nodelay().unwrap());
        }
    }

    #[test]
    #[ignore = "needs root: make test"]
    fn a_mark_that_stays_local_is_recognised() {
        let ip = |arguments: &str| {
            let arguments = arguments.split(' ');
            std::process::Command::new("ip").args(arguments).status().unwrap().success()
        };
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            assert!(ip("link set lo up"));
            assert!(!mark_stays_local(0x539));
            assert!(ip("route add local default dev lo table 100") && ip("rule add fwmark 0x539 lookup 100"));
            assert!(mark_stays_local(0x539));
            assert!(!mark_stays_local(0x111));
        })
        .join()
        .unwrap();
    }
}
