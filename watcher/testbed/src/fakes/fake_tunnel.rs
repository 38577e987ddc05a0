//! The tunnel's side of ZDS, without a tunnel behind it.

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    thread::{self, JoinHandle},
};

use nix::{
    cmsg_space,
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg},
};
use prost::Message as _;
use socket2::{Domain, SockAddr, Socket, Type};
use ztunnel_api::zds::{
    Ack, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_request::Payload,
    workload_response::Payload as Response,
};

use crate::{
    lend::{Lent, give},
    wait::LIMIT,
};

/// What a tunnel receives from the watcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// The uid, and the inode of the netns that came with it.
    Add(String, u64),
    /// The uid.
    Del(String),
    /// The snapshot is complete.
    SnapshotSent,
    /// The watcher hung up.
    Closed,
}

/// A tunnel that is connected to a watcher.
#[derive(Debug)]
pub struct FakeTunnel {
    connection: Lent,
    /// The namespace of the pods that it expects.
    namespace: String,
}

impl FakeTunnel {
    /// Connects and says hello as a process in `cgroup`; `None`: as this process. Returns when the
    /// watcher has looked up the cgroup of the process.
    pub fn connect(zds: &Path, cgroup: Option<&Path>) -> Self {
        let connection = match cgroup {
            Some(cgroup) => Lent::new(cgroup, &format!("zds {}", zds.display())),
            None => Lent::own(greet(zds)),
        };
        Self { connection, namespace: "default".to_owned() }
    }

    /// Expects pods of this namespace in place of `default`.
    #[must_use]
    pub fn of_namespace(self, namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..self }
    }

    /// The next message, without an answer.
    pub fn receive(&self) -> Received {
        let mut buffer = [0; 2048];
        let mut control = cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        // Where a timeout is set, the kernel does not go on waiting by itself after an interruption
        // (signal(7)).
        let is_interrupted = |error: &io::Error| error.kind() == io::ErrorKind::Interrupted;
        while self
            .connection
            .socket
            .peek(&mut [MaybeUninit::uninit()])
            .is_err_and(|error| is_interrupted(&error))
        {}
        let received = match recvmsg::<UnixAddr>(
            self.connection.socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::empty(),
        ) {
            // It was killed before it read our last message.
            Err(nix::errno::Errno::ECONNRESET) => return Received::Closed,
            received => received.expect("a message in time"),
        };
        let (length, mut fds) = (received.bytes, Vec::new());
        for message in received.cmsgs().expect("control messages") {
            if let ControlMessageOwned::ScmRights(passed) = message {
                fds.extend(passed);
            }
        }
        assert!(length <= 1024);
        let inodes: Vec<u64> = fds
            .into_iter()
            .map(|fd| {
                let inode = fs::metadata(format!("/proc/self/fd/{fd}")).expect("fd").ino();
                nix::unistd::close(fd).expect("close");
                inode
            })
            .collect();
        if length == 0 {
            return Received::Closed;
        }
        let request = WorkloadRequest::decode(&buffer[..length]).expect("a request");
        match request.payload.expect("a payload") {
            Payload::Add(add) => {
                let [inode] = inodes.as_slice() else { panic!("{} fds with {add:?}", inodes.len()) };
                let info = add.workload_info.expect("workload info");
                let expected = (self.namespace.as_str(), "default");
                assert_eq!((info.namespace.as_str(), info.service_account.as_str()), expected);
                Received::Add(add.uid, *inode)
            }
            other => {
                assert!(inodes.is_empty(), "fds with {other:?}");
                match other {
                    Payload::Del(del) => Received::Del(del.uid),
                    Payload::SnapshotSent(_) => Received::SnapshotSent,
                    Payload::Add(_) | Payload::Keep(_) => panic!("not expected: {other:?}"),
                }
            }
        }
    }

    /// Acknowledges the last message; an `error` refuses it.
    pub fn answer(&self, error: &str) {
        let ack = Response::Ack(Ack { error: error.to_owned() });
        send(&self.connection.socket, &WorkloadResponse { payload: Some(ack) }.encode_to_vec());
    }

    /// Receives the next message and acknowledges it.
    pub fn take(&self) -> Received {
        let received = self.receive();
        if received != Received::Closed {
            self.answer("");
        }
        received
    }

    /// Acknowledges every message until the watcher hangs up; what it received.
    pub fn take_all(self) -> JoinHandle<Vec<Received>> {
        thread::spawn(move || {
            let mut all = Vec::new();
            loop {
                match self.take() {
                    Received::Closed => return all,
                    received => all.push(received),
                }
            }
        })
    }

    /// Takes the snapshot; the uids in it.
    pub fn take_snapshot(&self) -> Vec<String> {
        let mut uids = Vec::new();
        loop {
            match self.take() {
                Received::Add(uid, _) => uids.push(uid),
                Received::SnapshotSent => return uids,
                other => panic!("in the snapshot: {other:?}"),
            }
        }
    }
}

/// The helper's side of [`FakeTunnel::connect`].
pub(crate) fn serve(zds: &str) {
    give(greet(Path::new(zds)));
}

/// Connects and says hello. Returns when the watcher has sent its first message or has hung up,
/// which it does after it has looked up the cgroup of this process.
fn greet(zds: &Path) -> Socket {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("socket");
    socket.connect(&SockAddr::unix(zds).expect("path")).expect("connect");
    socket.set_read_timeout(Some(LIMIT)).expect("timeout");
    let hello = ZdsHello { version: Version::V1.into() }.encode_to_vec();
    assert_eq!(hello, [8, 1], "as others send it");
    send(&socket, &hello);
    socket.peek(&mut [MaybeUninit::uninit()]).expect("the watcher's first message");
    socket
}

fn send(socket: &Socket, packet: &[u8]) {
    let parts = [IoSlice::new(packet)];
    match sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, &[], MsgFlags::MSG_NOSIGNAL, None) {
        // It was killed; the next `receive` says so.
        Err(nix::errno::Errno::EPIPE | nix::errno::Errno::ECONNRESET) => {}
        sent => drop(sent.expect("send")),
    }
}
