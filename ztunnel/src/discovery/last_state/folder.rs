//! The folder of last states. Each process writes files of its own there and holds a lock on them
//! as long as it lives; it reads those of others, and removes them once they are nobody's.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    thread,
    time::SystemTime,
};

use nix::{
    fcntl::{Flock, FlockArg, OFlag},
    unistd::Uid,
};

const PREFIX: &str = "xds-";
/// A state that others may use.
const WHOLE: &str = "state";
/// One that is being written.
const NEW: &str = "new";

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnusableFolder {
    #[error("cannot create the folder {}", path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot read the folder {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// What others can write says nothing about policies.
    #[error(
        "the folder {} belongs to user {owner} with mode {mode:03o}; it must belong to user {user}, and nobody \
         else may write there",
        path.display()
    )]
    NotPrivate { path: PathBuf, owner: u32, mode: u32, user: u32 },
}

/// A folder that nobody else can write to.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// Creates it if it is not there. Nobody else can read it afterwards.
    pub(super) fn open(path: &Path) -> Result<Self, UnusableFolder> {
        let path = path.to_owned();
        if let Err(source) = DirBuilder::new().recursive(true).mode(0o700).create(&path) {
            return Err(UnusableFolder::Create { path, source });
        }
        let found = match fs::metadata(&path) {
            Ok(found) => found,
            Err(source) => return Err(UnusableFolder::Read { path, source }),
        };
        let (owner, mode, user) = (found.uid(), found.mode() & 0o777, Uid::effective().as_raw());
        // The kubelet makes it readable for everybody.
        let closed = || fs::set_permissions(&path, Permissions::from_mode(0o700)).is_ok();
        if owner != user || (mode != 0o700 && !closed() && mode & 0o022 != 0) {
            return Err(UnusableFolder::NotPrivate { path, owner, mode, user });
        }
        Ok(Self(path))
    }

    /// The states that others have kept, the one that was written last first.
    pub(super) fn states(&self) -> io::Result<Vec<PathBuf>> {
        let mut states: Vec<(SystemTime, PathBuf)> = Vec::new();
        for path in
            self.files()?.into_iter().filter(|path| path.extension().is_some_and(|kind| kind == WHOLE))
        {
            // One that its owner has just removed is none.
            let Ok(found) = fs::symlink_metadata(&path) else { continue };
            states.push((found.modified().unwrap_or(SystemTime::UNIX_EPOCH), path));
        }
        states.sort_by(|a, b| b.cmp(a));
        Ok(states.into_iter().map(|(_, path)| path).collect())
    }

    /// Opens a state for reading.
    pub(super) fn read(path: &Path) -> io::Result<File> {
        let no_link = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
        let file = OpenOptions::new().read(true).custom_flags(no_link).open(path)?;
        let found = file.metadata()?;
        if !found.is_file() || found.uid() != Uid::effective().as_raw() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is not a file of this user's"));
        }
        Ok(file)
    }

    /// A file of this process, which nobody reads until it is [published](OwnFile::publish).
    pub(super) fn create(&self) -> io::Result<OwnFile> {
        let name = format!("{PREFIX}{:016x}", rand::random::<u64>());
        let (whole, new) = (self.0.join(&name).with_extension(WHOLE), self.0.join(name).with_extension(NEW));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
        Ok(OwnFile { file, path: new, whole, folder: self.clone() })
    }

    /// Removes all files but `own` whose owners are gone.
    pub(super) fn clean(&self, own: &Path) -> io::Result<()> {
        for path in self.files()?.into_iter().filter(|path| path != own) {
            let Ok(file) = Self::read(&path) else { continue };
            // The lock is given up when its owner ends, however it ends.
            if let Ok(_locked) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Removes all files, also those whose owners live: what they write goes nowhere then.
    pub(super) fn clear(&self) -> io::Result<()> {
        self.files()?.iter().try_for_each(fs::remove_file)
    }

    fn files(&self) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                files.push(entry.path());
            }
        }
        Ok(files)
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }
}

/// A file that this process writes, and holds the lock on.
#[derive(Debug)]
pub(super) struct OwnFile {
    pub(super) file: Flock<File>,
    pub(super) path: PathBuf,
    whole: PathBuf,
    folder: Folder,
}

impl OwnFile {
    /// It is whole, and written to the disk: others may read it from now on.
    pub(super) fn publish(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, &self.whole)?;
        self.path.clone_from(&self.whole);
        self.folder.sync()
    }

    /// Removes it.
    pub(super) fn remove(&self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        // What is told from now on will not be in it.
        if thread::panicking() {
            let _ = self.remove();
        }
    }
}
