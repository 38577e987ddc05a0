//! Enters network namespaces and reads their cookies and addresses.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::{self, File},
    io,
    net::{IpAddr, Ipv6Addr},
    ops::ControlFlow,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    thread,
};

use adit_ebpf_loader::{own_netns_cookie, own_netns_cookie_by};
pub(crate) use adit_netns::{NetnsId, run_in};
use procfs::{
    ProcError,
    process::{self, Process},
};
use rayon::{
    ThreadPool, ThreadPoolBuilder,
    iter::{IndexedParallelIterator as _, IntoParallelRefIterator as _, ParallelIterator as _},
};
use rtnetlink::{
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
    },
    sys::{Socket, protocols::NETLINK_ROUTE},
};

use super::{budget, guests, netlink};

const MOST_VISITORS: usize = 4;

/// Properties of a netns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetnsFacts {
    /// Which one it is.
    pub id: NetnsId,
    /// Never reused before a reboot, unlike the inode.
    pub cookie: u64,
    /// Addresses by which others reach it (no loopback, no link-local), as the interfaces list
    /// them.
    pub addresses: Vec<IpAddr>,
    /// IPv4 addresses of the link (169.254.0.0/16), as some network plugins give to pods of IPv6 for
    /// what they dial outside of the cluster.
    pub link_local_v4: Vec<IpAddr>,
    /// The numbers of the interfaces that have these addresses.
    pub devices: BTreeMap<IpAddr, u32>,
    /// What shows that there is a virtual machine, or another netns, behind it: a phrase.
    pub guest: Option<String>,
}

/// The properties of a netns, as far as they are read.
#[derive(Debug)]
pub(crate) struct NetnsReading {
    /// What was read.
    pub facts: NetnsFacts,
    /// Whether it has no more addresses than are read.
    pub is_whole: bool,
}

/// The id of the netns behind the fd `netns`.
///
/// # Errors
/// As of fstat(2).
pub(crate) fn id(netns: BorrowedFd<'_>) -> io::Result<NetnsId> {
    NetnsId::of(netns)
}

/// The netns that are the node's and not a pod's: our own, and that of the first process.
pub(crate) fn host() -> BTreeSet<NetnsId> {
    ["/proc/self/ns/net", "/proc/1/ns/net"]
        .into_iter()
        .filter_map(|path| fs::metadata(path).ok())
        .map(|found| NetnsId { dev: found.dev(), inode: found.ino() })
        .collect()
}

/// Threads that go from netns to netns. A few: entering netns is mostly waiting for the kernel's
/// locks, so more of them would only wait for each other.
#[derive(Debug)]
pub(crate) struct Visitors {
    threads: ThreadPool,
}

impl Visitors {
    /// At home where the calling thread is.
    pub(crate) fn new() -> io::Result<Self> {
        let named = ThreadPoolBuilder::new().thread_name(|number| format!("visitor-{number}"));
        let cores = thread::available_parallelism().map_or(MOST_VISITORS, usize::from);
        let threads = named.num_threads(cores.min(MOST_VISITORS)).build().map_err(io::Error::other)?;
        Ok(Self { threads })
    }

    /// Does `work` for every item and gives the results in the items' order.
    pub(crate) fn visit_each<I: Sync, T: Send>(
        &self,
        items: &[I],
        work: impl Fn(&Visitor, &I) -> T + Sync,
    ) -> Vec<T> {
        if items.is_empty() {
            return Vec::new();
        }
        self.threads
            .install(|| items.par_iter().with_max_len(1).map(|item| work(&Visitor(()), item)).collect())
    }
}

/// What one of these threads can do.
#[derive(Debug)]
pub(crate) struct Visitor(());

impl Visitor {
    /// Runs `work` inside `netns`, then returns home, since a netns lives on while a thread is in
    /// it.
    ///
    /// # Errors
    /// The netns cannot be entered, or those of `work`.
    #[expect(clippy::unused_self, reason = "only a visitor's thread may enter a netns")]
    pub(crate) fn enter<T>(
        &self,
        netns: BorrowedFd<'_>,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        adit_netns::enter(netns, work)
    }
}

/// Enters `netns` and reads its properties, addresses up to [`budget::ADDRESSES`].
///
/// # Errors
/// It cannot be entered (`CAP_SYS_ADMIN`) or queried.
pub(crate) fn facts(visitor: &Visitor, netns: BorrowedFd<'_>) -> io::Result<NetnsReading> {
    let id = id(netns)?;
    visitor.enter(netns, || {
        let socket = netlink::socket(NETLINK_ROUTE)?;
        let cookie = own_netns_cookie_by(socket.as_fd())?;
        let (listed, is_whole) = addresses(&socket, budget::ADDRESSES)?;
        let devices = listed.iter().copied().collect();
        let listed = listed.into_iter().map(|(address, _)| address);
        let (addresses, rest): (Vec<_>, Vec<_>) = listed.partition(is_reachable);
        let link_local_v4 = rest.into_iter().filter(is_link_local_v4).collect();
        // It is only told: what cannot be read keeps nobody out of the mesh.
        let guest = if is_whole { guests::find(&socket).ok().flatten() } else { None };
        Ok(NetnsReading {
            facts: NetnsFacts { id, cookie, addresses, link_local_v4, devices, guest },
            is_whole,
        })
    })
}

/// The cookie of `netns`.
///
/// # Errors
/// It cannot be entered, or the kernel has no cookies (before Linux 5.14).
pub(crate) fn cookie(netns: BorrowedFd<'_>) -> io::Result<u64> {
    run_in(netns, own_netns_cookie)
}

/// Of the first `limit` addresses of `socket`'s netns those of interfaces other than `lo`, with the
/// interfaces' numbers; whether there are no more. Not by getifaddrs(3), which lists all interfaces
/// too and takes three times as long.
fn addresses(socket: &Socket, limit: usize) -> io::Result<(Vec<(IpAddr, u32)>, bool)> {
    let (mut addresses, mut known, mut listed) = (Vec::new(), HashSet::new(), 0);
    let all = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    netlink::dump(socket, all, |answer| {
        listed += 1;
        if listed > limit {
            return ControlFlow::Break(());
        }
        if let RouteNetlinkMessage::NewAddress(message) = answer
            && message.header.index != netlink::LO
            && let Some(address) = ip_of(&message.attributes)
            && known.insert(address)
        {
            addresses.push((address, message.header.index));
        }
        ControlFlow::Continue(())
    })?;
    Ok((addresses, listed <= limit))
}

/// The interface's own end: of a point-to-point link `Address` is the other one.
fn ip_of(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    local.or_else(|| {
        attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}

fn is_reachable(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !is_link_local(v6) && !v6.is_unspecified(),
    }
}

fn is_link_local_v4(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V4(v4) if v4.is_link_local())
}

fn is_link_local(address: &Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

/// Every netns that a process is in or that is mounted somewhere, the node's own excepted. Each is
/// opened only while `visit` looks at it.
///
/// # Errors
/// This process is short of descriptors or memory: there may be more.
pub(crate) fn visit_all(mut visit: impl FnMut(NetnsId, BorrowedFd<'_>)) -> io::Result<()> {
    let mut seen = host();
    visit_mounted(|id, netns| {
        if seen.insert(id) {
            visit(id, netns);
        }
    })?;
    let processes = process::all_processes().map_err(io::Error::other)?.filter_map(Result::ok);
    for process in processes {
        let netns: OwnedFd = match process.open_relative("ns/net") {
            Ok(file) => file.into(),
            Err(ProcError::Io(error, _)) if is_shortage(&error) => return Err(error),
            Err(_) => continue,
        };
        let Ok(id) = id(netns.as_fd()) else { continue };
        if seen.insert(id) {
            visit(id, netns.as_fd());
        }
    }
    Ok(())
}

/// Every netns that is mounted somewhere, maybe more than once. Costs no look at any process.
///
/// # Errors
/// As of [`visit_all`].
pub(crate) fn visit_mounted(mut visit: impl FnMut(NetnsId, BorrowedFd<'_>)) -> io::Result<()> {
    let mounts = Process::myself().and_then(|own| own.mountinfo()).map_err(io::Error::other)?;
    for mount in mounts.into_iter().filter(|mount| mount.root.starts_with("net:[")) {
        let netns: OwnedFd = match File::open(mount.mount_point) {
            Ok(file) => file.into(),
            Err(error) if is_shortage(&error) => return Err(error),
            Err(_) => continue,
        };
        if let Ok(id) = id(netns.as_fd()) {
            visit(id, netns.as_fd());
        }
    }
    Ok(())
}

/// Whether it says nothing of what was to be opened.
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_local_and_loopback_are_not_reachable() {
        for (text, reachable) in [
            ("10.0.0.1", true),
            ("127.0.0.2", false),
            ("169.254.1.1", false),
            ("fd00::1", true),
            ("fe80::1", false),
            ("febf::1", false),
            ("fec0::1", true),
            ("::1", false),
        ] {
            assert_eq!(is_reachable(&text.parse().unwrap()), reachable, "{text}");
        }
    }

    #[test]
    #[ignore = "makes a netns, needs root: make test"]
    fn the_addresses_are_those_of_the_interfaces_own_ends() {
        let netns = thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
            for line in [
                "link set lo up",
                "addr add 10.9.9.9/32 dev lo",
                "link add e0 type veth peer name e1",
                "addr add 10.1.0.2/24 dev e0",
                "addr add 10.2.0.2 peer 10.2.0.9 dev e0",
                "addr add fd01::2/64 dev e1 nodad",
                "link set e0 up",
            ] {
                let done = std::process::Command::new("ip").args(line.split(' ')).status()?;
                assert!(done.success(), "{line}");
            }
            File::open("/proc/thread-self/ns/net")
        });
        let netns = netns.join().unwrap().unwrap();
        // On a thread of its own, which ends where it was sent.
        let read =
            |limit| run_in(netns.as_fd(), || addresses(&netlink::socket(NETLINK_ROUTE)?, limit)).unwrap();
        let (listed, is_whole) = read(budget::ADDRESSES);
        assert!(is_whole);
        let mut addresses: Vec<_> =
            listed.into_iter().map(|(address, _)| address).filter(is_reachable).collect();
        addresses.sort_unstable();
        let expected: Vec<IpAddr> =
            ["10.1.0.2", "10.2.0.2", "fd01::2"].iter().map(|ip| ip.parse().unwrap()).collect();
        assert_eq!(addresses, expected);
        let (few, is_whole) = read(4);
        assert!(!is_whole && few.len() < 4, "{few:?}");
    }

    #[test]
    fn the_own_netns_counts_as_the_hosts() {
        let own = File::open("/proc/self/ns/net").unwrap();
        assert!(host().contains(&id(own.as_fd()).unwrap()));
    }
}
