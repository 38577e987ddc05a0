//! The tunnel's side of ZDS, without any tunnel behind it.

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
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

/// What the watcher said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The uid, and the inode of the netns that came with it.
    Add(String, u64),
    Del(String),
    SnapshotSent,
    /// The watcher hung up.
    Closed,
}

/// The watcher looks at the connecting process's cgroup, which this process lends for that moment.
static PLACE: Mutex<()> = Mutex::new(());

/// Does `work` with this process in `cgroup`, whose the sockets are that it makes.
pub fn within<T>(cgroup: &Path, work: impl FnOnce() -> T) -> T {
    let _place = PLACE.lock().unwrap_or_else(PoisonError::into_inner);
    let root = watcher::observe::cgroups::find_root().expect("cgroup2");
    let own = i32::try_from(std::process::id()).expect("a pid");
    let home = watcher::observe::cgroups::of_process(&root, own).expect("own cgroup");
    let move_to = |dir: &Path| fs::write(dir.join("cgroup.procs"), own.to_string()).expect("move");
    move_to(cgroup);
    let done = work();
    move_to(&home);
    done
}

#[derive(Debug)]
pub struct FakeTunnel {
    socket: Socket,
    /// Whose pods it expects.
    namespace: String,
}

impl FakeTunnel {
    /// Connects and says hello from `cgroup`; `None`: from wherever this process is. Returns when the
    /// watcher has looked.
    pub fn connect(zds: &Path, cgroup: Option<&Path>) -> Self {
        if let Some(cgroup) = cgroup {
            return within(cgroup, || Self::greet(zds));
        }
        let _place = PLACE.lock().unwrap_or_else(PoisonError::into_inner);
        Self::greet(zds)
    }

    fn greet(zds: &Path) -> Self {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("socket");
        socket.connect(&SockAddr::unix(zds).expect("path")).expect("connect");
        socket.set_read_timeout(Some(Duration::from_secs(15))).expect("timeout");
        let hello = ZdsHello { version: Version::V1.into() }.encode_to_vec();
        assert_eq!(hello, [8, 1], "as others send it");
        send(&socket, &hello);
        // Its first word, or its hanging up, comes after it has looked.
        socket.peek(&mut [MaybeUninit::uninit()]).expect("the watcher's first word");
        Self { socket, namespace: "default".to_owned() }
    }

    pub fn of_namespace(self, namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..self }
    }

    /// The next message; not answered yet.
    pub fn hear(&self) -> Told {
        let mut buffer = [0; 2048];
        let mut control = cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        // Where a timeout is set, the kernel does not go on waiting by itself after an interruption (signal(7)).
        let is_interrupted = |error: &io::Error| error.kind() == io::ErrorKind::Interrupted;
        while self.socket.peek(&mut [MaybeUninit::uninit()]).is_err_and(|error| is_interrupted(&error)) {}
        let received = match recvmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::empty(),
        ) {
            // It was killed before it read our last word.
            Err(nix::errno::Errno::ECONNRESET) => return Told::Closed,
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
            return Told::Closed;
        }
        let request = WorkloadRequest::decode(&buffer[..length]).expect("a request");
        match request.payload.expect("a payload") {
            Payload::Add(add) => {
                let [inode] = inodes.as_slice() else { panic!("{} fds with {add:?}", inodes.len()) };
                let info = add.workload_info.expect("workload info");
                let expected = (self.namespace.as_str(), "default");
                assert_eq!((info.namespace.as_str(), info.service_account.as_str()), expected);
                Told::Add(add.uid, *inode)
            }
            other => {
                assert!(inodes.is_empty(), "fds with {other:?}");
                match other {
                    Payload::Del(del) => Told::Del(del.uid),
                    Payload::SnapshotSent(_) => Told::SnapshotSent,
                    Payload::Add(_) | Payload::Keep(_) => panic!("not expected: {other:?}"),
                }
            }
        }
    }

    /// Acknowledges the message heard last; an `error` refuses it.
    pub fn answer(&self, error: &str) {
        let ack = Response::Ack(Ack { error: error.to_owned() });
        send(&self.socket, &WorkloadResponse { payload: Some(ack) }.encode_to_vec());
    }

    /// Hears and acknowledges.
    pub fn take(&self) -> Told {
        let told = self.hear();
        self.answer("");
        told
    }

    /// Takes the snapshot; the uids in it.
    pub fn take_snapshot(&self) -> Vec<String> {
        let mut uids = Vec::new();
        loop {
            match self.take() {
                Told::Add(uid, _) => uids.push(uid),
                Told::SnapshotSent => return uids,
                other => panic!("in the snapshot: {other:?}"),
            }
        }
    }
}

fn send(socket: &Socket, packet: &[u8]) {
    let parts = [IoSlice::new(packet)];
    match sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, &[], MsgFlags::MSG_NOSIGNAL, None) {
        // It was killed; whoever listens next is told so.
        Err(nix::errno::Errno::EPIPE | nix::errno::Errno::ECONNRESET) => {}
        sent => drop(sent.expect("send")),
    }
}
