//! Why the watcher ends.

use std::io;

use adit_ebpf_loader::KernelError;

use crate::{apply::removal::RemoveError, observe::events::NoEventSource};

/// Why the watcher could not start or continue.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A file, socket or signal handler failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// No source of events works.
    #[error(transparent)]
    Events(#[from] NoEventSource),
    /// The source of pods ended.
    #[error("pod source {source_name} stopped unexpectedly: {cause}; restart the watcher")]
    SourceEnded {
        /// What it is called.
        source_name: String,
        /// The panic, most likely.
        cause: String,
    },
    /// A server's task failed.
    #[error("serving {what} stopped unexpectedly: {cause}; restart the watcher")]
    ServerEnded {
        /// Whom it served.
        what: &'static str,
        /// The panic, most likely.
        cause: String,
    },
    /// The kernel refused.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: KernelError,
    },
    /// Not everything could be undone.
    #[error("cannot undo everything")]
    Remove(#[from] RemoveError),
}

/// An [`io::Error`] with what was tried.
pub(crate) fn cannot(what: impl Into<String>) -> impl FnOnce(io::Error) -> AgentError {
    let what = what.into();
    move |source| AgentError::Io { what, source }
}
