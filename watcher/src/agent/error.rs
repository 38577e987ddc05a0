//! Why the watcher ends.

use std::io;

use adit_ebpf_loader::KernelError;

/// Why the watcher could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("cannot {what}")]
    Io { what: String, source: io::Error },
    #[error("{reason}")]
    Events { reason: String },
    #[error("{source_name} ended, which it never should; restart the watcher")]
    SourceEnded { source_name: String },
    #[error("cannot {what}")]
    Kernel { what: &'static str, source: KernelError },
}

/// Takes part of the blame from an [`io::Error`].
pub(crate) fn cannot(what: impl Into<String>) -> impl FnOnce(io::Error) -> NodeError {
    let what = what.into();
    move |source| NodeError::Io { what, source }
}
