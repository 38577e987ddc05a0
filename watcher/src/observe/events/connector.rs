//! Events from the kernel's process connector (`Documentation/driver-api/connector.rst`), and from
//! inotify for cgroups, of which the connector knows nothing.
//!
//! Only `exec` is subscribed to: by then a container's namespaces are final, unlike at `fork`.
//! `cgroup.events` reports the end of the last process of a cgroup. Linux 6.6 and later filter
//! before they copy an event; for older kernels we attach a socket filter. Both leave gaps in the
//! sequence numbers, so only `ENOBUFS` shows lost events.
//!
//! The kernel acknowledges LISTEN only in the initial network, pid and user namespace. Elsewhere no
//! events would arrive, so [`Connector`] waits for the acknowledgement.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use netlink_sys::{Socket, SocketAddr};
use socket2::{SockFilter, SockRef};
use tokio::io::unix::AsyncFd;

use super::{Event, EventSource, EventSourceError, EventSourceNeeds, SourceKind, scan::Scan};
use crate::{observe::cgroups, sys::pollable};

const NETLINK_CONNECTOR: isize = 11;
/// `CN_IDX_PROC`, which is the multicast group too, and `CN_VAL_PROC`.
const PROC: u32 = 1;
const MCAST_LISTEN: u32 = 1;
/// `PROC_EVENT_*`; none is the acknowledgement.
const NONE: u32 = 0;
const EXEC: u32 = 2;
/// A netlink header and a connector header; then what happened, a CPU, a time, and for an exec the
/// thread and the process.
const WHAT: usize = 16 + 20;
const ACK_ERROR: usize = WHAT + 16;
const PROCESS: usize = ACK_ERROR + 4;
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(1);
/// Room for some 100,000 events while we are busy.
const BUFFER: usize = 32 << 20;

/// The connector's socket, and inotify.
#[derive(Debug)]
pub(crate) struct Connector {
    socket: AsyncFd<OwnedFd>,
    base: PathBuf,
    cgroup_root: PathBuf,
    cgroups: Scan,
}

impl Connector {
    /// For processes below the cgroup `base`.
    ///
    /// # Errors
    /// The kernel does not offer the connector here.
    pub(crate) fn below(base: &Path, cgroup_root: &Path) -> Result<Self, EventSourceError> {
        let fd = subscribe()?;
        let cgroups = Scan::new().map_err(EventSourceError::Inotify)?;
        let socket = pollable(fd).map_err(failed("wait for the connector"))?;
        Ok(Self { socket, base: base.to_owned(), cgroup_root: cgroup_root.to_owned(), cgroups })
    }

    /// The cgroup of a process, if it is below `base`.
    fn cgroup_of(&self, pid: u32) -> Option<PathBuf> {
        let path = cgroups::of_process(&self.cgroup_root, i32::try_from(pid).ok()?).ok()?;
        path.starts_with(&self.base).then_some(path)
    }
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> EventSourceError {
    move |source| EventSourceError::Connector { action, source }
}

/// A socket that receives each exec.
fn subscribe() -> Result<OwnedFd, EventSourceError> {
    let mut socket = Socket::new(NETLINK_CONNECTOR).map_err(failed("open a connector socket"))?;
    let own = SocketAddr::new(0, PROC);
    socket.bind(&own).map_err(failed("join the process connector, which takes CAP_NET_ADMIN"))?;
    let fd = socket.as_fd().try_clone_to_owned().map_err(failed("keep the socket"))?;
    drop(socket);
    let of = SockRef::from(&fd);
    of.set_recv_buffer_size(BUFFER).map_err(failed("set the receive buffer"))?;
    of.attach_filter(&filter()).map_err(failed("attach a socket filter"))?;
    of.set_read_timeout(Some(ACKNOWLEDGED_WITHIN / 2)).map_err(failed("set a timeout"))?;
    // First with the kernel's own filter; a kernel without it does not answer.
    let filtered = listen(&fd, &[MCAST_LISTEN, EXEC]);
    filtered.or_else(|_| listen(&fd, &[MCAST_LISTEN])).map_err(EventSourceError::NotAcknowledged)?;
    of.set_nonblocking(true).map_err(failed("set non-blocking"))?;
    Ok(fd)
}

impl EventSource for Connector {
    fn probe() -> Result<(), EventSourceError> {
        subscribe().map(drop)
    }

    fn open(needs: &mut EventSourceNeeds<'_>) -> Result<Self, EventSourceError> {
        Self::below(needs.base, needs.cgroup_root)
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Connector
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        if let Poll::Ready(event) = self.cgroups.poll_next(context) {
            return Poll::Ready(event);
        }
        let mut buffer = [0; 512];
        loop {
            let Ok(mut guard) = ready!(self.socket.poll_read_ready(context)) else { return Poll::Pending };
            let received = guard.try_io(|socket| receive(socket.get_ref(), &mut buffer));
            match received {
                Ok(Ok(length)) => {
                    if word(&buffer[..length], WHAT) == Some(EXEC)
                        && let Some(path) =
                            word(&buffer[..length], PROCESS).and_then(|pid| self.cgroup_of(pid))
                    {
                        return Poll::Ready(Event::Cgroup { path, closed: None });
                    }
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Poll::Ready(Event::Lost(1));
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot read from the process connector");
                    return Poll::Pending;
                }
                Err(_) => {}
            }
        }
    }

    fn watch(&mut self, dirs: &BTreeSet<PathBuf>) {
        self.cgroups.watch(dirs);
    }

    fn wants_dirs(&self) -> bool {
        true
    }
}

/// Sends `operation` and waits for the acknowledgement.
fn listen(socket: &OwnedFd, operation: &[u32]) -> io::Result<()> {
    let length = u16::try_from(size_of_val(operation)).unwrap_or(u16::MAX);
    let mut packet = Vec::with_capacity(64);
    let total = u32::from(length) + 36;
    // Netlink header: length; type NLMSG_DONE and no flags; sequence number; port.
    for number in [total, 3, 0, 0] {
        packet.extend(number.to_ne_bytes());
    }
    // Connector header: whom to; sequence number and acknowledgement; length and flags.
    for number in [PROC, PROC, 0, 0] {
        packet.extend(number.to_ne_bytes());
    }
    packet.extend(length.to_ne_bytes());
    packet.extend(0u16.to_ne_bytes());
    packet.extend(operation.iter().flat_map(|number| number.to_ne_bytes()));
    SockRef::from(socket).send(&packet)?;
    let mut buffer = [0; 512];
    // Every listener receives the acknowledgements of the others, and events.
    let deadline = Instant::now() + ACKNOWLEDGED_WITHIN / 2;
    while Instant::now() < deadline {
        let length = receive(socket, &mut buffer)?;
        match (word(&buffer[..length], WHAT), word(&buffer[..length], ACK_ERROR)) {
            (Some(NONE), Some(0)) => return Ok(()),
            (Some(NONE), Some(error)) => {
                return Err(io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(libc::EIO)));
            }
            _ => {}
        }
    }
    Err(io::Error::from(io::ErrorKind::TimedOut))
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    use std::os::fd::AsRawFd as _;
    Ok(nix::sys::socket::recv(socket.as_raw_fd(), buffer, nix::sys::socket::MsgFlags::empty())?)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Accepts acknowledgements and execs. Classic BPF loads in network order what the kernel wrote in
/// host order.
fn filter() -> [SockFilter; 5] {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const WHAT_AT: u32 = 36;
    const _: () = assert!(WHAT_AT as usize == WHAT);
    let step = SockFilter::new;
    [
        step(LOAD, 0, 0, WHAT_AT),
        step(EQUAL, 2, 0, EXEC.to_be()),
        step(EQUAL, 1, 0, NONE),
        step(RETURN, 0, 0, 0),
        step(RETURN, 0, 0, u32::MAX),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs the initial namespaces, root: make test"]
    fn an_exec_in_a_cgroup_is_reported() {
        let root = cgroups::find_root().expect("cgroup2");
        let base = root.join(format!("adit-connector-{}", std::process::id()));
        std::fs::create_dir(&base).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(async {
            let mut connector = match Connector::below(&base, &root) {
                Ok(connector) => connector,
                Err(error) => return Err(error.to_string()),
            };
            let script = format!("echo $$ > {}/cgroup.procs && exec sleep 0.3", base.display());
            let mut child = std::process::Command::new("sh").args(["-c", &script]).spawn().unwrap();
            let event =
                tokio::time::timeout(Duration::from_secs(10), super::super::next(&mut connector)).await;
            child.wait().unwrap();
            Ok(event)
        });
        std::fs::remove_dir(&base).unwrap();
        match result {
            Ok(event) => assert_eq!(event, Ok(Event::Cgroup { path: base, closed: None })),
            // A build machine's container has none; the error must name that.
            Err(reason) => assert!(reason.contains("LISTEN"), "{reason}"),
        }
    }
}
