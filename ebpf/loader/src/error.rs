//! What can go wrong between us and the kernel.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("{} is not on a mounted bpffs; `mount -t bpf bpf /sys/fs/bpf` makes one", path.display())]
    NoBpffs { path: PathBuf },
    #[error("cannot {action} {}", path.display())]
    Pin { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot create the maps and read the programs; `watcher preflight` says what the kernel lacks")]
    Object { source: Box<EbpfError> },
    #[error("the kernel refuses program {program}; `watcher preflight` says what it lacks")]
    Load { program: &'static str, source: Box<ProgramError> },
    #[error("{} is no cgroup v2 directory that can be opened", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    /// A program that was attached without BPF_F_ALLOW_MULTI forbids every other one below it.
    #[error("cannot attach {program} to {}: {culprit} stands in the way", target.display())]
    Forbidden { program: &'static str, target: PathBuf, culprit: String, source: io::Error },
    #[error("cannot attach {program} to {}", target.display())]
    Attach { program: &'static str, target: PathBuf, source: io::Error },
    #[error("the kernel tells nothing of a cgroup made below {}", path.display())]
    Silent { path: PathBuf },
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
