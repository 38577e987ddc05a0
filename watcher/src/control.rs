//! The socket by which commands ask a running watcher: one JSON line asks, JSON lines answer.
//!
//! State and maps have one writer, the watcher; so the commands do not touch the maps themselves.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream as StdUnixStream,
    path::Path,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use socket2::Type;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tracing::warn;

use crate::unix_socket::{Bound, SocketFile};

pub mod explain;
pub mod status;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// One [`crate::control::status::Status`].
    Status,
    /// One [`crate::control::explain::Explanation`]. `pod`: uid, name or namespace/name.
    Explain { pod: String, destination: SocketAddr },
    /// Records until the asker hangs up; the programs are silent again then.
    Trace { pod: Option<String>, port: Option<u16>, address: Option<IpAddr> },
    /// Undo everything and end. Answered when it is done.
    Detach,
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer<T> {
    Ok(T),
    /// Why it cannot be answered.
    Error(String),
}

/// A request and where its answer goes.
#[derive(Debug)]
pub struct Asked {
    pub request: Request,
    pub answers: Answers,
}

/// Takes lines for the asker.
#[derive(Clone, Debug)]
pub struct Answers(mpsc::Sender<String>);

impl Answers {
    /// Whether it was taken. An asker that reads too slowly loses lines, the watcher never waits.
    pub fn give<T: Serialize>(&self, answer: &Answer<T>) -> bool {
        serde_json::to_string(answer).is_ok_and(|line| self.0.try_send(line).is_ok())
    }

    /// Whether the asker hung up.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Resolves when the asker hung up.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}

/// Serves askers until it is dropped.
#[derive(Debug)]
pub struct Server {
    accepting: JoinHandle<()>,
    _file: SocketFile,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Server {
    pub fn bind(path: &Path, asked: mpsc::Sender<Asked>) -> io::Result<Self> {
        let (socket, file) = Bound::new(path, Type::STREAM)?.into_parts();
        let listener = UnixListener::from_std(std::os::unix::net::UnixListener::from(socket))?;
        Ok(Self { accepting: tokio::spawn(accept(listener, asked)), _file: file })
    }
}

async fn accept(listener: UnixListener, asked: mpsc::Sender<Asked>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(stream, asked.clone()))),
                Err(error) => {
                    warn!(%error, "cannot accept on the control socket");
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                }
            },
        }
    }
}

async fn serve(stream: UnixStream, asked: mpsc::Sender<Asked>) -> io::Result<()> {
    const LONGEST: u64 = 4096;
    let (reader, mut writer) = stream.into_split();
    let mut reader = tokio::io::BufReader::new(reader);
    let mut line = String::new();
    (&mut reader).take(LONGEST).read_line(&mut line).await?;
    let (answers, mut lines) = mpsc::channel(1024);
    let answers = Answers(answers);
    match serde_json::from_str(&line) {
        Ok(request) => drop(asked.send(Asked { request, answers }).await),
        Err(error) => {
            answers.give(&Answer::<()>::Error(format!("not understood: {error}")));
            drop(answers);
        }
    }
    let mut hung_up = [0; 1];
    loop {
        tokio::select! {
            line = lines.recv() => match line {
                Some(mut line) => {
                    line.push('\n');
                    writer.write_all(line.as_bytes()).await?;
                }
                None => return Ok(()),
            },
            _ = reader.read(&mut hung_up) => return Ok(()),
        }
    }
}

/// Asks the watcher that serves `path`; an iterator over its answers.
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
pub fn is_served(path: &Path) -> bool {
    StdUnixStream::connect(path).is_ok()
}
