//! Unix sockets that a daemon serves: replaced where a dead one left its file, removed at the end.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use socket2::{Domain, SockAddr, Socket, Type};

/// A listening socket whose file goes with it.
#[derive(Debug)]
pub struct Bound {
    pub socket: Socket,
    file: SocketFile,
}

/// Removes the file on drop, unless somebody else has put another one in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Bound {
    /// Listens at `path`, for the owner only, without blocking. The folder is made where it is missing.
    ///
    /// # Errors
    /// `AddrInUse`: a living process serves this path; `AlreadyExists`: something other than a socket
    /// is there.
    pub fn new(path: &Path, kind: Type) -> io::Result<Self> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(named)?;
        }
        remove_stale(path, kind).map_err(named)?;
        let socket = Socket::new(Domain::UNIX, kind, None)?;
        socket.bind(&SockAddr::unix(path)?).map_err(named)?;
        let file =
            SocketFile { path: path.to_owned(), inode: fs::symlink_metadata(path).map_err(named)?.ino() };
        // Before `listen`: until then nobody can connect.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(named)?;
        socket.listen(16)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, file })
    }

    /// The socket and the guard of its file.
    pub fn into_parts(self) -> (Socket, SocketFile) {
        (self.socket, self.file)
    }
}

/// Removes the file of a socket that nobody serves any more. Fine when nothing is there.
///
/// # Errors
/// As of [`Bound::new`]; then nothing was removed.
pub fn remove_stale(path: &Path, kind: Type) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "exists and is no socket"));
        }
        Ok(_) => {}
    }
    match Socket::new(Domain::UNIX, kind, None)?.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(()) => Err(io::Error::new(io::ErrorKind::AddrInUse, "served by another process")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_sockets_file_is_replaced_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("below/socket");
        let first = Bound::new(&path, Type::SEQPACKET).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Bound::new(&path, Type::SEQPACKET).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let (socket, file) = first.into_parts();
        drop(socket);
        std::mem::forget(file);
        let second = Bound::new(&path, Type::SEQPACKET).unwrap();
        drop(second);
        assert!(!path.exists());
        fs::write(&path, "no socket").unwrap();
        assert_eq!(Bound::new(&path, Type::SEQPACKET).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
