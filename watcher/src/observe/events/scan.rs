//! Events from inotify on the pods' cgroups. A watch that cannot be added costs time until the next
//! scan.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    path::PathBuf,
    task::{Context, Poll, ready},
};

use futures_util::StreamExt as _;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};

use crate::observe::cgroups::{self, CgroupId};

use super::{Event, EventSource, EventSourceError, EventSourceNeeds, SourceKind};

/// All watches, on one inotify instance: instances are limited per user.
#[derive(Debug)]
pub(crate) struct Scan {
    stream: EventStream<[u8; 4096]>,
    watches: Watches,
    cgroups: BTreeMap<PathBuf, Watched>,
    dirs: HashMap<WatchDescriptor, PathBuf>,
}

/// A directory's watches. One that is removed keeps them, and tells nothing more; another one may be
/// made under the same path.
#[derive(Debug)]
struct Watched {
    id: CgroupId,
    watches: Vec<WatchDescriptor>,
}

impl Scan {
    /// Without watches at first.
    ///
    /// # Errors
    /// The user has no inotify instance left.
    pub(crate) fn new() -> io::Result<Self> {
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
    fn watch_cgroups(&mut self, wanted: &BTreeSet<PathBuf>) {
        let mut before = std::mem::take(&mut self.cgroups);
        for dir in wanted {
            let Ok(id) = cgroups::id(dir) else { continue };
            let same = before.remove_entry(dir).and_then(|(path, watched)| {
                if watched.id == id {
                    return Some(watched.watches);
                }
                before.insert(path, watched);
                None
            });
            let watches = same.unwrap_or_else(|| {
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
                self.cgroups.insert(dir.clone(), Watched { id, watches });
            }
        }
        for watch in before.into_values().flat_map(|watched| watched.watches) {
            self.dirs.remove(&watch);
            // Fails if the directory is gone, and the watch with it.
            let _ = self.watches.remove(watch);
        }
    }

    fn path(&self, event: &inotify::EventOwned) -> Option<PathBuf> {
        if event.mask.contains(EventMask::IGNORED) {
            return None;
        }
        let dir = self.dirs.get(&event.wd)?;
        Some(event.name.as_ref().map_or_else(|| dir.clone(), |name| dir.join(name)))
    }
}

impl EventSource for Scan {
    fn probe() -> Result<(), EventSourceError> {
        Inotify::init().map(drop).map_err(EventSourceError::Inotify)
    }

    fn open(_needs: &mut EventSourceNeeds<'_>) -> Result<Self, EventSourceError> {
        Self::new().map_err(EventSourceError::Inotify)
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Scan
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        loop {
            match ready!(self.stream.poll_next_unpin(context)) {
                Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => {
                    return Poll::Ready(Event::Lost(1));
                }
                Some(Ok(event)) => {
                    if let Some(path) = self.path(&event) {
                        return Poll::Ready(Event::Cgroup { path, closed: None });
                    }
                }
                Some(Err(_)) | None => return Poll::Pending,
            }
        }
    }

    /// Watches exactly `dirs`, and whether processes are in them.
    fn watch(&mut self, dirs: &BTreeSet<PathBuf>) {
        self.watch_cgroups(dirs);
    }

    fn wants_dirs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use testbed::cgroup::Cgroup;

    use super::*;

    #[tokio::test]
    #[ignore = "makes cgroups, needs root: make test"]
    async fn a_cgroup_that_was_made_again_is_watched_again() {
        let cgroup = Cgroup::new(&format!("adit-scan-{}", std::process::id()));
        let dir = cgroup.create("pod");
        let mut scan = Scan::new().unwrap();
        let wanted: BTreeSet<PathBuf> = [dir.clone()].into();
        scan.watch_cgroups(&wanted);
        fs::remove_dir(&dir).unwrap();
        fs::create_dir(&dir).unwrap();
        scan.watch_cgroups(&wanted);
        fs::create_dir(dir.join("container")).unwrap();
        let told = async {
            loop {
                let event = std::future::poll_fn(|context| scan.poll_next(context)).await;
                if matches!(&event, Event::Cgroup { path, .. } if *path == dir.join("container")) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), told).await.expect("an event of the new directory");
        fs::remove_dir(dir.join("container")).unwrap();
    }
}
