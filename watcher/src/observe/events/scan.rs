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

use super::{Event, EventSource, EventSourceError, EventSourceNeeds, SourceKind};

/// All watches, on one inotify instance: instances are limited per user.
#[derive(Debug)]
pub(crate) struct Scan {
    stream: EventStream<[u8; 4096]>,
    watches: Watches,
    cgroups: BTreeMap<PathBuf, Vec<WatchDescriptor>>,
    dirs: HashMap<WatchDescriptor, PathBuf>,
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
