//! An HTTP server that nobody can fill up: it has so many connections and no more, each for so long
//! and no longer.
//!
//! When there are too many, the oldest one goes of the address that has the most. So whoever opens
//! a thousand displaces their own, and a probe or a scrape from elsewhere is answered.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    pin::pin,
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, Id, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Bytes that a connection may keep of a request, and of an answer that the client does not read.
const BUFFER: usize = 64 << 10;
/// Pause after an accept that failed: for want of descriptors it would fail again at once.
const PAUSE: Duration = Duration::from_millis(50);

/// What one server may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Connections.
    pub(super) connections: usize,
    /// How long a request may take to arrive.
    pub(super) request: Duration,
    /// After this time a connection takes no further request.
    pub(super) lifetime: Duration,
    /// How long the answer to the last one may take.
    pub(super) answer: Duration,
}

impl Limits {
    pub(super) const DEFAULT: Self = Self {
        connections: 128,
        request: Duration::from_secs(10),
        lifetime: Duration::from_mins(2),
        answer: Duration::from_mins(1),
    };
}

/// Serves until `stop`.
pub(super) async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: CancellationToken) {
    let (mut tasks, mut open) = (JoinSet::new(), OpenConnections::default());
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(ended) = tasks.join_next_with_id() => {
                open.remove(ended.map_or_else(|error| error.id(), |(id, ())| id));
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    if open.len() >= limits.connections {
                        open.make_room(peer.ip());
                    }
                    open.add(peer.ip(), tasks.spawn(answer(stream, router.clone(), limits)));
                }
                Err(_) => sleep(PAUSE).await,
            },
        }
    }
}

async fn answer(stream: TcpStream, router: Router, limits: Limits) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.request).max_buf_size(BUFFER);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    tokio::select! {
        // An error is the client's: it left, or sent no HTTP.
        _ = &mut connection => return,
        () = sleep(limits.lifetime) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(limits.answer, connection).await;
}

/// Oldest first.
#[derive(Default)]
struct OpenConnections(VecDeque<(IpAddr, AbortHandle)>);

impl OpenConnections {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn add(&mut self, from: IpAddr, task: AbortHandle) {
        self.0.push_back((from, task));
    }

    fn remove(&mut self, id: Id) {
        self.0.retain(|(_, task)| task.id() != id);
    }

    /// For one from `newcomer`.
    fn make_room(&mut self, newcomer: IpAddr) {
        let mut counts = HashMap::from([(newcomer, 1)]);
        for (from, _) in &self.0 {
            *counts.entry(*from).or_insert(0) += 1;
        }
        // Of equals, the newcomer's.
        let most = counts.into_iter().max_by_key(|(from, count)| (*count, *from == newcomer));
        let oldest = most.and_then(|(most, _)| self.0.iter().position(|(from, _)| *from == most));
        if let Some((_, task)) = oldest.and_then(|oldest| self.0.remove(oldest)) {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, net::SocketAddr};

    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpSocket,
        time::Instant,
    };

    use super::*;

    const SHORT: Limits = Limits {
        connections: 3,
        request: Duration::from_millis(100),
        lifetime: Duration::from_millis(200),
        answer: Duration::from_millis(100),
    };
    const LIMIT: Duration = Duration::from_secs(20);

    async fn started(limits: Limits) -> (SocketAddr, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new()
            .route("/", get(async || "here\n"))
            .route("/never", get(async || pending::<&'static str>().await));
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, router, limits, CancellationToken::new()));
        (address, serving)
    }

    async fn from(own: &str, to: SocketAddr, request: &str) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(format!("{own}:0").parse().unwrap()).unwrap();
        let mut stream = socket.connect(to).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    async fn rest(mut stream: TcpStream) -> String {
        let mut answer = Vec::new();
        let _ = timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("the connection ends");
        String::from_utf8(answer).unwrap()
    }

    const REQUEST: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";

    #[tokio::test]
    async fn a_connection_that_asks_nothing_or_reads_nothing_ends() {
        let (address, _serving) = started(SHORT).await;
        assert_eq!(rest(from("127.0.0.1", address, "").await).await, "");
        assert_eq!(rest(from("127.0.0.1", address, "GET / HTTP/1.1\r\nHost:").await).await, "");
        let began = Instant::now();
        let answer = rest(from("127.0.0.1", address, "GET /never HTTP/1.1\r\nHost: x\r\n\r\n").await).await;
        assert!(answer.is_empty() && began.elapsed() >= SHORT.lifetime, "{answer} {:?}", began.elapsed());
        // One that asks and reads is served, and ended when its time is over.
        let answer = rest(from("127.0.0.1", address, REQUEST).await).await;
        assert!(answer.ends_with("\r\n\r\nhere\n"), "{answer}");
    }

    #[tokio::test]
    async fn who_has_the_most_connections_loses_the_oldest() {
        let (address, _serving) = started(Limits { connections: 3, ..Limits::DEFAULT }).await;
        let mut flood = Vec::new();
        for _ in 0..3 {
            flood.push(from("127.0.0.2", address, "GET").await);
        }
        let mut other = from("127.0.0.1", address, "GET").await;
        // Of the flood, not of the other, however many come.
        for _ in 0..20 {
            flood.push(from("127.0.0.2", address, "GET").await);
        }
        let kept = flood.split_off(21);
        for stream in flood {
            assert_eq!(rest(stream).await, "");
        }
        other.write_all(&REQUEST.as_bytes()[3..]).await.unwrap();
        let mut answer = [0; 15];
        timeout(LIMIT, other.read_exact(&mut answer)).await.expect("an answer").unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
        assert_eq!(kept.len(), 2);
    }
}
