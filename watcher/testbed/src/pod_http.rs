//! Programs for pods that speak HTTP: a server that says who it is and whom it sees, and clients
//! that print how each request turned out.

use std::{
    env,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

/// A request that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves on `port`: `/` is answered at once, `/echo` sends every line back until the client ends.
pub(crate) fn serve(port: u16) {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).expect("a listener");
    for stream in listener.incoming().flatten() {
        thread::spawn(move || answer(&stream));
    }
}

fn answer(stream: &TcpStream) -> io::Result<()> {
    let peer = stream.peer_addr()?.ip().to_canonical();
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    lines.by_ref().map_while(Result::ok).find(String::is_empty);
    let mut out = stream;
    if request.contains(" /echo ") {
        write!(out, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        for line in lines {
            writeln!(out, "{}", line?)?;
        }
        return Ok(());
    }
    let body = format!("hello from {}, client {peer}\n", env::var("HOSTNAME").unwrap_or_default());
    write!(out, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// The body of the answer to one GET of `http://HOST[:PORT]/PATH`, with a connection of its own.
pub(crate) fn get(url: &str) -> io::Result<String> {
    let (host, path) = split(url);
    let mut stream = connect(host)?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned());
    match body {
        Some(body) if answer.starts_with("HTTP/1.1 200 ") => Ok(body),
        _ => Err(io::Error::other(format!("no answer: {answer:?}"))),
    }
}

/// Asks once, as the first thing that it does, and prints after how many microseconds it was answered.
pub(crate) fn first(url: &str) {
    let began = Instant::now();
    let answer = get(url).unwrap_or_else(|error| panic!("{url}: {error}"));
    say(&format!("answered after {} us: {answer}", began.elapsed().as_micros()));
}

fn split(url: &str) -> (&str, &str) {
    let rest = url.strip_prefix("http://").expect("a URL of http");
    rest.split_once('/').unwrap_or((rest, ""))
}

fn connect(host: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::other(format!("{host} has no address"));
    let authority = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
    for address in authority.to_socket_addrs()? {
        match connect_to(address) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Asks again and again, one request every `period`, in `threads` threads. Prints `failed ERROR` at
/// once for each that fails, and every second `ok COUNT`: how many were answered so far.
pub(crate) fn ask(url: &str, period: Duration, threads: usize) {
    let answered = AtomicUsize::new(0);
    thread::scope(|scope| {
        for number in 0..threads {
            let answered = &answered;
            scope.spawn(move || {
                // Not all at the same moment.
                thread::sleep(period.mul_f64(fraction(number, threads)));
                loop {
                    let began = Instant::now();
                    match get(url) {
                        Ok(_) => drop(answered.fetch_add(1, Relaxed)),
                        Err(error) => say(&format!("failed {error}")),
                    }
                    thread::sleep(period.saturating_sub(began.elapsed()));
                }
            });
        }
        report(&answered);
    });
}

/// Keeps `count` connections open, and sends a line on each every `period`. Prints `failed ERROR` when
/// one ends or a line does not come back, and every second `ok COUNT`: how many lines came back.
pub(crate) fn hold(url: &str, period: Duration, count: usize) {
    let returned = AtomicUsize::new(0);
    thread::scope(|scope| {
        for number in 0..count {
            let returned = &returned;
            scope.spawn(move || {
                let error = talk(url, period, number, returned).expect_err("it ends by an error only");
                say(&format!("failed {number}: {error}"));
            });
        }
        report(&returned);
    });
}

fn report(count: &AtomicUsize) {
    loop {
        thread::sleep(Duration::from_secs(1));
        say(&format!("ok {}", count.load(Relaxed)));
    }
}

fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

fn fraction(number: usize, of: usize) -> f64 {
    let float = |number: usize| f64::from(u32::try_from(number).expect("few"));
    float(number) / float(of)
}

fn talk(url: &str, period: Duration, number: usize, returned: &AtomicUsize) -> io::Result<()> {
    let (host, path) = split(url);
    let mut stream = connect(host)?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut next = || lines.next().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()));
    while !next()?.is_empty() {}
    for count in 0_u64.. {
        writeln!(stream, "{number} {count}")?;
        let line = next()?;
        if line != format!("{number} {count}") {
            return Err(io::Error::other(format!("sent {number} {count}, received {line}")));
        }
        returned.fetch_add(1, Relaxed);
        thread::sleep(period);
    }
    Ok(())
}
