//! Follows the routes of pods that exclude interfaces: a change has the pod observed at once.
//!
//! Each such pod has a socket in its netns, which keeps the netns alive. So it goes as soon as the pod
//! cannot be enrolled with that netns any more.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::poll_fn,
    ops::Bound,
    os::fd::OwnedFd,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::io::unix::AsyncFd;
use tracing::warn;

use crate::{apply::OpenNetns, observe::routes, sys::pollable};

use super::pod_entry::PodEntry;

/// A pod whose routes change all the time is told as often as this.
const PAUSE: Duration = Duration::from_millis(500);
/// How many messages are read at once: some more than there is room for.
const READS: usize = 512;

/// The sockets.
#[derive(Debug, Default)]
pub(super) struct RouteWatch {
    /// By the pod's uid.
    sockets: BTreeMap<String, Watched>,
    /// The pod that was told last: the one after it is asked first.
    last: RefCell<String>,
}

/// The socket of a pod.
#[derive(Debug)]
struct Watched {
    /// The cookie of its netns.
    cookie: u64,
    socket: AsyncFd<OwnedFd>,
    /// Until when it is not asked.
    paused: Cell<Option<Instant>>,
    /// Whether the last look has left messages: the kernel tells nothing of those again.
    has_more: Cell<bool>,
}

impl RouteWatch {
    /// Follows those of `pods` that exclude interfaces, of whose netns `opened` has those that are open,
    /// and no others. The pods that are new: what changed before that nobody has told.
    pub(super) fn set<'a>(
        &mut self,
        pods: impl Iterator<Item = &'a PodEntry>,
        opened: &OpenNetns,
    ) -> Vec<String> {
        let (mut kept, mut new) = (BTreeMap::new(), Vec::new());
        for entry in pods.filter(|entry| !entry.view.pod.exclusions.interfaces.is_empty()) {
            let uid = &entry.view.pod.uid;
            let Some(cookie) = entry.view.eligibility.facts().map(|facts| facts.cookie) else { continue };
            if let Some(socket) = self.sockets.remove(uid).filter(|watched| watched.cookie == cookie) {
                kept.insert(uid.clone(), socket);
            } else if let Some(netns) = opened.get(&cookie) {
                match routes::events(std::os::fd::AsFd::as_fd(&**netns)).and_then(pollable) {
                    Ok(socket) => {
                        kept.insert(
                            uid.clone(),
                            Watched { cookie, socket, paused: Cell::new(None), has_more: Cell::new(false) },
                        );
                        new.push(uid.clone());
                    }
                    Err(error) => {
                        warn!(uid, %error, "cannot follow the pod's routes; the scan finds changes");
                    }
                }
            }
        }
        self.sockets = kept;
        new
    }

    /// Resolves with a pod whose routes or interfaces have changed.
    pub(super) async fn changed(&self) -> String {
        loop {
            let now = Instant::now();
            let resumed = self.sockets.values().filter_map(|watched| watched.paused.get()).min();
            let resumed = resumed.map(|at| at.max(now));
            let pause_ends = async {
                match resumed {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                uid = poll_fn(|context| self.poll(context)) => return uid,
                () = pause_ends => {
                    let now = Instant::now();
                    for watched in self.sockets.values() {
                        watched.paused.set(watched.paused.get().filter(|until| *until > now));
                    }
                }
            }
        }
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<String> {
        let last = self.last.borrow().clone();
        let after = self.sockets.range::<String, _>((Bound::Excluded(&last), Bound::Unbounded));
        let before = self.sockets.range::<String, _>((Bound::Unbounded, Bound::Included(&last)));
        for (uid, watched) in after.chain(before).filter(|(_, watched)| watched.paused.get().is_none()) {
            let socket = &watched.socket;
            let ready = socket.poll_read_ready(context);
            if let Poll::Ready(Ok(mut guard)) = ready {
                // Cleared before it is read, so that no change that comes meanwhile is missed.
                guard.clear_ready();
                watched.has_more.set(true);
            }
            if watched.has_more.get() {
                let (mut is_told, mut is_empty) = (false, false);
                for _ in 0..READS {
                    match nix::unistd::read(socket.get_ref(), &mut [0; 8192]) {
                        Ok(length) if length > 0 => is_told = true,
                        // The kernel had more to tell than there was room for.
                        Err(nix::errno::Errno::ENOBUFS) => is_told = true,
                        Err(nix::errno::Errno::EINTR) => {}
                        Ok(_) | Err(_) => {
                            is_empty = true;
                            break;
                        }
                    }
                }
                watched.has_more.set(!is_empty);
                if is_told {
                    watched.paused.set(Some(Instant::now() + PAUSE));
                    self.last.replace(uid.clone());
                    return Poll::Ready(uid.clone());
                }
                // Registers the wake-up anew.
                context.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }
}
