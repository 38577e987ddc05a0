//! Unix sockets that a daemon serves: replaced where a dead one left its file, removed at the end.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::{
    io::unix::AsyncFd,
    task::{JoinHandle, JoinSet},
};
use tracing::{error, warn};

use crate::sys::pollable;

/// A listening socket whose file goes with it.
#[derive(Debug)]
pub struct Bound {
    socket: Socket,
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
    /// Listens at `path`, for the owner only, without blocking. The folder is made where it is
    /// missing.
    ///
    /// # Errors
    /// `AddrInUse`: a living process serves this path; `AlreadyExists`: something other than a
    /// socket is there.
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

    /// Accepts connections and runs `handle` for each, with a number that counts them from 1.
    /// `what` names the peers in logs.
    ///
    /// # Errors
    /// The runtime cannot wait for the socket.
    pub fn serve<F>(
        self,
        what: &'static str,
        handle: impl FnMut(u64, Socket) -> F + Send + 'static,
    ) -> io::Result<Serving>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = pollable(self.socket.into())?;
        #[expect(clippy::disallowed_methods, reason = "`Serving` keeps the handle")]
        let accepting = tokio::spawn(accept_all(what, listener, handle));
        Ok(Serving { accepting, _file: self.file })
    }
}

/// Accepts connections until it is dropped, which also ends the connections.
#[derive(Debug)]
pub struct Serving {
    accepting: JoinHandle<()>,
    _file: SocketFile,
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Ends the connections too: their tasks belong to this one.
        self.accepting.abort();
    }
}

impl Serving {
    /// Resolves with the cause when accepting ended, which it does only by a fault.
    pub async fn failed(&mut self) -> String {
        match (&mut self.accepting).await {
            Ok(()) => "accepting ended".to_owned(),
            Err(error) => error.to_string(),
        }
    }
}

async fn accept_all<F>(
    what: &'static str,
    listener: AsyncFd<OwnedFd>,
    mut handle: impl FnMut(u64, Socket) -> F + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    /// After a failed accept, most likely for lack of fds: trying again at once would spin.
    const PAUSE: Duration = Duration::from_millis(200);
    let (mut connections, mut accepted_so_far) = (JoinSet::new(), 0);
    loop {
        tokio::select! {
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    error!(what, %error, "the task of a connection failed");
                }
            }
            accepted = accept(&listener) => match accepted {
                Ok(socket) => {
                    accepted_so_far += 1;
                    connections.spawn(handle(accepted_so_far, socket));
                }
                Err(error) => {
                    warn!(what, %error, "cannot accept a connection");
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<Socket> {
    loop {
        let mut guard = listener.readable().await?;
        if let Ok(accepted) = guard.try_io(|listener| SockRef::from(listener).accept()) {
            let (socket, _) = accepted?;
            socket.set_nonblocking(true)?;
            return Ok(socket);
        }
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
    let probe = Socket::new(Domain::UNIX, kind, None)?;
    // Who serves it may hang, with as many connections waiting as it has room for.
    probe.set_nonblocking(true)?;
    let served = || io::Error::new(io::ErrorKind::AddrInUse, "served by another process");
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(served()),
        Err(error) => Err(error),
        Ok(()) => Err(served()),
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
        // One that does not accept, and has as many connections waiting as it has room for.
        let waiting: Vec<Socket> = std::iter::from_fn(|| {
            let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.connect(&SockAddr::unix(&path).unwrap()).ok().map(|()| socket)
        })
        .collect();
        assert!(!waiting.is_empty());
        assert_eq!(Bound::new(&path, Type::SEQPACKET).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(waiting);
        let Bound { socket, file } = first;
        drop(socket);
        std::mem::forget(file);
        let second = Bound::new(&path, Type::SEQPACKET).unwrap();
        drop(second);
        assert!(!path.exists());
        fs::write(&path, "no socket").unwrap();
        assert_eq!(Bound::new(&path, Type::SEQPACKET).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
