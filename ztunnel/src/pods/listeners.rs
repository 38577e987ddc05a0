//! The sockets on which one worker takes one pod's connections.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::{config::Config, socket};

/// Where a connection came in, and so what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// From the pod's application.
    Outbound,
    /// To the application, plaintext.
    Inbound,
    /// To the application, through a peer's tunnel.
    Hbone,
}

/// One worker's share of the three groups. Listening from the moment it exists.
#[derive(Debug)]
pub struct Listeners([(Port, std::net::TcpListener); 3]);

/// The listeners of all workers. Call inside the pod's netns.
pub fn open(workers: usize, config: &Config, options: &socket::Options) -> io::Result<Vec<Listeners>> {
    let group = |port| socket::listen(port, workers, config.ipv6, options).map(Vec::into_iter);
    let (outbound, inbound, hbone) =
        (group(config.ports.outbound)?, group(config.ports.inbound)?, group(config.ports.hbone)?);
    Ok(outbound
        .zip(inbound)
        .zip(hbone)
        .map(|((outbound, inbound), hbone)| {
            Listeners([(Port::Outbound, outbound), (Port::Inbound, inbound), (Port::Hbone, hbone)])
        })
        .collect())
}

impl Listeners {
    /// Hands the sockets to the calling worker's runtime.
    pub fn activate(self) -> io::Result<Active> {
        let [a, b, c] = self.0;
        let active = |(port, listener)| TcpListener::from_std(listener).map(|listener| (port, listener));
        Ok(Active([active(a)?, active(b)?, active(c)?]))
    }
}

/// Listeners that are being accepted from.
#[derive(Debug)]
pub struct Active([(Port, TcpListener); 3]);

impl Active {
    /// The next connection on any of the ports.
    pub async fn accept(&self) -> (Port, TcpStream, SocketAddr) {
        let [a, b, c] = &self.0;
        loop {
            let (port, accepted) = tokio::select! {
                accepted = a.1.accept() => (a.0, accepted),
                accepted = b.1.accept() => (b.0, accepted),
                accepted = c.1.accept() => (c.0, accepted),
            };
            match accepted {
                Ok((stream, peer)) => return (port, stream, socket::canonical(peer)),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    sleep(Duration::from_millis(100)).await; // out of descriptors: at once would spin
                }
            }
        }
    }

    /// Closes the listeners, with the connections that already wait: closing alone would reset them.
    pub fn close(self) -> Vec<(Port, TcpStream, SocketAddr)> {
        let mut waiting = Vec::new();
        for (port, listener) in self.0 {
            let Ok(listener) = listener.into_std() else { continue };
            while let Ok((stream, peer)) = listener.accept() {
                let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
                waiting.extend(stream.map(|stream| (port, stream, socket::canonical(peer))));
            }
        }
        waiting
    }
}

/// The client went away while it waited (accept(2), "Error handling").
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}
