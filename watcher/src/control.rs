//! The socket between commands and a running watcher: one JSON line is the request, JSON lines the
//! answer.
//!
//! State and maps have one writer, the watcher; so commands do not touch the maps themselves.
//!
//! * [`status`]: the types of `watcher status`; `answers`: filling them in
//! * [`explain`]: which rule decides about a connection
//! * [`lists`]: what excludes and includes connections, and who wrote that
//! * [`trace`]: verdicts of the kernel programs, as they are given

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream as StdUnixStream,
    path::Path,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use socket2::{Socket, Type};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
};
use tracing::debug;

use crate::unix_socket::{Bound, Serving};

pub(crate) mod answers;
pub mod explain;
pub mod lists;
pub mod status;
pub mod trace;

/// Which process of a pod connects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The container that it is in, by name or by the name of the cgroup's directory; `None`: one that
    /// nobody names.
    pub container: Option<String>,
    /// Its user, as the pod numbers it.
    pub uid: Option<u32>,
    /// The same of its group.
    pub gid: Option<u32>,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// One [`crate::control::status::Status`].
    Status,
    /// One [`crate::control::explain::Explanation`].
    Explain {
        /// Its uid, name or namespace/name.
        pod: String,
        /// Where it connects to.
        destination: SocketAddr,
        /// Which process of the pod.
        #[serde(default)]
        caller: Caller,
    },
    /// A list of [`crate::control::lists::PodLists`].
    Lists {
        /// Only of this pod: uid, name or namespace/name.
        pod: Option<String>,
    },
    /// [`crate::control::trace::TraceLine`]s until the client disconnects.
    Trace {
        /// Only verdicts about this pod: uid, name or namespace/name.
        pod: Option<String>,
        /// Only verdicts about this port, at either end.
        port: Option<u16>,
        /// Only verdicts about this address, at either end.
        address: Option<IpAddr>,
        /// No verdicts whose either end is in one of these.
        #[serde(default)]
        not_addresses: Vec<IpNet>,
    },
    /// Undo everything and end. Answered when it is done.
    Detach,
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer<T> {
    /// The answer.
    Ok(T),
    /// Why there is none.
    Error(String),
}

impl<T> From<Result<T, String>> for Answer<T> {
    fn from(result: Result<T, String>) -> Self {
        match result {
            Ok(answer) => Self::Ok(answer),
            Err(problem) => Self::Error(problem),
        }
    }
}

/// A request and where its answers go.
#[derive(Debug)]
pub struct IncomingRequest {
    /// What the client wants.
    pub request: Request,
    /// The way back.
    pub answers: Answers,
}

/// Takes answers for a client.
#[derive(Clone, Debug)]
pub struct Answers(mpsc::Sender<String>);

impl Answers {
    /// Whether `answer` was taken. A client that reads too slowly loses lines; the watcher never
    /// waits.
    pub fn give<T: Serialize>(&self, answer: &Answer<T>) -> bool {
        serde_json::to_string(answer).is_ok_and(|line| self.0.try_send(line).is_ok())
    }

    /// Gives the last answer, and lets it leave before the runtime ends.
    pub async fn give_last<T: Serialize>(&self, answer: &Answer<T>) {
        const PATIENCE: Duration = Duration::from_secs(1);
        self.give(answer);
        let _ = tokio::time::timeout(PATIENCE, self.closed()).await;
    }

    /// Whether the client disconnected.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Resolves when the client disconnected.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}

/// Serves clients until it is dropped.
#[derive(Debug)]
pub struct ControlServer(Serving);

impl ControlServer {
    /// Listens at `path`.
    ///
    /// # Errors
    /// As of [`Bound::new`].
    pub fn bind(path: &Path, requests: mpsc::Sender<IncomingRequest>) -> io::Result<Self> {
        let bound = Bound::new(path, Type::STREAM)?;
        let serving = bound.serve("commands", move |_, socket| {
            let requests = requests.clone();
            async move {
                if let Err(error) = serve(socket, requests).await {
                    debug!(%error, "connection of a command ended");
                }
            }
        });
        serving.map(Self)
    }

    /// Resolves with the cause when serving ended, which it does only by a fault.
    pub async fn failed(&mut self) -> String {
        self.0.failed().await
    }
}

async fn serve(socket: Socket, requests: mpsc::Sender<IncomingRequest>) -> io::Result<()> {
    /// Of a request, in bytes.
    const LONGEST: u64 = 4096;
    let stream = UnixStream::from_std(StdUnixStream::from(socket))?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = tokio::io::BufReader::new(reader);
    let mut line = String::new();
    (&mut reader).take(LONGEST).read_line(&mut line).await?;
    let (answers, mut lines) = mpsc::channel(1024);
    let answers = Answers(answers);
    match serde_json::from_str(&line) {
        Ok(request) => drop(requests.send(IncomingRequest { request, answers }).await),
        Err(error) => {
            answers.give(&Answer::<()>::Error(format!("cannot read the request: {error}")));
            drop(answers);
        }
    }
    let mut ignored = [0; 1];
    loop {
        tokio::select! {
            line = lines.recv() => match line {
                Some(mut line) => {
                    line.push('\n');
                    writer.write_all(line.as_bytes()).await?;
                }
                None => return Ok(()),
            },
            _ = reader.read(&mut ignored) => return Ok(()),
        }
    }
}

/// Sends `request` to the watcher that serves `path`; an iterator over its answers.
///
/// # Errors
/// No watcher serves `path`, or it cannot take the request.
pub fn ask<T: DeserializeOwned>(
    path: &Path,
    request: &Request,
) -> io::Result<impl Iterator<Item = io::Result<Answer<T>>> + use<T>> {
    let mut stream = StdUnixStream::connect(path)?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    Ok(BufReader::new(stream).lines().map(|line| Ok(serde_json::from_str(&line?)?)))
}

/// Whether a watcher serves `path`.
#[must_use]
pub fn is_served(path: &Path) -> bool {
    StdUnixStream::connect(path).is_ok()
}
