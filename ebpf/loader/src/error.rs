//! What the kernel refuses, with what was tried and what helps.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

/// Why something in the kernel could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant names its fields")]
pub enum KernelError {
    /// Pins need a bpffs, which is not where they should go.
    #[error("{} is not on a mounted bpffs; `mount -t bpf bpf /sys/fs/bpf` makes one", path.display())]
    NoBpffs { path: PathBuf },
    /// A pin or its folder cannot be made, read or removed.
    #[error("cannot {action} {}", path.display())]
    Pin { action: &'static str, path: PathBuf, source: io::Error },
    /// The object as a whole is refused.
    #[error("cannot create the maps and read the programs; `watcher preflight` says what the kernel lacks")]
    Object { source: Box<EbpfError> },
    /// The verifier refuses a program, or it cannot be attached to its tracepoint.
    #[error("the kernel refuses program {program}; `watcher preflight` says what it lacks")]
    Load { program: &'static str, source: Box<ProgramError> },
    /// The program that steers arrivals cannot be made from the object.
    #[error("cannot prepare the program that steers arrivals in netns")]
    NetnsProgram { source: io::Error },
    /// A cgroup is gone, or the path names none.
    #[error("{} is not a cgroup v2 directory that can be opened", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    /// Somebody else's program, attached without BPF_F_ALLOW_MULTI, forbids every other one below
    /// it.
    #[error("cannot attach {program} to {}: {culprit} stands in the way", target.display())]
    Forbidden { program: &'static str, target: PathBuf, culprit: String, source: io::Error },
    /// A link cannot be made or changed.
    #[error("cannot attach {program} to {}", target.display())]
    Attach { program: &'static str, target: PathBuf, source: io::Error },
    /// A lifecycle program cannot be attached to its tracepoint.
    #[error("cannot attach to {}", target.display())]
    Tracepoint { target: PathBuf, source: io::Error },
    /// The lifecycle programs are attached, but did not report a cgroup of our own.
    #[error("the kernel reports no event of a cgroup made below {}", path.display())]
    Silent { path: PathBuf },
    /// A later version, or something else, left a map that this version cannot use, and whose
    /// contents nobody can copy.
    #[error(
        "{} is not of this version, and map {map} cannot be made anew while a tunnel's listeners are in it; run the version that made it, or `watcher uninstall` of this one, and restart the tunnel", path.display()
    )]
    OtherVersion { map: &'static str, path: PathBuf },
    /// The kernel does not say which maps the attached programs use.
    #[error("cannot tell which maps the attached programs use")]
    Programs { source: io::Error },
    /// A map cannot be opened, read or written.
    #[error("cannot {action} map {map}")]
    Map { action: &'static str, map: &'static str, source: Box<MapError> },
}

impl KernelError {
    pub(crate) fn map(action: &'static str, map: &'static str) -> impl FnOnce(MapError) -> Self {
        move |source| Self::Map { action, map, source: Box::new(source) }
    }

    pub(crate) fn pin(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Pin { action, path: path.into(), source }
    }
}
