//! What the compiled object holds: programs with their places of attachment, maps with their layouts.

use adit_ebpf_common::{
    address::Address,
    flows::{Destination, Flow, SocketState},
    pods::{CgroupInfo, ExcludedCidr, ExcludedPort, ListenerKey, PodRecord},
    settings::Settings,
};
use aya::{
    Ebpf,
    programs::{Program, ProgramError},
};

use crate::KernelError;

pub static BYTES: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/adit.o"));

/// A program and the `bpf_attach_type` of its links (linux/bpf.h; numbers never change).
#[derive(Clone, Copy, Debug)]
pub struct Attachment {
    pub program: &'static str,
    pub attach_type: u32,
}

const fn attachment(program: &'static str, attach_type: u32) -> Attachment {
    Attachment { program, attach_type }
}

/// To the cgroup above all pods. In this order, so that who is redirected can be answered from the first
/// moment on: connect comes last.
pub const PODS: [Attachment; 12] = [
    attachment("adit_post_bind4", 12),
    attachment("adit_post_bind6", 13),
    attachment("adit_pods_ops", 3),
    attachment("adit_getsockopt", 21),
    attachment("adit_peername4", 29),
    attachment("adit_peername6", 30),
    attachment("adit_recvmsg4", 19),
    attachment("adit_recvmsg6", 20),
    attachment("adit_sendmsg4", 14),
    attachment("adit_sendmsg6", 15),
    attachment("adit_connect4", 10),
    attachment("adit_connect6", 11),
];

/// To a tunnel's cgroup. Sockets are noted before they can listen.
pub const TUNNEL: [Attachment; 5] = [
    attachment("adit_sock_create", 2),
    attachment("adit_tunnel_ops", 3),
    attachment("adit_getsockopt", 21),
    attachment("adit_tunnel_mark4", 10),
    attachment("adit_tunnel_mark6", 11),
];

/// To a pod's netns.
pub const NETNS: Attachment = attachment("adit_sk_lookup", 36);

/// A map and the sizes of its key and value, by which pins of another build are recognised.
#[derive(Clone, Copy, Debug)]
pub struct MapLayout {
    pub name: &'static str,
    pub key_size: usize,
    pub value_size: usize,
}

const fn layout<K, V>(name: &'static str) -> MapLayout {
    MapLayout { name, key_size: size_of::<K>(), value_size: size_of::<V>() }
}

/// The data part of an LPM trie's key follows 32 bits of prefix length.
#[expect(dead_code, reason = "only its size is asked for")]
struct LpmKey<T>(u32, T);

pub const MAPS: [MapLayout; 12] = [
    layout::<u64, CgroupInfo>("cgroup_info_map"),
    layout::<Address, PodRecord>("pod_by_addr"),
    layout::<u32, Settings>("settings"),
    layout::<ExcludedPort, u8>("excluded_ports"),
    layout::<LpmKey<ExcludedCidr>, u8>("excluded_cidrs"),
    layout::<Flow, Destination>("original_dst"),
    layout::<Flow, u64>("tunnel_flows"),
    layout::<u64, u64>("deliveries"),
    layout::<ListenerKey, u32>("listeners"),
    layout::<ListenerKey, u32>("listened"),
    layout::<u32, SocketState>("socket_state"),
    layout::<(), ()>("trace"),
];

/// Gives every program to the kernel's verifier.
pub fn load_programs(object: &mut Ebpf) -> Result<(), KernelError> {
    for Attachment { program: name, .. } in PODS.into_iter().chain(TUNNEL).chain([NETNS]) {
        let Some(program) = object.program_mut(name) else {
            unreachable!("program {name} is part of the object that this crate was built with");
        };
        match load(program) {
            // getsockopt is attached in two places, and loaded once.
            Ok(()) | Err(ProgramError::AlreadyLoaded) => (),
            Err(source) => return Err(KernelError::Load { program: name, source: Box::new(source) }),
        }
    }
    Ok(())
}

/// Gives one program to the kernel's verifier.
pub fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}
