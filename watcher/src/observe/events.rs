//! What changed, as soon as it does. Whatever the source, an event says no more than where to look: it can make
//! things faster, and a lost one costs time until the next scan, nothing else.
//!
//! * [`lifecycle`]: the kernel's tracepoints, by our own programs; works in any container, and closes a new pod
//!   before its cgroup can hold a process
//! * [`connector`]: the kernel's process connector, where no program can be attached to tracepoints
//! * [`scan`]: inotify on the pods' cgroups, which is there everywhere

use std::{
    collections::BTreeSet,
    future::poll_fn,
    path::{Path, PathBuf},
    task::{Context, Poll},
};

use adit_ebpf_loader::Kernel;
use futures_util::FutureExt as _;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

pub mod connector;
pub mod lifecycle;
pub mod scan;

/// What a source is called in logs, in `watcher status` and on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// BPF programs on the kernel's tracepoints
    Lifecycle,
    /// The kernel's process connector, and inotify on cgroups
    Connector,
    /// Inotify on cgroups
    Scan,
}

impl SourceKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lifecycle => "lifecycle",
            Self::Connector => "connector",
            Self::Scan => "scan",
        }
    }
}

/// Where to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something happened to this cgroup. `closed`: its id, if it was closed as it was made.
    Cgroup { path: PathBuf, closed: Option<u64> },
    /// A process of this cgroup began another program.
    Process { cgroup_id: u64 },
    /// So many events were lost: everything has to be looked at.
    Lost(u64),
}

/// A source of events.
pub trait EventSource: Send {
    fn kind(&self) -> SourceKind;

    /// The next event.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Event>;

    /// The directories whose changes matter, for a source that has to be told.
    fn watch(&mut self, _dirs: &BTreeSet<PathBuf>) {}

    /// Whether it has to be told.
    fn wants_dirs(&self) -> bool {
        false
    }
}

impl std::fmt::Debug for dyn EventSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kind().as_str())
    }
}

/// Resolves with the next event of `source`.
pub async fn next(source: &mut dyn EventSource) -> Event {
    poll_fn(|context| source.poll_next(context)).await
}

/// As [`next`], if there is one now.
pub fn ready(source: &mut dyn EventSource) -> Option<Event> {
    next(source).now_or_never()
}

/// Opens the source `forced`, or the best that works here.
///
/// # Errors
/// The forced one does not work, or not even inotify does.
pub fn open(
    forced: Option<SourceKind>,
    kernel: &mut Kernel,
    base: &Path,
    cgroup_root: &Path,
) -> Result<Box<dyn EventSource>, String> {
    let kinds = match forced {
        Some(kind) => vec![kind],
        None => vec![SourceKind::Lifecycle, SourceKind::Connector, SourceKind::Scan],
    };
    let mut last = String::new();
    for kind in kinds {
        let opened: Result<Box<dyn EventSource>, String> = match kind {
            SourceKind::Lifecycle => {
                lifecycle::LifecycleSource::open(kernel, base).map(|source| Box::new(source) as _)
            }
            SourceKind::Connector => {
                connector::Connector::open(base, cgroup_root).map(|source| Box::new(source) as _)
            }
            SourceKind::Scan => scan::Scan::new()
                .map(|source| Box::new(source) as _)
                .map_err(|error| format!("cannot make an inotify instance: {error}")),
        };
        match opened {
            Ok(source) => {
                info!(source = kind.as_str(), "events");
                return Ok(source);
            }
            Err(reason) => {
                warn!(source = kind.as_str(), reason, "source of events not available");
                last = format!("events from {} are not available: {reason}", kind.as_str());
            }
        }
    }
    Err(last)
}
