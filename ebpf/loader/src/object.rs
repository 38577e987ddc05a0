//! What the compiled object holds: programs with their places of attachment. The table of its maps
//! is in `adit_ebpf_common`.

use std::io;

use aya::{
    Ebpf,
    programs::{Program, ProgramError},
};
use aya_obj::generated::bpf_attach_type;

use crate::KernelError;

/// The object, as the build script compiled it.
pub(crate) static BYTES: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/adit.o"));

/// A program and how the kernel attaches it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attachment {
    pub(crate) program: &'static str,
    pub(crate) attach_type: bpf_attach_type,
}

const fn attachment(program: &'static str, attach_type: bpf_attach_type) -> Attachment {
    Attachment { program, attach_type }
}

/// To the cgroup above all pods. In this order: what answers a redirected application is there from
/// the first moment on, so connect comes last.
pub(crate) const PODS: [Attachment; 14] = [
    attachment("adit_bind4", bpf_attach_type::BPF_CGROUP_INET4_BIND),
    attachment("adit_bind6", bpf_attach_type::BPF_CGROUP_INET6_BIND),
    attachment("adit_post_bind4", bpf_attach_type::BPF_CGROUP_INET4_POST_BIND),
    attachment("adit_post_bind6", bpf_attach_type::BPF_CGROUP_INET6_POST_BIND),
    attachment("adit_pods_ops", bpf_attach_type::BPF_CGROUP_SOCK_OPS),
    attachment("adit_getsockopt", bpf_attach_type::BPF_CGROUP_GETSOCKOPT),
    attachment("adit_peername4", bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME),
    attachment("adit_peername6", bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME),
    attachment("adit_recvmsg4", bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG),
    attachment("adit_recvmsg6", bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG),
    attachment("adit_sendmsg4", bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG),
    attachment("adit_sendmsg6", bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG),
    attachment("adit_connect4", bpf_attach_type::BPF_CGROUP_INET4_CONNECT),
    attachment("adit_connect6", bpf_attach_type::BPF_CGROUP_INET6_CONNECT),
];

/// To the cgroup above all pods, while pods are expected whose netns is not known. It sees every
/// packet.
pub(crate) const INGRESS: Attachment = attachment("adit_ingress", bpf_attach_type::BPF_CGROUP_INET_INGRESS);

/// To a tunnel's cgroup. The program that records the netns of a socket comes first, before any
/// socket can listen.
pub(crate) const TUNNEL: [Attachment; 5] = [
    attachment("adit_sock_create", bpf_attach_type::BPF_CGROUP_INET_SOCK_CREATE),
    attachment("adit_tunnel_ops", bpf_attach_type::BPF_CGROUP_SOCK_OPS),
    attachment("adit_getsockopt", bpf_attach_type::BPF_CGROUP_GETSOCKOPT),
    attachment("adit_tunnel_mark4", bpf_attach_type::BPF_CGROUP_INET4_CONNECT),
    attachment("adit_tunnel_mark6", bpf_attach_type::BPF_CGROUP_INET6_CONNECT),
];

/// To the kubelet's cgroup.
pub(crate) const KUBELET: Attachment = attachment("adit_kubelet_ops", bpf_attach_type::BPF_CGROUP_SOCK_OPS);

/// To a pod's netns.
pub(crate) const NETNS: Attachment = attachment("adit_sk_lookup", bpf_attach_type::BPF_SK_LOOKUP);

/// Gives every program to the kernel's verifier.
pub(crate) fn load_programs(object: &mut Ebpf) -> Result<(), KernelError> {
    for Attachment { program: name, .. } in PODS.into_iter().chain(TUNNEL).chain([INGRESS, KUBELET, NETNS]) {
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
pub(crate) fn load(program: &mut Program) -> Result<(), ProgramError> {
    let io_error = |error: &ProgramError| match error {
        ProgramError::LoadError { io_error, .. } => Some(io_error.kind()),
        _ => None,
    };
    unless_interrupted(|| load_once(program), io_error)
}

/// How often a program is given to the verifier that gives up when a signal arrives, such as that of
/// a timer: it answers `EAGAIN`. As often as libbpf does it.
const LOADS: usize = 5;

/// Repeats `load` while the verifier was interrupted. `kind` tells of what kind an error is.
pub(crate) fn unless_interrupted<T, E>(
    mut load: impl FnMut() -> Result<T, E>,
    kind: impl Fn(&E) -> Option<io::ErrorKind>,
) -> Result<T, E> {
    for _ in 1..LOADS {
        match load() {
            Err(error) if kind(&error) == Some(io::ErrorKind::WouldBlock) => {}
            done => return done,
        }
    }
    load()
}

fn load_once(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io};

    use adit_ebpf_common::maps;

    use super::{LOADS, unless_interrupted};

    #[test]
    fn a_load_that_a_signal_ended_is_repeated() {
        let load = |interruptions: usize, other: io::ErrorKind| {
            let mut loads = 0;
            let done = unless_interrupted(
                || {
                    loads += 1;
                    if loads <= interruptions { Err(other) } else { Ok(loads) }
                },
                |kind| Some(*kind),
            );
            (done, loads)
        };
        let interrupted = io::ErrorKind::WouldBlock;
        assert_eq!(load(2, interrupted), (Ok(3), 3));
        assert_eq!(load(100, interrupted), (Err(interrupted), LOADS));
        let refused = io::ErrorKind::PermissionDenied;
        assert_eq!(load(2, refused), (Err(refused), 1));
    }

    #[test]
    fn the_object_has_the_maps_of_the_table() {
        let object = aya_obj::Object::parse(super::BYTES).unwrap();
        let sizes = |key: u32, value: u32| (key as usize, value as usize);
        let found: BTreeMap<&str, _> = object
            .maps
            .iter()
            .filter(|(name, _)| !name.starts_with('.'))
            .map(|(name, map)| (name.as_str(), sizes(map.key_size(), map.value_size())))
            .collect();
        let table: BTreeMap<&str, _> =
            maps::ALL.iter().map(|map| (map.name, (map.key.size, map.value.size))).collect();
        assert_eq!(found, table);
    }
}
