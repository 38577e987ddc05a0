//! The pod's side: a helper that connects, and prints how each connection turned out.

use std::{
    collections::VecDeque,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use super::{LIMIT, micros, sleep_until};

/// So many times the period lie between the connections of a probe that is not in a hurry.
const AT_LEISURE: u32 = 10;

/// Connects once, with the very first instructions of this process as it were, and prints how long
/// that took in microseconds, and the kind of the connection.
pub(crate) fn connect_once(server: SocketAddr) {
    let began = Instant::now();
    let kind = match connect(server) {
        Ok((kind, _)) => kind.to_owned(),
        Err(error) => format!("failed: {error}"),
    };
    println!("{} {kind}", began.elapsed().as_micros());
}

/// Connects again and again, with pauses of `period` microseconds, and prints each change of kind
/// and each failure, until the reader of its output hangs up.
pub(crate) fn talk(server: SocketAddr, period: u64) {
    let _ = until_unheard(server, Duration::from_micros(period));
}

fn until_unheard(server: SocketAddr, period: Duration) -> io::Result<()> {
    let say = |what: &str| writeln!(io::stdout(), "{} {what}", micros());
    let (hurry, hurried) = mpsc::channel();
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            let Some(at) = line.strip_prefix("once ") else {
                if hurry.send(()).is_err() {
                    return;
                }
                continue;
            };
            sleep_until(at.parse().expect("a time"));
            let at = micros();
            let kind = connect(server)
                .map_or_else(|error| format!("failed to connect: {error}"), |(kind, _)| kind.to_owned());
            let _ = writeln!(io::stdout(), "{at} once {kind}");
        }
    });
    let (mut last, mut in_a_hurry) = ("", true);
    let mut held: VecDeque<TcpStream> = VecDeque::new();
    loop {
        let began = Instant::now();
        match connect_surely(server, last) {
            Ok((at, kind, stream)) if kind != last => {
                (last, in_a_hurry) = (kind, false);
                writeln!(io::stdout(), "{at} {kind}")?;
                // The first of each kind stays, as long as there is room.
                held.push_back(stream);
                if held.len() > 4 {
                    held.pop_front();
                }
            }
            Ok(_) => {}
            Err(error) => say(&format!("failed to connect: {error}"))?,
        }
        // One of those that are held, in turn.
        if let Some(mut stream) = held.pop_front() {
            let mut echo = [0];
            match stream.write_all(&[7]).and_then(|()| stream.read_exact(&mut echo)) {
                Ok(()) => held.push_back(stream),
                Err(error) => say(&format!("failed while open: {error}"))?,
            }
        }
        if in_a_hurry {
            thread::sleep(period.saturating_sub(began.elapsed()));
        } else {
            in_a_hurry = hurried.recv_timeout((period * AT_LEISURE).saturating_sub(began.elapsed())).is_ok();
        }
    }
}

/// A connection, when it was there, and its kind. The port of the tunnel's connection may equal the
/// application's by chance, once in thirty thousand times; so a kind other than `last` counts only
/// when a second connection has it, too.
fn connect_surely(server: SocketAddr, last: &str) -> io::Result<(u128, &'static str, TcpStream)> {
    let ((kind, stream), at) = (connect(server)?, micros());
    if kind == last {
        return Ok((at, kind, stream));
    }
    let (again, second) = connect(server)?;
    Ok(if again == kind { (at, kind, stream) } else { (micros(), again, second) })
}

/// A connection and its kind.
fn connect(server: SocketAddr) -> io::Result<(&'static str, TcpStream)> {
    let mut stream = TcpStream::connect_timeout(&server, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut seen = [0; 2];
    stream.read_exact(&mut seen)?;
    let own = stream.local_addr()?.port();
    Ok((if u16::from_be_bytes(seen) == own { "direct" } else { "tunnel" }, stream))
}
