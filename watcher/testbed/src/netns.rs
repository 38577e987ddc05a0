//! Named network namespaces, and sockets in them.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::{
    command::{run, run_quietly},
    wait::LIMIT,
};

/// A netns with a name below `/run/netns`, deleted on drop. `Display` shows the name, as `ip -n`
/// takes it.
#[derive(Debug)]
pub struct TestNetns {
    name: String,
    /// Whether this is the one that deletes it.
    is_owner: bool,
}

impl TestNetns {
    /// Makes it, with its loopback up.
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        run(&format!("ip netns add {name}; ip -n {name} link set lo up"));
        Self { name, is_owner: true }
    }

    /// The netns with this name. This value does not delete it.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), is_owner: false }
    }

    /// The same netns once more; it ends with the first one.
    #[must_use]
    pub fn alias(&self) -> Self {
        Self::named(&self.name)
    }

    /// Its name below `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// A descriptor of it.
    pub fn open(&self) -> OwnedFd {
        File::open(self.path()).expect("the netns").into()
    }

    /// Its inode number, by which `/proc/PID/ns/net` shows it.
    pub fn inode(&self) -> u64 {
        std::fs::metadata(self.path()).expect("the netns").ino()
    }

    /// Deletes its name. It lives on for as long as processes or sockets are in it.
    pub fn delete(&self) {
        run_quietly(&format!("ip netns del {}", self.name));
    }

    /// Runs `work` in it, on a thread of its own, and returns what that returns. Sockets stay in
    /// the netns in which they were made.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        enter(self.open(), work)
    }

    /// A command that runs `program` in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    /// Runs `script` in it with `sh -e` and returns its standard output. It must not contain `'`.
    pub fn run(&self, script: &str) -> String {
        run(&format!("nsenter --net={} sh -ec '{script}'", self.path().display()))
    }

    /// What `program` prints in it, whether or not it succeeds.
    pub fn output(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().expect(program);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// GETs `url` with curl: status and body; 0 when there is no answer.
    pub fn curl(&self, url: &str) -> (u16, String) {
        let text = self.output("curl", &["-s", "--noproxy", "*", "-m", "5", "-w", "\n%{http_code}", url]);
        let (body, code) = text.rsplit_once('\n').unwrap_or(("", "0"));
        (code.parse().unwrap_or(0), body.to_owned())
    }

    /// Connects from it; reads and writes are limited to [`LIMIT`].
    pub fn try_connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        let stream = self.enter(|| TcpStream::connect_timeout(&to, LIMIT))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(stream)
    }

    /// The same, where it must succeed.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> TcpStream {
        self.try_connect(to).expect("connect")
    }

    /// How a connection ends that must come to nothing. The reset may be there before connect(2)
    /// looks.
    pub fn refusal(&self, to: impl Into<SocketAddr>) -> io::ErrorKind {
        match self.try_connect(to).and_then(|mut stream| stream.read_exact(&mut [0])) {
            Ok(()) => panic!("served"),
            Err(error) => error.kind(),
        }
    }

    /// Listens on `port`, both families, and gives each connection and its client's address to
    /// `each`, in a thread of its own. The socket ends with this process.
    pub fn serve(&self, port: u16, each: impl Fn(TcpStream, IpAddr) + Send + Clone + 'static) {
        let listener = self.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))).expect("listen");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (each, peer) = (each.clone(), stream.peer_addr());
                thread::spawn(move || peer.map(|peer| each(stream, peer.ip().to_canonical())));
            }
        });
    }

    /// The whole answer to an HTTP/1.0 request, head and body.
    ///
    /// # Errors
    /// When there is no connection, or it breaks off.
    pub fn http(&self, method: &str, to: impl Into<SocketAddr>, path: &str) -> io::Result<String> {
        let mut stream = self.try_connect(to)?;
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl fmt::Display for TestNetns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Drop for TestNetns {
    fn drop(&mut self) {
        if self.is_owner {
            self.delete();
        }
    }
}

/// Runs `work` in `netns`, on a thread of its own: the thread that calls stays where it is.
pub fn enter<T: Send>(netns: impl AsFd + Send, work: impl FnOnce() -> T + Send) -> T {
    let there = move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).expect("entering a netns");
        work()
    };
    thread::scope(|scope| scope.spawn(there).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
