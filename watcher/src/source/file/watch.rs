//! The pods file as a source: read again whenever it may have changed.
//!
//! It watches the directory with inotify, and reads the file every second too, since some volumes
//! report no events. An invalid file or entry leaves the last valid one active: a typing error must
//! not take a pod out of the mesh.

use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use error_reporter::Report;
use futures_util::StreamExt as _;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::parse;
use crate::{
    model::pod::{Entry, Pod, Update},
    source::Source,
};

const READ_INTERVAL: Duration = Duration::from_secs(1);

/// Will read `path` once that is wanted ([`Source::begin`]), in a task that ends with the receiver of
/// its updates.
///
/// # Errors
/// The file's directory cannot be watched.
pub fn start(path: PathBuf, cgroup_root: PathBuf) -> io::Result<Source> {
    let inotify = Inotify::init()?;
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    // Not on each write: a half-written file may parse, with half of the pods.
    // ConfigMap volumes change by a symlink that is moved, hence any name in the directory counts.
    inotify.watches().add(dir, WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::CREATE)?;
    let changes = inotify.into_event_stream([0; 4096])?;
    let (sender, updates) = mpsc::channel(4);
    let name = format!("pods file {}", path.display());
    let (when_wanted, wanted) = oneshot::channel();
    let reader = Reader { path, cgroup_root, entries: None, error: None };
    #[expect(clippy::disallowed_methods, reason = "`Source` keeps the handle")]
    let producer = tokio::spawn(follow(reader, changes, sender, wanted));
    Ok(Source {
        forgets_running_pods: false,
        name,
        updates,
        producer,
        when_wanted: Some(when_wanted),
        outcomes: None,
        when_ready: None,
        startup: None,
        writer: None,
    })
}

struct Reader {
    path: PathBuf,
    cgroup_root: PathBuf,
    /// The last valid content.
    entries: Option<Vec<Entry>>,
    error: Option<String>,
}

async fn follow(
    mut reader: Reader,
    mut changes: EventStream<[u8; 4096]>,
    updates: mpsc::Sender<Update>,
    wanted: oneshot::Receiver<()>,
) {
    if wanted.await.is_err() {
        return;
    }
    loop {
        if let Some(update) = reader.read()
            && updates.send(update).await.is_err()
        {
            return;
        }
        tokio::select! {
            () = reader.changed(&mut changes) => {}
            () = tokio::time::sleep(READ_INTERVAL) => {}
            () = updates.closed() => return,
        }
    }
}

impl Reader {
    /// Reads the file; `None`: nothing changed.
    fn read(&mut self) -> Option<Update> {
        match parse::read(&self.path, &self.cgroup_root) {
            Ok(entries) => {
                let entries = keep_last_valid(entries, self.entries.as_deref().unwrap_or_default());
                let recovered = self.error.take().is_some();
                if recovered {
                    info!("pods file valid again");
                }
                if !recovered && self.entries.as_ref() == Some(&entries) {
                    return None;
                }
                self.entries = Some(entries.clone());
                Some(Update::All(entries))
            }
            Err(error) => {
                let error = Report::new(&error).to_string();
                if self.error.as_ref() == Some(&error) {
                    return None;
                }
                warn!(error, "pods file rejected; keeping the last valid one");
                self.error = Some(error.clone());
                Some(Update::Unusable(error))
            }
        }
    }

    /// Resolves when the file may have changed.
    async fn changed(&self, changes: &mut EventStream<[u8; 4096]>) {
        loop {
            match changes.next().await {
                Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => return,
                Some(Ok(event)) if event.name.as_deref().is_none_or(|name| self.concerns(name)) => return,
                Some(Ok(_)) => {}
                Some(Err(_)) | None => std::future::pending().await,
            }
        }
    }

    fn concerns(&self, name: &OsStr) -> bool {
        self.path.file_name().is_none_or(|file| file == name) || name == "..data"
    }
}

/// `entries`, where the last valid entry of the same uid replaces an invalid one.
fn keep_last_valid(entries: Vec<Entry>, before: &[Entry]) -> Vec<Entry> {
    let earlier = |uid: &str| {
        before.iter().find_map(|entry| match entry {
            Entry::Pod(pod) if pod.uid == uid => Some(pod.clone()),
            _ => None,
        })
    };
    entries
        .into_iter()
        .map(|entry| {
            let Entry::Bad(bad) = &entry else { return entry };
            let Some(pod) = bad.uid.as_deref().and_then(earlier) else { return entry };
            let notes = [format!("entry not valid, keeping the last valid one: {}", bad.problem)]
                .into_iter()
                .collect();
            Entry::Pod(Arc::new(Pod { notes, ..Pod::clone(&pod) }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_entry_is_replaced_by_the_last_valid_one() {
        let parse = |text: &str| parse::parse(text, Path::new("/cgroup")).unwrap();
        let good = parse("pods: [{uid: a, name: a, cgroup: a}]");
        let bad = "pods: [{uid: a, name: a, cgruop: a}, {uid: b, name: b, cgruop: b}]";
        let kept = keep_last_valid(parse(bad), &good);
        let [Entry::Pod(pod), Entry::Bad(_)] = kept.as_slice() else { panic!("{kept:?}") };
        assert_eq!(pod.cgroup.as_deref(), Some(Path::new("/cgroup/a")));
        assert!(pod.notes[0].contains("cgruop"), "{:?}", pod.notes);
        // And again, after a kept one.
        assert!(matches!(keep_last_valid(parse(bad), &kept)[0], Entry::Pod(_)));
    }

    #[tokio::test]
    async fn an_edit_is_published_at_once_and_an_error_does_not_empty_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pods.yaml");
        std::fs::write(&path, "pods: []").unwrap();
        let mut source = start(path.clone(), PathBuf::from("/cgroup")).unwrap();
        // What is there before it is wanted is old by then.
        std::fs::write(&path, "pods: [").unwrap();
        tokio::task::yield_now().await;
        std::fs::write(&path, "pods: []").unwrap();
        source.begin();
        assert_eq!(source.updates.recv().await, Some(Update::All(Vec::new())));
        std::fs::write(dir.path().join("next"), "pods: [").unwrap();
        std::fs::rename(dir.path().join("next"), &path).unwrap();
        assert!(
            matches!(source.updates.recv().await, Some(Update::Unusable(error)) if error.contains("pods.yaml"))
        );
        // Published again although nothing changed in it, so that the error ends for the receiver.
        std::fs::write(dir.path().join("next"), "pods: []").unwrap();
        std::fs::rename(dir.path().join("next"), &path).unwrap();
        assert_eq!(source.updates.recv().await, Some(Update::All(Vec::new())));
    }
}
