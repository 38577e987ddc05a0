//! A program for pods that both dials and serves, and prints how each connection turned out.
//!
//! Every socket of it bears the [mark](MARK), so that a [capture](crate::capture) knows its packets.
//! Lines have a time in front:
//!
//! ```text
//! 1700000000000000 dial 10.0.0.2:8080 served 1700000000000900
//! 1700000000000000 dial 10.0.0.2:8080 EPERM 1700000000000100
//! 1700000000000000 from 10.0.0.7
//! ```

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, net::if_::if_nametoindex};
use socket2::{Domain, Socket, Type};

use crate::{
    capture::{MARK, now},
    helper,
    process::Placement,
};

/// The port that it serves.
pub const PORT: u16 = 8080;
/// A connection is there within this, or it does not come, for those who ask for nothing else.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// The command that runs it at `placement`: it dials the addresses in file `targets`, one to a
/// line, again and again, with pauses of `period`. It waits for each of connection and answer for
/// `patience`. Before it, a shell runs `first`.
pub fn command(
    placement: &Placement,
    targets: &Path,
    period: Duration,
    patience: Duration,
    first: &str,
) -> Command {
    let role = format!("pod {} {} {}", targets.display(), period.as_micros(), patience.as_millis());
    helper::command_after(placement, first, &role)
}

/// Serves, and dials until it is ended.
pub(crate) fn run(targets: &Path, period: Duration, patience: Duration) {
    let listener = listen().expect("a listener");
    thread::spawn(move || greet(&listener));
    loop {
        for target in read_targets(targets) {
            let began = Instant::now();
            let at = now();
            let outcome = dial(target, patience);
            let _ = writeln!(io::stdout(), "{at} dial {target} {outcome} {}", now());
            thread::sleep(period.saturating_sub(began.elapsed()));
        }
        if read_targets(targets).is_empty() {
            thread::sleep(period);
        }
    }
}

/// The addresses in the file, as far as it is there. Those that are link-local are meant on the
/// link of this pod's `eth0`.
fn read_targets(file: &Path) -> Vec<SocketAddr> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let scoped = |address: SocketAddr| match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => {
            let link = if_nametoindex("eth0").unwrap_or(0);
            SocketAddrV6::new(*v6.ip(), v6.port(), 0, link).into()
        }
        other => other,
    };
    text.lines().filter_map(|line| line.parse().ok()).map(scoped).collect()
}

fn listen() -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    mark(&socket, true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)).into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// A socket of IPv6 may speak IPv4 too.
fn mark(socket: &Socket, is_v6: bool) -> io::Result<()> {
    if is_v6 {
        socket.set_tclass_v6(MARK.into())?;
    }
    socket.set_tos_v4(MARK.into())
}

fn greet(listener: &TcpListener) {
    for mut stream in listener.incoming().flatten() {
        let Ok(from) = stream.peer_addr() else { continue };
        let _ = writeln!(io::stdout(), "{} from {}", now(), from.ip().to_canonical());
        // Before the client has said anything: the port that it seems to come from.
        let _ = stream.write_all(&from.port().to_be_bytes());
    }
}

/// How a connection turned out, in a word.
fn dial(to: SocketAddr, patience: Duration) -> String {
    let attempt = || -> io::Result<&'static str> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        mark(&socket, to.is_ipv6())?;
        socket.connect_timeout(&to.into(), patience)?;
        socket.set_read_timeout(Some(patience))?;
        let own = socket.local_addr()?.as_socket().map_or(0, |own| own.port());
        let mut seen = [0; 2];
        (&socket).read_exact(&mut seen)?;
        Ok(if u16::from_be_bytes(seen) == own { "served-same-port" } else { "served" })
    };
    match attempt() {
        Ok(word) => word.to_owned(),
        Err(error) => match error.raw_os_error() {
            Some(number) => format!("{:?}", Errno::from_raw(number)),
            None => format!("{:?}", error.kind()),
        },
    }
}

/// A line that the program printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It dialled.
    Dialled {
        /// When it called connect(2).
        began: u64,
        /// Where to.
        to: SocketAddr,
        /// How it turned out.
        outcome: Outcome,
        /// When it was over.
        ended: u64,
    },
    /// It accepted a connection.
    Accepted {
        /// When.
        at: u64,
        /// The client, as it sees it.
        from: IpAddr,
    },
}

/// How a connection turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The other end's application spoke.
    Served {
        /// Whether it saw the port that the client has. A tunnel in between has another one, but by
        /// chance the same.
        same_port: bool,
    },
    /// The programs refused it (`EPERM`).
    Refused,
    /// Anything else.
    Failed,
}

/// Reads a line; `None`: it is none of these, such as what a test harness prints.
pub fn said(line: &str) -> Option<Said> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        [began, "dial", to, outcome, ended] => Some(Said::Dialled {
            began: began.parse().ok()?,
            to: to.parse().ok()?,
            outcome: match outcome {
                "served" => Outcome::Served { same_port: false },
                "served-same-port" => Outcome::Served { same_port: true },
                "EPERM" => Outcome::Refused,
                _ => Outcome::Failed,
            },
            ended: ended.parse().ok()?,
        }),
        [at, "from", from] => Some(Said::Accepted { at: at.parse().ok()?, from: from.parse().ok()? }),
        _ => None,
    }
}
