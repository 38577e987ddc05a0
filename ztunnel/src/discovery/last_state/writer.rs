//! The thread that keeps what the control plane tells. A disk that is slow, full or broken delays
//! nobody: what cannot be written is lost, and so is the file, since it would be laxer than what was
//! told. A new one is begun when there is room, with the next stream that tells everything.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant, SystemTime},
};

use tracing::{debug, info, warn};
use ztunnel_api::discovery::Resource;

use super::{
    folder::Folder,
    log::Log,
    record::{Answer, Content, Kind, Name, Origin, Removed},
    status::Status,
};
use crate::error_chain::error_chain;

/// How long what was told may be with the kernel and not on the disk.
const SYNC_EVERY: Duration = Duration::from_secs(5);
/// How often a disk that was full or broken is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(10);

/// How often files of tunnels that are gone are looked for.
const CLEAN_EVERY: Duration = Duration::from_secs(10);

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Message {
    /// What a response changed.
    Response(Response),
    /// The control plane is there, and nothing has changed.
    StillTold(SystemTime),
    /// From now on everything is told anew.
    Anew,
}

/// What a response changed.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) kind: Kind,
    pub(super) removed: Vec<String>,
    pub(super) put: Vec<Resource>,
    /// Names of on-demand discovery that it answers.
    pub(super) names: Vec<(Arc<str>, Answer)>,
    pub(super) at: SystemTime,
    /// Bytes of it in memory.
    pub(super) bytes: u64,
}

/// The thread's own state.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    origin: Origin,
    status: Arc<Status>,
    work: Work,
    /// When the file was last on the disk as a whole.
    synced: Instant,
    /// When files of tunnels that are gone were last looked for.
    cleaned: Option<Instant>,
    /// Bytes that the last file had, which the next one needs.
    needs: u64,
}

#[derive(Debug)]
enum Work {
    Recording(Log),
    /// A file is ready for everything to be told anew.
    Ready(Log),
    /// The disk cannot be used.
    Broken {
        tried: Instant,
    },
}

impl Writer {
    pub(super) fn new(path: &Path, origin: Origin, status: Arc<Status>) -> Self {
        let (path, now) = (path.to_owned(), Instant::now());
        Self { path, origin, status, work: Work::Broken { tried: now }, synced: now, cleaned: None, needs: 0 }
    }

    /// Until nobody tells any more.
    pub(super) fn run(mut self, messages: &Receiver<Message>) {
        // The first stream tells everything.
        match self.begin(0) {
            Ok(log) => self.work = Work::Recording(log),
            Err(error) => self.fail(&error),
        }
        loop {
            let message = match messages.recv_timeout(self.idle()) {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if let Err(error) = self.handle(message).and_then(|()| self.look_after()) {
                self.fail(&error);
            }
        }
        if let Work::Recording(log) = &mut self.work {
            let _ = log.sync();
        }
    }

    /// How long to wait for a message.
    fn idle(&self) -> Duration {
        match &self.work {
            Work::Recording(log) if log.is_due_to_sync() => SYNC_EVERY.saturating_sub(self.synced.elapsed()),
            Work::Broken { tried } => RETRY_EVERY.saturating_sub(tried.elapsed()),
            Work::Recording(_) | Work::Ready(_) => RETRY_EVERY,
        }
    }

    fn begin(&self, reserve: u64) -> io::Result<Log> {
        let folder = Folder::open(&self.path).map_err(io::Error::other)?;
        Log::begin(&folder, &self.origin, reserve)
    }

    fn handle(&mut self, message: Option<Message>) -> io::Result<()> {
        if self.status.is_lost.swap(false, Ordering::AcqRel) {
            let error = "the disk is slower than the control plane, so that a response was left out";
            return Err(io::Error::new(io::ErrorKind::TimedOut, error));
        }
        match message {
            Some(Message::Response(response)) => {
                self.status.queued.fetch_sub(response.bytes, Ordering::AcqRel);
                self.record(response)
            }
            Some(Message::StillTold(at)) => match &mut self.work {
                Work::Recording(log) if log.is_published() => log.append(Content::told(Kind::None, at)),
                _ => Ok(()),
            },
            Some(Message::Anew) => {
                self.work = match std::mem::replace(&mut self.work, Work::Broken { tried: Instant::now() }) {
                    Work::Ready(log) | Work::Recording(log) => Work::Recording(log),
                    broken @ Work::Broken { .. } => broken,
                };
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn record(&mut self, response: Response) -> io::Result<()> {
        // Otherwise it is of a stream that told differences to what is not there.
        let Work::Recording(log) = &mut self.work else { return Ok(()) };
        let kind = response.kind;
        for name in response.removed {
            log.append(Content::Removed(Removed { kind: kind.into(), name }))?;
        }
        for resource in response.put {
            log.append(Content::put(kind, resource))?;
        }
        for (name, answer) in response.names {
            log.append(Content::Name(Name { name: name.to_string(), answer: answer.into() }))?;
        }
        log.append(Content::told(kind, response.at))
    }

    /// Publishes, syncs, compacts or begins anew, whatever is due.
    fn look_after(&mut self) -> io::Result<()> {
        match &mut self.work {
            Work::Recording(log) => {
                if log.is_complete() && !log.is_published() {
                    log.publish()?;
                    self.synced = Instant::now();
                    self.status.works();
                    info!(path = %log.path().display(), bytes = log.size(), "last state of the control plane is kept");
                } else if log.is_mostly_past() {
                    let folder = Folder::open(&self.path).map_err(io::Error::other)?;
                    let new = log.compacted(&folder, &self.origin)?;
                    std::mem::replace(log, new).remove()?;
                    self.synced = Instant::now();
                } else if log.is_due_to_sync() && self.synced.elapsed() >= SYNC_EVERY {
                    log.sync()?;
                    self.synced = Instant::now();
                }
                // The predecessor serves on for a while, and leaves its file when it ends.
                if log.is_published() && self.cleaned.is_none_or(|at| at.elapsed() >= CLEAN_EVERY) {
                    self.cleaned = Some(Instant::now());
                    let cleaned = Folder::open(&self.path).map(|folder| folder.clean(log.path()));
                    debug!(?cleaned, "states of tunnels that are gone are removed");
                }
                self.needs = log.live();
                self.status.bytes.store(if log.is_published() { log.size() } else { 0 }, Ordering::Relaxed);
                Ok(())
            }
            Work::Broken { tried } if tried.elapsed() >= RETRY_EVERY => {
                *tried = Instant::now();
                self.work = Work::Ready(self.begin(self.needs + self.needs / 4 + (1 << 16))?);
                self.status.wants_all.store(true, Ordering::Release);
                Ok(())
            }
            Work::Broken { .. } | Work::Ready(_) => Ok(()),
        }
    }

    /// Said once, until it works again.
    fn fail(&mut self, error: &io::Error) {
        let text = error_chain(error);
        if self.status.fails(&text) {
            warn!(
                folder = %self.path.display(), error = text,
                "cannot keep the last state of the control plane: a tunnel that starts while the control plane is \
                 away will have to wait for it; trying again"
            );
        }
        let work = std::mem::replace(&mut self.work, Work::Broken { tried: Instant::now() });
        if let Work::Recording(log) | Work::Ready(log) = work {
            self.needs = self.needs.max(log.live());
            // On a disk that can only be read it stays, and gets old.
            let _ = log.remove();
        }
        self.status.wants_all.store(false, Ordering::Release);
        self.status.bytes.store(0, Ordering::Relaxed);
    }
}
