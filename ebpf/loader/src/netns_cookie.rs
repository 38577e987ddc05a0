//! Which netns this thread is in.
//!
//! From Linux 5.14 on a socket shows it (`SO_NETNS_COOKIE`). Before that only programs can read it:
//! the program that records the netns of a tunnel's sockets records it of a socket of ours, whose
//! storage its owner can read.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::OnceLock,
};

use adit_ebpf_common::flows::SocketState;
use aya::{
    EbpfLoader,
    maps::{Map, MapData, SkStorage},
    programs::Program,
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::{
    object::{self, Attachment, TUNNEL},
    sys,
};

/// The cookie of the calling thread's netns, which is never used again before a reboot.
///
/// Before Linux 5.14 this attaches a program to this process's own cgroup for the moment of the
/// call, which takes the capabilities that the other programs take.
///
/// # Errors
/// No socket can be made; before Linux 5.14 also if the program cannot be attached.
pub fn own_netns_cookie() -> io::Result<u64> {
    own_netns_cookie_by(new_socket()?.as_fd())
}

/// The same for a caller that has a socket of that netns already, of whatever family.
///
/// # Errors
/// As of [`own_netns_cookie`].
pub fn own_netns_cookie_by(socket: BorrowedFd<'_>) -> io::Result<u64> {
    match sys::netns_cookie(socket) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => noted_cookie(),
        outcome => outcome,
    }
}

/// Any family that the programs are called for; needs no interface to be up.
fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// The program and the map that it writes to, loaded once in a process.
struct Noter {
    program: OwnedFd,
    states: SkStorage<MapData, SocketState>,
}

fn noted_cookie() -> io::Result<u64> {
    static NOTER: OnceLock<Result<Noter, String>> = OnceLock::new();
    let noter = NOTER.get_or_init(load).as_ref().map_err(|error| io::Error::other(error.clone()))?;
    let Attachment { attach_type, .. } = TUNNEL[0];
    let cgroup = File::open(own_cgroup()?)?;
    let link = sys::link_create(noter.program.as_fd(), cgroup.as_fd(), attach_type)?;
    let socket = new_socket()?;
    drop(link);
    match noter.states.get(&socket, 0) {
        Ok(state) if state.netns_cookie != 0 => Ok(state.netns_cookie),
        Ok(_) => Err(io::Error::other("the kernel noted no netns of our own socket")),
        Err(error) => Err(io::Error::other(format!("nothing was noted of our own socket: {error}"))),
    }
}

fn load() -> Result<Noter, String> {
    let Attachment { program: name, .. } = TUNNEL[0];
    let mut object = EbpfLoader::new().load(object::BYTES).map_err(|error| error.to_string())?;
    let Some(Program::CgroupSock(program)) = object.program_mut(name) else {
        unreachable!("program {name} is part of the object that this crate was built with");
    };
    program.load().map_err(|error| error.to_string())?;
    let program = program
        .fd()
        .map_err(|error| error.to_string())?
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| e.to_string())?;
    let Some(Map::SkStorage(states)) = object.take_map("socket_state") else {
        unreachable!("map socket_state is part of the object that this crate was built with");
    };
    let states = SkStorage::try_from(Map::SkStorage(states)).map_err(|error| error.to_string())?;
    Ok(Noter { program, states })
}

/// The cgroup2 directory of this process.
fn own_cgroup() -> io::Result<PathBuf> {
    let unsupported = |what: String| io::Error::new(io::ErrorKind::Unsupported, what);
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .ok_or_else(|| unsupported("this process is in no cgroup v2 directory".to_owned()))?;
    if path.starts_with("/..") {
        return Err(unsupported(format!("this process is in {path}, outside its cgroup namespace")));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    place_of(&mounts, path)
        .ok_or_else(|| unsupported(format!("cgroup {path} is below no mount of cgroup v2")))
}

/// Where the cgroup `path` is to be seen, by the table of mounts (proc_pid_mountinfo(5)).
fn place_of(mounts: &str, path: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut fields = place.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let below = path.strip_prefix(root.trim_end_matches('/'))?;
        let is_below = below.is_empty() || below.starts_with('/');
        (kind.starts_with("cgroup2 ") && is_below)
            .then(|| PathBuf::from(point).join(below.trim_start_matches('/')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_cgroup_is_found_below_whole_and_partial_mounts() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 24 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(place_of(hybrid, "/a/b"), Some(PathBuf::from("/sys/fs/cgroup/unified/a/b")));
        let partial = "31 24 0:27 /kubepods /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        assert_eq!(place_of(partial, "/kubepods/x"), Some(PathBuf::from("/sys/fs/cgroup/x")));
        assert_eq!(place_of(partial, "/kubepods"), Some(PathBuf::from("/sys/fs/cgroup/")));
        assert_eq!(place_of(partial, "/kubepodsx"), None);
        assert_eq!(place_of("", "/"), None);
    }

    #[test]
    #[ignore = "loads eBPF, needs root: make test"]
    fn what_a_program_notes_is_what_a_socket_says() {
        let told = own_netns_cookie().unwrap();
        assert_eq!(noted_cookie().unwrap(), told);
        assert_eq!(noted_cookie().unwrap(), told, "the program was detached in between");
    }
}
