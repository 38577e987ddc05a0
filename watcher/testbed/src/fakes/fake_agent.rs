//! A node agent: it speaks ZDS as istio-cni does, one message at a time.

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

use crate::{mesh_pod::MeshPod, wait::LIMIT};

/// A node agent that serves one tunnel.
#[derive(Debug)]
pub struct FakeAgent {
    listener: OwnedFd,
    connection: Option<OwnedFd>,
}

impl FakeAgent {
    /// Listens at `path`.
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
        // Closed on exec: while a program that a test starts held it, hanging up would have no
        // effect.
        let fd = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).expect("the tunnel connects");
        self.greet(own(fd))
    }

    /// The same; `None` if no tunnel comes within `limit`.
    pub fn try_accept(&mut self, limit: Duration) -> Option<Vec<u8>> {
        setsockopt(&self.listener, sockopt::ReceiveTimeout, &time_value(limit)).expect("timeout");
        let came = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC);
        setsockopt(&self.listener, sockopt::ReceiveTimeout, &time_value(LIMIT)).expect("timeout");
        Some(self.greet(own(came.ok()?)))
    }

    fn greet(&mut self, connection: OwnedFd) -> Vec<u8> {
        setsockopt(&connection, sockopt::ReceiveTimeout, &time_value(LIMIT)).expect("timeout");
        self.connection = Some(connection);
        self.receive().expect("hello")
    }

    /// Closes the connection to the tunnel.
    pub fn hang_up(&mut self) {
        self.connection = None;
    }

    /// Adds a pod: the error in the tunnel's answer, which is empty for success.
    pub fn add(&self, pod: &MeshPod) -> String {
        self.add_as(&pod.name, &pod.name, &[pod.netns.open()])
    }

    /// The same with another uid, name, and any descriptors.
    pub fn add_as(&self, uid: &str, name: &str, netns: &[OwnedFd]) -> String {
        let info = WorkloadInfo { name: name.into(), namespace: "demo".into(), service_account: name.into() };
        let add = AddWorkload { uid: uid.into(), workload_info: Some(info) };
        self.request(Payload::Add(add), netns)
    }

    /// Deletes a pod: the error in the answer.
    pub fn delete(&self, uid: &str) -> String {
        self.request(Payload::Del(DelWorkload { uid: uid.into() }), &[])
    }

    /// Keeps a pod: the error in the answer.
    pub fn keep(&self, uid: &str) -> String {
        self.request(Payload::Keep(KeepWorkload { uid: uid.into() }), &[])
    }

    /// Ends the snapshot: the error in the answer.
    pub fn snapshot(&self) -> String {
        self.request(Payload::SnapshotSent(SnapshotSent {}), &[])
    }

    /// Sends a message: the error in the answer.
    pub fn request(&self, payload: Payload, descriptors: &[OwnedFd]) -> String {
        self.request_raw(&WorkloadRequest { payload: Some(payload) }.encode_to_vec(), descriptors)
    }

    /// Sends any packet: the error in the answer.
    pub fn request_raw(&self, packet: &[u8], descriptors: &[OwnedFd]) -> String {
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
    // SAFETY: accept(2) has just made the descriptor for this process, and no other code knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
