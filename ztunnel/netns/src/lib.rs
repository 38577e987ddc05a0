//! Network namespaces: which one a descriptor is of, and running code inside one.
//!
//! * [`NetnsId`]: tells one netns from another
//! * [`Netns`]: keeps a netns alive
//! * [`enter`]: runs code inside a netns on the calling thread
//! * [`run_in`]: does the same on a thread of its own
//!
//! All of it needs `CAP_SYS_ADMIN` (setns(2)), but for reading ids.

use std::{
    cell::OnceCell,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::stat::fstat,
};
use serde::{Deserialize, Serialize};

/// The netns of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// Device and inode of a netns' file in nsfs: equal for two descriptors exactly if the netns is the
/// same. Only while something holds the netns: the inode of a deleted one is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NetnsId {
    /// The device of nsfs, the same for every netns.
    pub dev: u64,
    /// The inode, as in `net:[4026531840]`.
    pub inode: u64,
}

impl NetnsId {
    /// The id of the netns that `netns` is a descriptor of.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn of(netns: impl AsFd) -> io::Result<Self> {
        let found = fstat(netns)?;
        Ok(Self { dev: found.st_dev, inode: found.st_ino })
    }
}

/// A netns, kept alive by its descriptor.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    id: NetnsId,
}

impl Netns {
    /// Takes over a descriptor of a netns.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let id = NetnsId::of(&fd)?;
        Ok(Self { fd, id })
    }

    /// The netns of the calling thread.
    ///
    /// # Errors
    /// `/proc` cannot be read, or no descriptors are left.
    pub fn current() -> io::Result<Self> {
        Self::new(File::open(OWN)?.into())
    }

    /// Which one it is.
    #[must_use]
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `work` inside this netns. See [`enter`].
    ///
    /// # Errors
    /// Those of [`enter`].
    pub fn enter<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        enter(self.as_fd(), work)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

thread_local! {
    /// The netns in which this thread was started. Only success is kept: an error may pass.
    static HOME: OnceCell<OwnedFd> = const { OnceCell::new() };
}

/// Opens the way home for the calling thread, from the netns in which it was started. By itself
/// [`enter`] does so the first time; a thread that must be able to enter a netns later, when there
/// may be no descriptors left, does it when it starts.
///
/// # Errors
/// `/proc` cannot be read, or no descriptors are left.
pub fn remember_home() -> io::Result<()> {
    HOME.with(|home| {
        if home.get().is_none() {
            // Cannot be set already: it belongs to this thread.
            let _ = home.set(File::open(OWN)?.into());
        }
        Ok(())
    })
}

/// Runs `work` with the calling thread inside `netns`: what it opens stays there, the thread
/// returns to the netns in which it was started. `work` is not `async`, so that nothing else can
/// run on the thread meanwhile.
///
/// Aborts the process if the thread cannot return. An error instead would leave a thread in the
/// netns of one pod that goes on to work for other pods: it would open their sockets, or write
/// their routes, in the wrong pod. Both programs are made to be killed at any time, so that ending
/// is the smaller harm.
///
/// # Errors
/// `netns` cannot be entered, or those of `work`.
pub fn enter<T>(netns: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    remember_home()?;
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let _home = ReturnHome;
    work()
}

/// Runs `work` inside `netns` on a thread of its own, which ends with it: for work that starts
/// other threads or processes, or that changes what belongs to the thread.
///
/// # Errors
/// `netns` cannot be entered, no thread can be started, `work` panics, or those of `work`.
pub fn run_in<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("in-netns".to_owned()).spawn_scoped(scope, move || {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            work()
        })?;
        worker.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside the netns panicked")))
    })
}

/// Brings the thread home when it is dropped, on panic too.
struct ReturnHome;

impl Drop for ReturnHome {
    fn drop(&mut self) {
        let back = HOME.with(|home| match home.get() {
            Some(fd) => setns(fd, CloneFlags::CLONE_NEWNET).map_err(io::Error::from),
            None => Err(io::Error::other("its own netns is not known")),
        });
        if let Err(error) = back {
            tracing::error!(%error, "cannot return from a pod's netns");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_netns() -> Netns {
        thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
            Netns::current().expect("the new netns")
        })
        .join()
        .expect("the thread")
    }

    #[test]
    #[ignore = "needs root: make test"]
    fn a_panic_inside_a_netns_leaves_the_thread_at_home() {
        let (home, other) = (Netns::current().expect("home"), new_netns());
        assert_ne!(other.id(), home.id());
        let entered = std::panic::catch_unwind(|| {
            other.enter::<()>(|| {
                assert_eq!(Netns::current()?.id(), other.id());
                panic!("on purpose");
            })
        });
        assert!(entered.is_err());
        assert_eq!(Netns::current().expect("home").id(), home.id());
    }

    #[test]
    #[ignore = "needs root: make test"]
    fn a_thread_without_descriptors_enters_once_there_are_some_again() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let other = new_netns();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
        thread::spawn(move || {
            setrlimit(Resource::RLIMIT_NOFILE, 0, hard).expect("limit");
            let without = other.enter(|| Ok(()));
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("limit");
            assert_eq!(without.expect_err("no descriptors").raw_os_error(), Some(24), "EMFILE");
            other.enter(|| Ok(())).expect("descriptors again");
        })
        .join()
        .expect("the thread");
    }

    #[test]
    #[ignore = "needs root: make test"]
    fn a_thread_of_its_own_works_inside_and_its_panic_is_an_error() {
        let (home, other) = (Netns::current().expect("home"), new_netns());
        let inside = run_in(other.as_fd(), || Netns::current().map(|netns| netns.id()));
        assert_eq!(inside.expect("inside"), other.id());
        assert!(run_in::<()>(other.as_fd(), || panic!("on purpose")).is_err());
        assert_eq!(Netns::current().expect("home").id(), home.id());
    }
}
