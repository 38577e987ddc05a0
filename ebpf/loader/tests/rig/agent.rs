//! A process that opens, dials and accepts sockets in a cgroup and netns of its own, as the tests
//! command.
//!
//! It is a helper (`testbed::helper`); commands and answers are lines on a socket pair, which is
//! its standard input.

use std::{
    collections::HashMap,
    fmt::Display,
    fs,
    io::{self, BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::Stdio,
    str::FromStr,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::socket::{setsockopt, sockopt},
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use testbed::{
    helper,
    process::{KillOnDrop, Placement},
};

use super::sys;

const ROLE: &str = "agent";
/// Longer than any loaded machine takes for a handshake on a veth pair.
const PATIENCE: Duration = Duration::from_secs(5);

/// Our end.
#[derive(Debug)]
pub struct Agent {
    commands: BufReader<UnixStream>,
    task: u32,
    _process: KillOnDrop,
}

/// How to dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Tcp,
    Mptcp,
    NonBlocking,
    /// TCP Fast Open by sendto(2), which connects with the first byte in the SYN.
    FastOpen,
    /// TCP Fast Open by the socket option: connect(2) sends nothing, the first write(2) does.
    FastOpenLater,
    Udp,
}

/// One end of a connection, as its process sees it.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub handle: u32,
    pub local: SocketAddr,
    pub peer: SocketAddr,
    /// What SO_ORIGINAL_DST answers at level SOL_IP, else at SOL_IPV6.
    pub original: Option<SocketAddr>,
    /// SO_MARK.
    pub mark: u32,
}

impl Agent {
    pub fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_read_timeout(Some(4 * PATIENCE)).expect("a timeout");
        let child = helper::command(&Placement::default(), ROLE)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .expect("the agent starts");
        let process = KillOnDrop(child);
        let mut agent = Self { commands: BufReader::new(ours), task: 0, _process: process };
        agent.task = agent.tell("task").expect("the agent's thread").parse().expect("its id");
        agent
    }

    /// The id of the thread that obeys. It alone changes its netns.
    pub fn task(&self) -> u32 {
        self.task
    }

    pub fn enter_cgroup(&mut self, dir: &Path) {
        self.tell(format_args!("cgroup {}", dir.display())).expect("the agent enters its cgroup");
    }

    pub fn new_netns(&mut self) {
        self.tell("unshare").expect("the agent gets a netns");
    }

    pub fn enter_netns_of(&mut self, other: &Self) {
        self.tell(format_args!("setns /proc/{}/ns/net", other.task)).expect("the agent enters a netns");
    }

    pub fn cookie(&mut self) -> u64 {
        self.tell("cookie").expect("a netns cookie").parse().expect("a number")
    }

    /// Marks the TCP sockets that it makes from now on.
    pub fn mark(&mut self, mark: u32) {
        self.tell(format_args!("mark {mark}")).expect("a mark");
    }

    /// Sets a sysctl of its netns, such as `ipv4/tcp_syncookies`.
    pub fn sysctl(&mut self, name: &str, value: &str) {
        self.tell(format_args!("sysctl {name} {value}")).expect("a sysctl");
    }

    /// A TCP listener, in the family of `address`.
    pub fn listen(&mut self, address: &str) -> u32 {
        self.tell(format_args!("listen {address}")).expect("a listener").parse().expect("a handle")
    }

    /// The same of MPTCP.
    pub fn listen_mptcp(&mut self, address: &str) -> u32 {
        self.tell(format_args!("listen-mptcp {address}")).expect("a listener").parse().expect("a handle")
    }

    /// `Err` is an errno.
    pub fn dial(&mut self, how: How, to: SocketAddr) -> Result<End, i32> {
        self.tell(format_args!("dial {how:?} {to}")).map(|answer| end(&answer))
    }

    /// By TCP, without waiting for an answer: the handle of the socket. `Err` is an errno.
    pub fn begin(&mut self, to: SocketAddr) -> Result<u32, i32> {
        self.tell(format_args!("begin {to}")).map(|answer| answer.parse().expect("a handle"))
    }

    /// By TCP, from a given address.
    pub fn dial_from(&mut self, from: SocketAddr, to: SocketAddr) -> Result<End, i32> {
        self.tell(format_args!("dial-from {from} {to}")).map(|answer| end(&answer))
    }

    /// The same from a source port that other sockets may have too.
    pub fn dial_from_shared(&mut self, from: SocketAddr, to: SocketAddr) -> Result<End, i32> {
        self.tell(format_args!("dial-from-shared {from} {to}")).map(|answer| end(&answer))
    }

    /// By TCP, with a socket that is bound to the interface of that name.
    pub fn dial_by(&mut self, device: &str, to: SocketAddr) -> Result<End, i32> {
        self.tell(format_args!("dial-by {device} {to}")).map(|answer| end(&answer))
    }

    /// Dissolves a connection and dials with the same socket.
    pub fn redial(&mut self, handle: u32, to: SocketAddr) -> Result<End, i32> {
        self.tell(format_args!("redial {handle} {to}")).map(|answer| end(&answer))
    }

    /// A UDP socket bound to `address`.
    pub fn bind_udp(&mut self, address: &str) -> u32 {
        self.tell(format_args!("udp {address}")).expect("a UDP socket").parse().expect("a handle")
    }

    /// To `to`, or to whom the socket is connected.
    pub fn send(&mut self, handle: u32, to: Option<SocketAddr>, word: &str) {
        let to = to.map_or_else(|| "peer".to_owned(), |to| to.to_string());
        self.tell(format_args!("send {handle} {to} {word}")).expect("sent");
    }

    /// Who sent the next datagram, and the word in it.
    pub fn receive(&mut self, handle: u32) -> (SocketAddr, String) {
        let received = self.tell(format_args!("receive {handle}")).expect("a datagram");
        let (from, word) = received.split_once(' ').expect("two words");
        (from.parse().expect("an address"), word.to_owned())
    }

    pub fn accept(&mut self, listener: u32) -> End {
        let accepted = self.tell(format_args!("accept {listener}"));
        end(&accepted
            .unwrap_or_else(|errno| panic!("nothing to accept: {}", io::Error::from_raw_os_error(errno))))
    }

    /// Whether nothing waits to be accepted.
    pub fn is_idle(&mut self, listener: u32) -> bool {
        self.tell(format_args!("poll {listener}")).expect("a listener") == "idle"
    }

    pub fn close(&mut self, handle: u32) {
        self.tell(format_args!("close {handle}")).expect("an open handle");
    }

    fn tell(&mut self, command: impl Display) -> Result<String, i32> {
        writeln!(self.commands.get_mut(), "{command}").expect("the agent listens");
        let mut answer = String::new();
        self.commands.read_line(&mut answer).expect("the agent answers");
        let (kind, rest) = answer.trim_end().split_once(' ').unwrap_or_else(|| (answer.trim_end(), ""));
        match kind {
            "ok" => Ok(rest.to_owned()),
            "err" => Err(rest.parse().expect("an errno")),
            _ => panic!("the agent ended at {command}"),
        }
    }
}

fn end(answer: &str) -> End {
    let mut words = answer.split(' ');
    let mut next = || words.next().expect("five words");
    End {
        handle: next().parse().expect("a handle"),
        local: next().parse().expect("an address"),
        peer: next().parse().expect("an address"),
        original: next().parse().ok(),
        mark: next().parse().expect("a mark"),
    }
}

/// The body of test `helper`: obeys until its starter hangs up. Returns at once in an ordinary run.
pub fn serve() {
    if helper::role().as_deref() != Some(ROLE) {
        return;
    }
    let stdin = io::stdin().as_fd().try_clone_to_owned().expect("standard input");
    let mut answers = UnixStream::from(stdin);
    let commands = BufReader::new(answers.try_clone().expect("a second handle"));
    let mut sockets = Sockets::default();
    for command in commands.lines() {
        let Ok(command) = command else { return };
        let answer = match sockets.obey(&command) {
            Ok(text) => format!("ok {text}\n"),
            Err(error) => format!("err {}\n", error.raw_os_error().unwrap_or(0)),
        };
        if answers.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

#[derive(Default)]
struct Sockets {
    open: HashMap<u32, Socket>,
    last: u32,
    mark: u32,
}

impl Sockets {
    fn obey(&mut self, command: &str) -> io::Result<String> {
        let words: Vec<&str> = command.split(' ').collect();
        match words[..] {
            ["cgroup", dir] => fs::write(Path::new(dir).join("cgroup.procs"), "0").map(|()| String::new()),
            ["task"] => Ok(nix::unistd::gettid().to_string()),
            ["unshare"] => Ok(unshare(CloneFlags::CLONE_NEWNET).map(|()| String::new())?),
            ["setns", path] => {
                Ok(setns(fs::File::open(path)?, CloneFlags::CLONE_NEWNET).map(|()| String::new())?)
            }
            ["mark", mark] => {
                self.mark = parse(mark)?;
                Ok(String::new())
            }
            ["sysctl", name, value] => {
                fs::write(Path::new("/proc/sys/net").join(name), value).map(|()| String::new())
            }
            ["cookie"] => adit_ebpf_loader::own_netns_cookie().map(|cookie| cookie.to_string()),
            [listen @ ("listen" | "listen-mptcp"), address] => {
                let address: SocketAddr = parse(address)?;
                let protocol = if listen == "listen" { Protocol::TCP } else { Protocol::MPTCP };
                let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol))?;
                socket.set_reuse_address(true)?;
                socket.set_mark(self.mark)?;
                socket.bind(&address.into())?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.listen(128)?;
                Ok(self.keep(socket).to_string())
            }
            ["dial", how, to] => self.dial(how, parse(to)?),
            ["begin", to] => {
                let to: SocketAddr = parse(to)?;
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                match socket.connect(&to.into()) {
                    Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
                    _ => Ok(self.keep(socket).to_string()),
                }
            }
            ["dial-by", device, to] => self.dial_by(device, parse(to)?),
            [kind @ ("dial-from" | "dial-from-shared"), from, to] => {
                let (from, to): (SocketAddr, SocketAddr) = (parse(from)?, parse(to)?);
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                socket.set_reuse_address(kind == "dial-from-shared")?;
                socket.set_write_timeout(Some(PATIENCE))?;
                socket.set_mark(self.mark)?;
                socket.bind(&from.into())?;
                socket.connect(&to.into())?;
                self.describe(socket)
            }
            ["redial", handle, to] => {
                let to: SocketAddr = parse(to)?;
                let socket = self.open.remove(&parse(handle)?).ok_or(io::ErrorKind::NotFound)?;
                sys::dissolve(socket.as_fd())?;
                socket.connect(&to.into())?;
                self.describe(socket)
            }
            ["udp", address] => {
                let address: SocketAddr = parse(address)?;
                let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.bind(&address.into())?;
                Ok(self.keep(socket).to_string())
            }
            ["send", handle, to, word] => {
                let socket = self.get(handle)?;
                let sent = match to {
                    "peer" => socket.send(word.as_bytes())?,
                    to => socket.send_to(word.as_bytes(), &parse::<SocketAddr>(to)?.into())?,
                };
                Ok(sent.to_string())
            }
            ["receive", handle] => {
                let socket: std::net::UdpSocket = self.get(handle)?.try_clone()?.into();
                socket.set_read_timeout(Some(PATIENCE))?;
                let mut buffer = [0; 64];
                let (length, from) = socket.recv_from(&mut buffer)?;
                Ok(format!("{from} {}", String::from_utf8_lossy(&buffer[..length])))
            }
            ["accept", handle] => {
                let (accepted, _) = self.get(handle)?.accept()?;
                self.describe(accepted)
            }
            ["poll", handle] => {
                let listener = self.get(handle)?;
                listener.set_nonblocking(true)?;
                let accepted = listener.accept();
                listener.set_nonblocking(false)?;
                Ok(if accepted.is_ok() { "busy" } else { "idle" }.to_owned())
            }
            ["close", handle] => {
                self.open.remove(&parse(handle)?);
                Ok(String::new())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn dial(&mut self, how: &str, to: SocketAddr) -> io::Result<String> {
        let (kind, protocol) = match how {
            "Udp" => (Type::DGRAM, Protocol::UDP),
            "Mptcp" => (Type::STREAM, Protocol::MPTCP),
            _ => (Type::STREAM, Protocol::TCP),
        };
        let socket = Socket::new(Domain::for_address(to), kind, Some(protocol))?;
        socket.set_mark(self.mark)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        match how {
            "NonBlocking" => socket.connect_timeout(&to.into(), PATIENCE)?,
            "FastOpen" => {
                socket.send_to_with_flags(b"!", &to.into(), libc::MSG_FASTOPEN)?;
            }
            "FastOpenLater" => {
                setsockopt(&socket, sockopt::TcpFastOpenConnect, &true)?;
                socket.connect(&to.into())?;
                socket.send(b"!")?;
            }
            _ => socket.connect(&to.into())?,
        }
        self.describe(socket)
    }

    fn dial_by(&mut self, device: &str, to: SocketAddr) -> io::Result<String> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.bind_device(Some(device.as_bytes()))?;
        socket.connect(&to.into())?;
        self.describe(socket)
    }

    fn get(&self, handle: &str) -> io::Result<&Socket> {
        self.open.get(&parse(handle)?).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn keep(&mut self, socket: Socket) -> u32 {
        self.last += 1;
        self.open.insert(self.last, socket);
        self.last
    }

    fn describe(&mut self, socket: Socket) -> io::Result<String> {
        let nowhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        let local = socket.local_addr()?.as_socket().unwrap_or(nowhere);
        let peer = socket.peer_addr()?.as_socket().unwrap_or(nowhere);
        let asked = SockRef::from(&socket);
        let original = asked.original_dst_v4().or_else(|_| asked.original_dst_v6());
        let original = original.ok().and_then(|address| address.as_socket());
        let original = original.map_or_else(|| "none".to_owned(), |address| address.to_string());
        let mark = socket.mark()?;
        let handle = self.keep(socket);
        Ok(format!("{handle} {local} {peer} {original} {mark}"))
    }
}

fn parse<T: FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| io::ErrorKind::InvalidInput.into())
}
