//! File systems that are mounted for as long as a guard lives.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted file system, unmounted on drop.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// A private bpffs. What is still pinned in it at the end goes with it.
    pub fn bpffs(at: &Path) -> Self {
        Self::new("bpf", at, None)
    }

    /// A file system in memory, as `/run` of a node is.
    pub fn tmpfs(at: &Path) -> Self {
        Self::new("tmpfs", at, None)
    }

    /// The kernel's tracefs, which is the same wherever it is mounted.
    pub fn tracefs(at: &Path) -> Self {
        Self::new("tracefs", at, None)
    }

    /// A file system in memory that has room for so many `bytes`.
    pub fn small_tmpfs(at: &Path, bytes: usize) -> Self {
        Self::new("tmpfs", at, Some(&format!("size={bytes}")))
    }

    fn new(kind: &str, at: &Path, options: Option<&str>) -> Self {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), options)
            .unwrap_or_else(|error| panic!("mounting {kind} at {}: {error}", at.display()));
        Self(at.to_owned())
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Detached: a program that is just ending may still have its log open here.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
