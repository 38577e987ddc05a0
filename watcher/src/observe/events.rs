//! Sources of events about cgroups and processes. An event only names what to observe again: it
//! makes the watcher faster, and a lost one costs time until the next scan, nothing else.
//!
//! * `lifecycle`: our programs on the kernel's tracepoints; works in any container, and closes a
//!   new pod before its cgroup can hold a process
//! * `connector`: the kernel's process connector, where programs cannot be attached to tracepoints
//! * `scan`: inotify on the pods' cgroups, available everywhere

use std::{
    collections::BTreeSet,
    future::poll_fn,
    io,
    path::{Path, PathBuf},
    task::{Context, Poll},
};

use adit_ebpf_loader::{Kernel, KernelError};
use error_reporter::Report;
use futures_util::FutureExt as _;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use self::{connector::Connector, lifecycle::LifecycleSource, scan::Scan};

pub(crate) mod connector;
pub(crate) mod lifecycle;
pub(crate) mod scan;

/// A source of events, as named in logs, in `watcher status` and on the command line.
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
    /// As on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lifecycle => "lifecycle",
            Self::Connector => "connector",
            Self::Scan => "scan",
        }
    }

    /// Whether this source would work here, as far as that shows without a change to the node.
    ///
    /// # Errors
    /// Why it would not work.
    pub fn probe(self) -> Result<(), EventSourceError> {
        match self {
            Self::Lifecycle => LifecycleSource::probe(),
            Self::Connector => Connector::probe(),
            Self::Scan => Scan::probe(),
        }
    }

    fn open(self, needs: &mut EventSourceNeeds<'_>) -> Result<Box<dyn EventSource>, EventSourceError> {
        Ok(match self {
            Self::Lifecycle => Box::new(LifecycleSource::open(needs)?),
            Self::Connector => Box::new(Connector::open(needs)?),
            Self::Scan => Box::new(Scan::open(needs)?),
        })
    }
}

/// Why a source of events cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EventSourceError {
    /// Linux limits inotify instances per user.
    #[error(
        "cannot create an inotify instance; raise the sysctl fs.inotify.max_user_instances if it is exhausted"
    )]
    Inotify(#[source] io::Error),
    /// The programs could not be attached to the tracepoints.
    #[error("cannot attach the lifecycle programs")]
    Attach(#[source] KernelError),
    /// The runtime cannot wait for the programs' ring buffer.
    #[error("cannot wait for the ring buffer")]
    RingBuffer(#[source] io::Error),
    /// The process connector could not be set up.
    #[error("cannot {action}")]
    Connector {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The process connector accepts the request and stays silent.
    #[error(
        "the kernel does not acknowledge LISTEN; it does so only in the initial network, pid and user namespace"
    )]
    NotAcknowledged(#[source] io::Error),
}

/// A source of events is not available, and none that could take its place.
#[derive(Debug, thiserror::Error)]
#[error("events from {} are not available", .kind.as_str())]
pub struct NoEventSource {
    /// The last one that was tried.
    pub kind: SourceKind,
    /// Why it cannot be used.
    pub source: EventSourceError,
}

/// What sources of events are opened with.
#[derive(Debug)]
pub struct EventSourceNeeds<'a> {
    /// The loaded programs.
    pub kernel: &'a mut Kernel,
    /// The cgroup above all pods.
    pub base: &'a Path,
    /// Where cgroup2 is mounted.
    pub cgroup_root: &'a Path,
}

/// What to observe again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// This cgroup was created or changed.
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// Its id, if the programs closed it when it was created, or when its last process went.
        closed: Option<u64>,
    },
    /// A process of this cgroup called exec.
    Process {
        /// The cgroup's id.
        cgroup_id: u64,
    },
    /// A process of this pod wants a port that is the tunnel's in the pod's netns.
    WantsPort {
        /// The id of the pod's cgroup.
        cgroup_id: u64,
    },
    /// So many events were lost: everything must be observed again.
    Lost(u64),
}

/// A source of events.
pub trait EventSource: Send {
    /// Whether it would work here, as far as that shows without a change to the node.
    ///
    /// # Errors
    /// Why it would not work.
    fn probe() -> Result<(), EventSourceError>
    where
        Self: Sized;

    /// Begins to collect events.
    ///
    /// # Errors
    /// Why it does not work here.
    fn open(needs: &mut EventSourceNeeds<'_>) -> Result<Self, EventSourceError>
    where
        Self: Sized;

    /// Which source it is.
    fn kind(&self) -> SourceKind;

    /// The next event.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Event>;

    /// Sets the directories whose changes matter, for a source that needs them.
    fn watch(&mut self, _dirs: &BTreeSet<PathBuf>) {}

    /// Whether it needs them.
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
///
/// # Panics
/// Never: at least one kind is tried, and each either opens or says why not.
pub fn open(
    forced: Option<SourceKind>,
    kernel: &mut Kernel,
    base: &Path,
    cgroup_root: &Path,
) -> Result<Box<dyn EventSource>, NoEventSource> {
    static BY_PREFERENCE: [SourceKind; 3] = [SourceKind::Lifecycle, SourceKind::Connector, SourceKind::Scan];
    let forced = forced.map(|kind| [kind]);
    let kinds = forced.as_ref().map_or(BY_PREFERENCE.as_slice(), <[SourceKind; 1]>::as_slice);
    let mut needs = EventSourceNeeds { kernel, base, cgroup_root };
    let mut failed = None;
    for &kind in kinds {
        match kind.open(&mut needs) {
            Ok(source) => {
                info!(source = kind.as_str(), "event source opened");
                return Ok(source);
            }
            Err(error) => {
                warn!(source = kind.as_str(), error = %Report::new(&error), "event source not available");
                failed = Some(NoEventSource { kind, source: error });
            }
        }
    }
    Err(failed.expect("at least one kind was tried"))
}
