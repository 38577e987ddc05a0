//! What tells two versions of a file apart without reading them.

use std::{os::unix::fs::MetadataExt, path::Path, time::SystemTime};

#[derive(Debug, PartialEq, Eq)]
pub struct FileVersion {
    modified: Option<SystemTime>,
    size: u64,
    inode: u64,
}

impl FileVersion {
    /// `None`: there is no such file.
    pub fn of(path: &Path) -> Option<Self> {
        let file = std::fs::metadata(path).ok()?;
        Some(Self { modified: file.modified().ok(), size: file.len(), inode: file.ino() })
    }
}
