//! Sockets that a helper makes in a cgroup and lends to this process.
//!
//! The kernel and `SO_PEERCRED` take them for sockets of that cgroup. To move this process there
//! for a moment instead would also move the children that other tests start in that moment.

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _},
    net::SocketAddr,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::Stdio,
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg},
};
use socket2::{Domain, Socket, Type};

use crate::{
    helper,
    netns::TestNetns,
    process::{KillOnDrop, Placement},
    wait::LIMIT,
};

/// A socket, and the helper that made it, which lives as long.
#[derive(Debug)]
pub struct Lent {
    /// The socket.
    pub socket: Socket,
    /// The helper ends when this is closed.
    _helper: Option<(UnixStream, KillOnDrop)>,
}

impl Lent {
    /// A socket of this process.
    pub(crate) fn own(socket: Socket) -> Self {
        Self { socket, _helper: None }
    }

    /// Has a helper in `cgroup` make the socket that `role` describes.
    pub(crate) fn new(cgroup: &Path, role: &str) -> Self {
        let (line, theirs) = UnixStream::pair().expect("a socket pair");
        line.set_read_timeout(Some(LIMIT)).expect("a timeout");
        let mut command = helper::command(&Placement::in_cgroup(cgroup), role);
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        let helper = KillOnDrop(command.spawn().expect("a helper starts"));
        // It holds the helper's end of the pair.
        drop(command);
        let socket = receive(&line).unwrap_or_else(|| panic!("the helper failed: {role}"));
        Self { socket: socket.into(), _helper: Some((line, helper)) }
    }
}

/// A connection as a tunnel, which lives in `cgroup`, makes it to an application: in the netns of
/// the pod, with `mark`, from an address that is not the pod's.
pub fn transparent(cgroup: &Path, netns: &TestNetns, from: SocketAddr, to: SocketAddr, mark: u32) -> Lent {
    Lent::new(cgroup, &format!("transparent {netns} {from} {to} {mark}"))
}

/// The helper's side of [`transparent`].
pub(crate) fn serve_transparent(netns: &str, [from, to]: [SocketAddr; 2], mark: u32) {
    let connect = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_ip_transparent_v4(true)?;
        socket.set_mark(mark)?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
        Ok(socket)
    };
    give(TestNetns::named(netns).enter(connect).expect("a connection"));
}

/// A listener of a tunnel, which lives in `cgroup`, in the netns of a pod.
pub fn tunnel_listener(cgroup: &Path, netns: &TestNetns, address: SocketAddr) -> Lent {
    Lent::new(cgroup, &format!("listener {netns} {address}"))
}

/// The helper's side of [`tunnel_listener`].
pub(crate) fn serve_listener(netns: &str, address: SocketAddr) {
    let listen = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.bind(&address.into())?;
        socket.listen(16)?;
        Ok(socket)
    };
    give(TestNetns::named(netns).enter(listen).expect("a listener"));
}

/// The helper's side: sends `socket` to the process that started this one, closes it here, and
/// waits for the end.
pub(crate) fn give(socket: Socket) {
    let mut line = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().expect("standard input"));
    let fds = [socket.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<UnixAddr>(line.as_raw_fd(), &[IoSlice::new(b"!")], &rights, MsgFlags::empty(), None)
        .expect("send");
    drop(socket);
    let _ = line.read(&mut [0]);
}

/// The descriptor that comes with the next message; `None` if the other end hung up.
fn receive(line: &UnixStream) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut control = cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = loop {
        match recvmsg::<UnixAddr>(line.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Err(Errno::EINTR) => {}
            received => break received.expect("a message in time"),
        }
    };
    let rights = received.cmsgs().expect("control messages").next()?;
    let ControlMessageOwned::ScmRights(fds) = rights else { return None };
    fds.first().map(|fd| own(*fd))
}

#[expect(unsafe_code, reason = "nix's recvmsg gives bare numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: recvmsg(2) has just made the descriptor for this process, and no other code knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
