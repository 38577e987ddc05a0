//! Follows the routes of pods that exclude interfaces: a change has the pod observed at once.
//!
//! Each such pod has a socket in its netns, which keeps the netns alive. So it goes as soon as the pod
//! cannot be enrolled with that netns any more.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    os::fd::OwnedFd,
    task::{Context, Poll},
};

use tokio::io::unix::AsyncFd;
use tracing::warn;

use crate::{apply::OpenNetns, observe::routes, sys::pollable};

use super::pod_entry::PodEntry;

/// The sockets.
#[derive(Debug, Default)]
pub(super) struct RouteWatch {
    /// By the pod's uid: the cookie of the netns, and the socket.
    sockets: BTreeMap<String, (u64, AsyncFd<OwnedFd>)>,
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
            if let Some(socket) = self.sockets.remove(uid).filter(|(of, _)| *of == cookie) {
                kept.insert(uid.clone(), socket);
            } else if let Some(netns) = opened.get(&cookie) {
                match routes::events(std::os::fd::AsFd::as_fd(&**netns)).and_then(pollable) {
                    Ok(socket) => {
                        kept.insert(uid.clone(), (cookie, socket));
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
        poll_fn(|context| self.poll(context)).await
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<String> {
        for (uid, (_, socket)) in &self.sockets {
            if let Poll::Ready(Ok(mut guard)) = socket.poll_read_ready(context) {
                // Cleared before it is read, so that no change that comes meanwhile is missed.
                guard.clear_ready();
                let mut is_told = false;
                loop {
                    match nix::unistd::read(socket.get_ref(), &mut [0; 8192]) {
                        Ok(length) if length > 0 => is_told = true,
                        // The kernel had more to tell than there was room for.
                        Err(nix::errno::Errno::ENOBUFS) => is_told = true,
                        Err(nix::errno::Errno::EINTR) => {}
                        Ok(_) | Err(_) => break,
                    }
                }
                if is_told {
                    return Poll::Ready(uid.clone());
                }
                // Registers the wake-up anew.
                context.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }
}
