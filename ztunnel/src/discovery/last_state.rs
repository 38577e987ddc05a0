//! What the control plane told last, on disk: a tunnel that starts while it is away goes on with
//! that, policies included.
//!
//! Every process writes a file of its own, record by record as it is told, and reads those of
//! others; so a successor knows what its predecessor knows while both are alive. A state is used as
//! a whole or not at all, and only until the control plane answers: nothing of it is ever mixed into
//! what that tells.
//!
//! * [`frame`]: how records stand in a file; [`record`]: what they say
//! * [`reader`]: reads a state, or says why it cannot be used
//! * [`folder`]: whose file is whose
//! * [`log`]: the file of this process; [`writer`]: the thread that writes it
//! * [`status`]: what operators see

mod folder;
mod frame;
mod log;
mod reader;
mod record;
mod status;
mod writer;

use std::{
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{SyncSender, sync_channel},
    },
    thread,
    time::SystemTime,
};

use tracing::{info, warn};
use ztunnel_api::discovery::Resource;

pub use reader::{KeptState, Piece, UnusableState};
pub use record::Origin;
pub use status::{LastStateMetrics, LastStateView, Status};

use crate::{config::Config, error_chain::error_chain};
use folder::Folder;
use frame::FrameWriter;
use record::{Answer, Kind, preamble};
use writer::{Message, Response, Writer};

/// Responses that may wait for the disk.
const QUEUE: usize = 256;
/// Bytes of them; one larger response may wait if it is alone.
const QUEUE_BYTES: u64 = 64 << 20;

/// The last states in a folder, and the thread that keeps this process's own.
#[derive(Debug)]
pub struct LastState {
    path: PathBuf,
    origin: Origin,
    messages: SyncSender<Message>,
    status: Arc<Status>,
}

/// A state that another process has kept.
#[derive(Debug)]
pub struct FoundState {
    /// Where.
    pub path: PathBuf,
    /// What it says.
    pub state: KeptState<BufReader<File>>,
}

impl LastState {
    /// Keeps what is told in `path` from now on, and knows what others have kept there.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(path: &Path, origin: Origin) -> io::Result<Self> {
        let (messages, receiver) = sync_channel(QUEUE);
        let status = Arc::<Status>::default();
        let writer = Writer::new(path, origin.clone(), Arc::clone(&status));
        // It ends when nobody tells any more. Should it panic, nothing is kept, which is said.
        thread::Builder::new().name("last-state".to_owned()).spawn(move || writer.run(&receiver))?;
        Ok(Self { path: path.to_owned(), origin, messages, status })
    }

    /// What operators see.
    #[must_use]
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// The state that can be used and was told last. The log says why others cannot be used.
    pub(super) fn find(&self) -> Option<FoundState> {
        let listed = Folder::open(&self.path).map_err(io::Error::other).and_then(|folder| folder.states());
        let paths = match listed {
            Ok(paths) => paths,
            Err(error) => {
                warn!(
                    error = error_chain(&error),
                    "the last state of the control plane cannot be looked for"
                );
                return None;
            }
        };
        if paths.is_empty() {
            info!(folder = %self.path.display(), "there is no last state of the control plane; waiting for it");
        }
        let found = paths.into_iter().filter_map(|path| {
            let file = Folder::read(&path).map_err(UnusableState::Io);
            match file.and_then(|file| KeptState::open(BufReader::new(file), &self.origin)) {
                Ok(state) => Some(FoundState { path, state }),
                Err(error) => {
                    let error = error_chain(&error);
                    warn!(path = %path.display(), error, "a last state of the control plane is not used");
                    None
                }
            }
        });
        found.max_by_key(|found| found.state.told_at)
    }

    /// What was told at that time is in force; `None`: the control plane has told everything itself.
    pub(crate) fn set_in_force(&self, told_at: Option<SystemTime>) {
        self.status.set_in_force(told_at);
    }

    /// Keeps what a response has changed: names that were removed, resources that were taken, and
    /// names that were answered (`None`: that are no longer asked for).
    pub(super) fn told(
        &self,
        type_url: &str,
        removed: Vec<String>,
        put: Vec<Resource>,
        names: Vec<(Arc<str>, Option<bool>)>,
    ) {
        let content = |resource: &Resource| resource.resource.as_ref().map_or(0, |any| any.value.len());
        let bytes = put.iter().map(|resource| resource.name.len() + content(resource)).sum::<usize>() as u64;
        let waiting = self.status.queued.fetch_add(bytes, Ordering::AcqRel);
        let answer = |there| match there {
            Some(true) => Answer::There,
            Some(false) => Answer::Absent,
            None => Answer::Forgotten,
        };
        let names = names.into_iter().map(|(name, there)| (name, answer(there))).collect();
        let (kind, at) = (Kind::of(type_url), SystemTime::now());
        let response = Response { kind, removed, put, names, at, bytes };
        let has_room = waiting == 0 || waiting + bytes <= QUEUE_BYTES;
        if !has_room || self.messages.try_send(Message::Response(response)).is_err() {
            self.status.queued.fetch_sub(bytes, Ordering::AcqRel);
            self.status.is_lost.store(true, Ordering::Release);
        }
    }

    /// The control plane is still there. A state is as old as this.
    pub(super) fn still_told(&self) {
        // The next one will do.
        let _ = self.messages.try_send(Message::StillTold(SystemTime::now()));
    }

    /// Whether a new stream must tell everything, since the file lacks something. It then counts
    /// from now on.
    pub(super) fn begin_anew(&self) -> bool {
        self.status.wants_all.swap(false, Ordering::AcqRel) && self.messages.try_send(Message::Anew).is_ok()
    }
}

/// Removes what any tunnel has kept in `folder`, also what those keep that still run.
///
/// # Errors
/// The folder is not this user's alone, or a file in it cannot be removed.
pub fn forget(folder: &Path) -> io::Result<()> {
    Folder::open(folder).map_err(io::Error::other)?.clear()
}

/// A file with these records, whatever they are. For tests of the reader: with any bytes they get no
/// further than the first checksum.
///
/// # Errors
/// A record is too large.
pub fn file_of<'a>(records: impl IntoIterator<Item = &'a [u8]>) -> io::Result<Vec<u8>> {
    let mut frames = FrameWriter::new(Vec::new(), &preamble())?;
    for record in records {
        frames.write(record)?;
    }
    Ok(frames.to)
}

impl From<&Config> for Origin {
    fn from(config: &Config) -> Self {
        Self {
            cluster: config.cluster_id.to_string(),
            network: config.network.to_string(),
            trust_domain: config.trust_domain.to_string(),
            node: config.node.to_string(),
            on_demand: config.xds.as_ref().is_some_and(|xds| xds.on_demand),
        }
    }
}

#[cfg(test)]
mod tests;
