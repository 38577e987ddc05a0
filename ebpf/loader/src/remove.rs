//! Removes everything again.

use std::{fs, io, path::Path};

use crate::{Kernel, KernelError, links, maps};

/// What [`Kernel::remove`] found and removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many links were detached.
    pub links: usize,
    /// How many maps were unpinned.
    pub maps: usize,
}

impl Kernel {
    /// Detaches and unpins everything under `pins`; what it removed. Fine when nothing is there.
    /// Needs no program load, so it also cleans up after another version. Programs and maps go when
    /// the last process that holds them ends.
    ///
    /// # Errors
    /// A pin cannot be opened, detached or removed.
    pub fn remove(pins: &Path) -> Result<Removed, KernelError> {
        let (links_dir, maps_dir) = (links::folder(pins), maps::folder(pins));
        let removed = Removed { links: links::remove_all(&links_dir)?, maps: maps::remove_all(&maps_dir)? };
        for dir in [&*links_dir, &*maps_dir, pins] {
            match fs::remove_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(KernelError::pin("remove", dir)(error));
                }
                _ => (),
            }
        }
        // The folder above may be shared by nodes of one kernel, or be the mount itself.
        if let Some(parent) = pins.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(removed)
    }
}
