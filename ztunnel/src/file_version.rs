//! Detects a changed file without reading it.

use std::{os::unix::fs::MetadataExt, path::Path, time::SystemTime};

/// Modification time, size and inode of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FileVersion {
    modified: Option<SystemTime>,
    size: u64,
    inode: u64,
}

impl FileVersion {
    /// Of the file at `path`, following links. `None`: it does not exist or cannot be accessed.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let file = std::fs::metadata(path).ok()?;
        Some(Self { modified: file.modified().ok(), size: file.len(), inode: file.ino() })
    }
}
