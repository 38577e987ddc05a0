//! What leaves the pods of a node, as the node's own network devices see it.
//!
//! An `AF_PACKET` socket in the node's netns gets every packet that comes out of a pod's veth,
//! before the bridge, routing or any filter of the node sees it. Only what may be in clear is kept:
//! TCP segments that open a connection or carry data, to or from another port than that of HBONE,
//! and whatever bears the [mark](MARK) of a pod's own program.

pub mod segment;

use std::{
    io::IoSliceMut,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType,
            recvmsg, setsockopt, socket, sockopt,
        },
        time::{TimeSpec, TimeVal},
    },
};

use self::segment::Segment;
use crate::netns::TestNetns;

/// The traffic class (DSCP 46, no ECN) that the testbed's programs for pods give to their sockets,
/// those that listen too. A tunnel's sockets have none. So a packet of this class was sent by a
/// pod's own socket, whatever its ports.
pub const MARK: u8 = 0xb8;
/// The port that enrolled pods may use.
const HBONE: u16 = 15008;
/// `PACKET_OUTGOING` of `<linux/if_packet.h>`: what the node itself sends through a device.
const OUTGOING: u8 = 4;
/// Room for what comes while the reader does not run.
const BUFFER: usize = 64 << 20;

/// Microseconds since 1970: the clock of packets and of what is done to a node.
pub type Micros = u64;

/// Now.
pub fn now() -> Micros {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_micros()).expect("before the year 586912")
}

/// A packet that may be in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When the kernel received it.
    pub at: Micros,
    /// The device that it came in by: the node's end of a pod's veth.
    pub device: u32,
    /// What it is.
    pub segment: Segment,
}

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Vec<Seen>>,
    /// TCP segments, those that nobody keeps included.
    segments: AtomicU64,
    /// Those of HBONE among them.
    hbone: AtomicU64,
    lost: AtomicU64,
    stop: AtomicBool,
}

impl Capture {
    /// Captures on all devices of `netns`, from when this returns.
    pub fn start(netns: &TestNetns) -> Self {
        let socket = netns.enter(open);
        let shared = Arc::new(Shared::default());
        let reader = thread::spawn({
            let shared = Arc::clone(&shared);
            move || read(&socket, &shared)
        });
        Self { shared, reader: Some(reader) }
    }

    /// What has come since the last call.
    ///
    /// # Panics
    /// When packets were lost: what a capture says of them would be a guess.
    pub fn take(&self) -> Vec<Seen> {
        let lost = self.shared.lost.load(Relaxed);
        assert_eq!(lost, 0, "the capture lost packets");
        std::mem::take(&mut *self.shared.seen.lock().expect("no panic"))
    }

    /// How many TCP segments came out of pods so far, and how many of them were HBONE.
    pub fn counts(&self) -> (u64, u64) {
        (self.shared.segments.load(Relaxed), self.shared.hbone.load(Relaxed))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// A socket that gets every packet of the netns, from its network header on.
fn open() -> OwnedFd {
    let kind = SockType::Datagram;
    let socket = socket(AddressFamily::Packet, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .expect("a packet socket");
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).expect("a buffer");
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true).expect("timestamps");
    setsockopt(&socket, sockopt::RxqOvfl, &1).expect("the number of lost packets");
    // So that the reader looks from time to time whether it shall end.
    let wait = TimeVal::new(0, 50_000);
    setsockopt(&socket, sockopt::ReceiveTimeout, &wait).expect("a timeout");
    socket
}

fn read(socket: &OwnedFd, shared: &Shared) {
    let mut packet = [0_u8; 128];
    let mut control = cmsg_space!(TimeSpec, u32);
    while !shared.stop.load(Relaxed) {
        let mut parts = [IoSliceMut::new(&mut packet)];
        // `MSG_TRUNC`: the packet's real length, of which the headers are enough.
        let flags = MsgFlags::MSG_TRUNC;
        let (length, device, at) =
            match recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
                Ok(message) => {
                    let Some(from) = message.address else { continue };
                    let mut at = None;
                    for part in message.cmsgs().into_iter().flatten() {
                        match part {
                            ControlMessageOwned::ScmTimestampns(time) => at = Some(micros(time)),
                            ControlMessageOwned::RxqOvfl(lost) => shared.lost.store(lost.into(), Relaxed),
                            _ => {}
                        }
                    }
                    if from.pkttype() == OUTGOING {
                        continue;
                    }
                    (message.bytes, from.ifindex(), at.unwrap_or_else(now))
                }
                // A device that goes down says so once.
                Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => continue,
                Err(error) => panic!("reading packets: {error}"),
            };
        let Some(segment) = segment::parse(&packet[..length.min(128)]) else { continue };
        shared.segments.fetch_add(1, Relaxed);
        let is_hbone = segment.from.port() == HBONE || segment.to.port() == HBONE;
        if is_hbone {
            shared.hbone.fetch_add(1, Relaxed);
        }
        if segment.class == MARK || !is_hbone && (segment.opens() || segment.payload > 0) {
            let device = u32::try_from(device).expect("an index");
            shared.seen.lock().expect("no panic").push(Seen { at, device, segment });
        }
    }
}

fn micros(time: TimeSpec) -> Micros {
    let since = Duration::from(time);
    u64::try_from(since.as_micros()).expect("before the year 586912")
}
