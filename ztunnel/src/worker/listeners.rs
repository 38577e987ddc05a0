//! The listeners of one worker for one pod.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    net::SocketAddr,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::{
    config::Config,
    direction::Direction,
    rarely::Rarely,
    socket::{self, AcceptedEnd},
};

/// The listener on which a connection arrived, which decides how it is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListenPort {
    /// From the pod's application.
    Outbound,
    /// To the application, plaintext.
    Inbound,
    /// To the application, through a peer's tunnel.
    Hbone,
}

impl ListenPort {
    /// The direction of its connections.
    pub(crate) fn direction(self) -> Direction {
        match self {
            Self::Outbound => Direction::Outbound,
            Self::Inbound | Self::Hbone => Direction::Inbound,
        }
    }

    /// How many descriptors a connection takes at most: its own, and the one behind it. The streams
    /// of a tunnel take theirs when they come.
    pub(crate) fn descriptors(self) -> usize {
        match self {
            Self::Outbound | Self::Inbound => 2,
            Self::Hbone => 1,
        }
    }
}

/// What an enrolled pod's traffic needs.
pub(crate) const ALL: [ListenPort; 3] = [ListenPort::Outbound, ListenPort::Inbound, ListenPort::Hbone];

/// One worker's share of each group. The sockets listen as soon as this exists.
#[derive(Debug)]
pub(crate) struct Listeners(Vec<(ListenPort, std::net::TcpListener)>);

/// Opens the listeners of all workers on the ports of `which`. Call inside the pod's netns.
pub(crate) fn open(
    which: &[ListenPort],
    workers: usize,
    config: &Config,
    options: &socket::SocketOptions,
) -> io::Result<Vec<Listeners>> {
    let mut all: Vec<_> = (0..workers).map(|_| Listeners(Vec::with_capacity(which.len()))).collect();
    for &port in which {
        let number = match port {
            ListenPort::Outbound => config.ports.outbound,
            ListenPort::Inbound => config.ports.inbound,
            ListenPort::Hbone => config.ports.hbone,
        };
        let end = match port {
            ListenPort::Outbound | ListenPort::Inbound => AcceptedEnd::Reset,
            ListenPort::Hbone => AcceptedEnd::Close,
        };
        let group = socket::listen(number, workers, config.ipv6, end, options)?;
        for (Listeners(own), listener) in all.iter_mut().zip(group) {
            own.push((port, listener));
        }
    }
    Ok(all)
}

impl Listeners {
    /// Registers the sockets with the calling worker's runtime.
    pub(crate) fn activate(self) -> io::Result<ActiveListeners> {
        let active = |(port, listener)| TcpListener::from_std(listener).map(|listener| (port, listener));
        let listeners = self.0.into_iter().map(active).collect::<io::Result<_>>()?;
        Ok(ActiveListeners { listeners, next: Cell::new(0) })
    }
}

/// All listeners of all pods fail together when the process has no descriptors left.
static CANNOT_ACCEPT: Rarely = Rarely::every(Duration::from_secs(10));

/// Listeners in use.
#[derive(Debug)]
pub(crate) struct ActiveListeners {
    listeners: Vec<(ListenPort, TcpListener)>,
    /// The listener to poll first. It rotates, so that a busy port does not starve the others.
    next: Cell<usize>,
}

impl ActiveListeners {
    /// The next connection on any of the ports.
    pub(crate) async fn accept(&self) -> (ListenPort, TcpStream, SocketAddr) {
        loop {
            let (port, accepted) = poll_fn(|cx| self.poll(cx)).await;
            match accepted {
                Ok((stream, peer)) => return (port, stream, socket::canonical(peer)),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    if let Some(left_out) = CANNOT_ACCEPT.due() {
                        tracing::warn!(%error, left_out, "cannot accept connections");
                    }
                    sleep(Duration::from_millis(100)).await; // out of descriptors: at once would spin
                }
            }
        }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<(ListenPort, io::Result<(TcpStream, SocketAddr)>)> {
        let first = self.next.get();
        self.next.set(first.wrapping_add(1));
        let count = self.listeners.len();
        for turn in 0..count {
            let (port, listener) = &self.listeners[(first % count + turn) % count];
            if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                return Poll::Ready((*port, accepted));
            }
        }
        Poll::Pending
    }

    /// Closes the listeners, with the connections that already wait: closing alone would reset
    /// them.
    pub(crate) fn close(self) -> Vec<(ListenPort, TcpStream, SocketAddr)> {
        let mut waiting = Vec::new();
        for (port, listener) in self.listeners {
            let Ok(listener) = listener.into_std() else { continue };
            while let Ok((stream, peer)) = listener.accept() {
                let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
                waiting.extend(stream.map(|stream| (port, stream, socket::canonical(peer))));
            }
        }
        waiting
    }
}

/// The client closed while it waited in the queue (accept(2), "Error handling").
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}
