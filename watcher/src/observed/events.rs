//! What changed, as soon as it does: inotify on the pods' cgroups.
//!
//! Only *that* something changed is told. A watch that cannot be placed, or an overflowing queue, costs
//! time until the next scan, nothing else.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::PathBuf,
};

use futures_util::{FutureExt as _, StreamExt as _};
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};

/// All watches of the watcher, on one inotify instance (a node has few of them).
#[derive(Debug)]
pub struct Events {
    stream: EventStream<[u8; 4096]>,
    watches: Watches,
    cgroups: BTreeMap<PathBuf, Vec<WatchDescriptor>>,
    dirs: HashMap<WatchDescriptor, PathBuf>,
}

impl Events {
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let watches = inotify.watches();
        Ok(Self {
            stream: inotify.into_event_stream([0; 4096])?,
            watches,
            cgroups: BTreeMap::new(),
            dirs: HashMap::new(),
        })
    }

    /// Watches exactly `wanted` cgroup directories, and whether processes are in them.
    pub fn watch_cgroups<'a>(&mut self, wanted: impl IntoIterator<Item = &'a PathBuf>) {
        let mut before = std::mem::take(&mut self.cgroups);
        for dir in wanted {
            let watches = before.remove(dir).unwrap_or_else(|| {
                let mask =
                    WatchMask::CREATE | WatchMask::DELETE | WatchMask::DELETE_SELF | WatchMask::ONLYDIR;
                // `cgroup.events` changes when the first process comes and when the last one goes.
                [(dir.clone(), mask), (dir.join("cgroup.events"), WatchMask::MODIFY)]
                    .into_iter()
                    .filter_map(|(path, mask)| self.watches.add(path, mask).ok())
                    .collect()
            });
            self.dirs.extend(watches.iter().map(|watch| (watch.clone(), dir.clone())));
            if !watches.is_empty() {
                self.cgroups.insert(dir.clone(), watches);
            }
        }
        for watch in before.into_values().flatten() {
            self.dirs.remove(&watch);
            // Fails where the directory is gone, and the watch with it.
            let _ = self.watches.remove(watch);
        }
    }

    /// The next cgroup in which something changed.
    pub async fn next(&mut self) -> PathBuf {
        loop {
            match self.stream.next().await {
                Some(Ok(event)) => {
                    if let Some(path) = self.path(&event) {
                        return path;
                    }
                }
                Some(Err(_)) | None => std::future::pending().await,
            }
        }
    }

    /// As [`Self::next`], if there is one now.
    pub fn ready(&mut self) -> Option<PathBuf> {
        self.next().now_or_never()
    }

    fn path(&self, event: &inotify::EventOwned) -> Option<PathBuf> {
        if event.mask.contains(EventMask::IGNORED) {
            return None;
        }
        let dir = self.dirs.get(&event.wd)?;
        Some(event.name.as_ref().map_or_else(|| dir.clone(), |name| dir.join(name)))
    }
}
