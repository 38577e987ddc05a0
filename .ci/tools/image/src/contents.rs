//! What is in the image.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use tar::{Builder, EntryType, Header};

/// A file of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Whether it may be run.
    pub is_program: bool,
}

/// The files of the image, by their path, which begins with no slash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents(BTreeMap<String, File>);

impl Contents {
    /// Adds a file; `path` is absolute.
    ///
    /// # Errors
    /// The path is no plain absolute one, or there is such a file already.
    pub fn add(&mut self, path: &str, file: File) -> anyhow::Result<()> {
        let inside = path.strip_prefix('/').unwrap_or_default();
        let is_plain = !inside.is_empty() && inside.split('/').all(|part| !["", ".", ".."].contains(&part));
        anyhow::ensure!(
            is_plain,
            "{path}: expected an absolute path of a file, such as /usr/local/bin/watcher"
        );
        anyhow::ensure!(self.0.insert(inside.to_owned(), file).is_none(), "{path} is there twice");
        Ok(())
    }

    /// Writes the files below `folder`, which belongs to nobody else.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn unpack(&self, folder: &Path) -> io::Result<()> {
        for (path, file) in &self.0 {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap_or(folder))?;
            fs::write(&path, &file.bytes)?;
            let mode = if file.is_program { 0o755 } else { 0o644 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    /// The layer, uncompressed: folders before what is in them, sorted, all of root, `modified`
    /// seconds after 1970.
    ///
    /// # Errors
    /// A path is too long.
    pub fn layer(&self, modified: u64) -> io::Result<Vec<u8>> {
        let mut folders = BTreeSet::new();
        for path in self.0.keys() {
            let ends = path.match_indices('/').map(|(end, _)| &path[..=end]);
            folders.extend(ends);
        }
        let mut tar = Builder::new(Vec::new());
        for folder in folders {
            let mut header = header(EntryType::Directory, 0o755, 0, modified);
            tar.append_data(&mut header, folder, io::empty())?;
        }
        for (path, file) in &self.0 {
            let mode = if file.is_program { 0o755 } else { 0o644 };
            let mut header = header(EntryType::Regular, mode, file.bytes.len() as u64, modified);
            tar.append_data(&mut header, path, file.bytes.as_slice())?;
        }
        tar.into_inner()
    }
}

/// Of root, without names of users, which differ from machine to machine.
pub(crate) fn header(kind: EntryType, mode: u32, size: u64, modified: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(modified);
    header.set_uid(0);
    header.set_gid(0);
    header
}
