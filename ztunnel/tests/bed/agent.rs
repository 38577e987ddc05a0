//! A node agent for tests: speaks ZDS as istio-cni does, one message at a time.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
        listen, recv, sendmsg, setsockopt, socket, sockopt,
    },
    time::TimeVal,
};
use prost::Message;
use ztunnel_api::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse,
    workload_request::Payload, workload_response,
};

use super::{LIMIT, Pod};

pub struct FakeAgent {
    listener: OwnedFd,
    connection: Option<OwnedFd>,
}

impl FakeAgent {
    pub fn listen(path: &Path) -> Self {
        let _ = std::fs::remove_file(path);
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("socket");
        setsockopt(&listener, sockopt::ReceiveTimeout, &time_value(LIMIT)).expect("timeout");
        bind(listener.as_raw_fd(), &UnixAddr::new(path).expect("path")).expect("bind");
        listen(&listener, Backlog::new(4).expect("backlog")).expect("listen");
        Self { listener, connection: None }
    }

    /// Waits for the tunnel and returns its first packet.
    pub fn accept(&mut self) -> Vec<u8> {
        // Not for the programs that tests start: while one of them held it, nobody could hang up.
        let fd = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).expect("the tunnel connects");
        self.connection = Some(own(fd));
        setsockopt(self.connection.as_ref().expect("set"), sockopt::ReceiveTimeout, &time_value(LIMIT))
            .expect("timeout");
        self.receive().expect("hello")
    }

    pub fn hang_up(&mut self) {
        self.connection = None;
    }

    /// The error in the tunnel's answer; empty for success.
    pub fn add(&self, pod: &Pod) -> String {
        self.add_as(&pod.name, &pod.name, &[pod.space.fd()])
    }

    pub fn add_as(&self, uid: &str, name: &str, netns: &[OwnedFd]) -> String {
        let info = WorkloadInfo { name: name.into(), namespace: "demo".into(), service_account: name.into() };
        let add = AddWorkload { uid: uid.into(), workload_info: Some(info) };
        self.ask(Payload::Add(add), netns)
    }

    pub fn delete(&self, uid: &str) -> String {
        self.ask(Payload::Del(DelWorkload { uid: uid.into() }), &[])
    }

    pub fn keep(&self, uid: &str) -> String {
        self.ask(Payload::Keep(KeepWorkload { uid: uid.into() }), &[])
    }

    pub fn snapshot(&self) -> String {
        self.ask(Payload::SnapshotSent(SnapshotSent {}), &[])
    }

    pub fn ask(&self, payload: Payload, descriptors: &[OwnedFd]) -> String {
        self.ask_raw(&WorkloadRequest { payload: Some(payload) }.encode_to_vec(), descriptors)
    }

    pub fn ask_raw(&self, packet: &[u8], descriptors: &[OwnedFd]) -> String {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if numbers.is_empty() { &[] } else { &rights[..] };
        let slices = [IoSlice::new(packet)];
        sendmsg::<UnixAddr>(self.fd(), &slices, rights, MsgFlags::empty(), None).expect("send");
        let answer = self.receive().expect("an answer");
        let answer = WorkloadResponse::decode(&*answer).expect("a WorkloadResponse");
        let workload_response::Payload::Ack(ack) = answer.payload.expect("an ack");
        ack.error
    }

    fn fd(&self) -> RawFd {
        self.connection.as_ref().expect("connected").as_raw_fd()
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut packet = vec![0; 2048];
        let n = recv(self.fd(), &mut packet, MsgFlags::empty())?;
        packet.truncate(n);
        Ok(packet)
    }
}

fn time_value(duration: Duration) -> TimeVal {
    TimeVal::new(duration.as_secs().try_into().expect("small"), 0)
}

#[expect(unsafe_code, reason = "nix's accept gives a bare number")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: accept(2) has just made it for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
