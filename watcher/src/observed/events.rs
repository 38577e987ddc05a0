//! What changed, as soon as it does: inotify on the pods file's directory and on the pods' cgroups.
//!
//! Only *that* something changed is told. A watch that cannot be placed, or an overflowing queue, costs
//! time until the next scan, nothing else.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
};

use futures_util::StreamExt as _;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};

/// What an event was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    PodsFile,
    Cgroups,
}

/// All watches of the watcher, on one inotify instance (a node has few of them).
#[derive(Debug)]
pub struct Events {
    stream: EventStream<[u8; 4096]>,
    watches: Watches,
    pods_file: PathBuf,
    pods_dir: WatchDescriptor,
    cgroups: BTreeMap<PathBuf, Vec<WatchDescriptor>>,
}

impl Events {
    /// Watches the directory of `pods_file`, so that a file moved into place is seen as well.
    pub fn new(pods_file: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let mut watches = inotify.watches();
        let dir = match pods_file.parent() {
            Some(dir) if dir != Path::new("") => dir,
            _ => Path::new("."),
        };
        // Not on each write: a file half written may well parse, with half of the pods.
        // ConfigMap volumes change by a symlink that is moved, hence any name in the directory counts.
        let mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::CREATE;
        let pods_dir = watches.add(dir, mask)?;
        let stream = inotify.into_event_stream([0; 4096])?;
        Ok(Self { stream, watches, pods_file: pods_file.to_owned(), pods_dir, cgroups: BTreeMap::new() })
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
            if !watches.is_empty() {
                self.cgroups.insert(dir.clone(), watches);
            }
        }
        for watch in before.into_values().flatten() {
            // Fails where the directory is gone, and the watch with it.
            let _ = self.watches.remove(watch);
        }
    }

    /// The next change.
    pub async fn next(&mut self) -> Change {
        loop {
            match self.stream.next().await {
                Some(Ok(event)) if event.wd == self.pods_dir => {
                    let about_file = event.name.as_deref().is_none_or(|name| self.concerns_file(name));
                    if about_file {
                        return Change::PodsFile;
                    }
                }
                Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => return Change::PodsFile,
                Some(Ok(event)) if event.mask.contains(EventMask::IGNORED) => {}
                Some(Ok(_)) => return Change::Cgroups,
                Some(Err(_)) | None => std::future::pending().await,
            }
        }
    }

    fn concerns_file(&self, name: &OsStr) -> bool {
        self.pods_file.file_name().is_none_or(|file| file == name) || name == "..data"
    }
}
