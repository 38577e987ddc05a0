use std::{cell::Cell, future::poll_fn, io, rc::Rc, time::Duration};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::{LocalSet, spawn_local},
};

use super::*;
use crate::memory::{MemoryBudget, MemoryMetrics, TunnelMemory};

const LIMITS: StreamConfig = StreamConfig { half_closed: Duration::from_mins(1), idle: None };

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let accepted = listener.accept().await.unwrap().0;
    // The tunnel's listeners say so.
    accepted.set_zero_linger().unwrap();
    (dialled, accepted)
}

/// An application socket whose other end is carried over HTTP/2, and the peer's half of that
/// stream.
struct Carried {
    application: TcpStream,
    peer: (SendStream<SendData>, RecvStream),
    task: tokio::task::JoinHandle<Result<(), StreamError>>,
}

async fn carried() -> Carried {
    carried_together(1, SocketIs::Client).await.pop().unwrap()
}

type Halves = (SendStream<SendData>, RecvStream);

/// The ends of `count` streams of one tunnel with the default windows of 65,535 bytes: the client's,
/// which live as long as the handle on their tunnel, and the server's.
async fn streams(count: usize) -> (Vec<Halves>, Vec<Halves>, h2::client::SendRequest<SendData>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let (mut requests, connection) = h2::client::Builder::new().handshake::<_, SendData>(near).await.unwrap();
    spawn_local(connection);
    let server = spawn_local(async move {
        let mut connection = h2::server::Builder::new().handshake::<_, SendData>(far).await.unwrap();
        let mut streams = Vec::new();
        while streams.len() < count {
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            let send = respond.send_response(http::Response::new(()), false).unwrap();
            streams.push((send, request.into_body()));
        }
        spawn_local(async move { while connection.accept().await.is_some() {} });
        streams
    });
    let mut clients = Vec::new();
    for _ in 0..count {
        requests = requests.ready().await.unwrap();
        let request = http::Request::builder().method("CONNECT").uri("a:1").body(()).unwrap();
        let (response, send) = requests.send_request(request, false).unwrap();
        clients.push((send, response.await.unwrap().into_body()));
    }
    (clients, server.await.unwrap(), requests)
}

/// `count` connections in one tunnel. We are at the `side` of its client or of its server.
async fn carried_together(count: usize, side: SocketIs) -> Vec<Carried> {
    let (clients, servers, requests) = streams(count).await;
    let (ours, peers) = if side == SocketIs::Client { (clients, servers) } else { (servers, clients) };
    let budget = MemoryBudget::new(1 << 30, MemoryMetrics::default());
    let memory = TunnelMemory::new(&budget, 1 << 16);
    let mut all = Vec::new();
    for ((send, recv), peer) in ours.into_iter().zip(peers) {
        let (application, socket) = sockets().await;
        let (requests, memory) = (requests.clone(), memory.stream());
        let task = spawn_local(async move {
            let (counters, stream) = (ByteCounters::default(), HboneStream::new(send, recv, memory));
            let result = tunnel(socket, stream, side, &counters, LIMITS, std::future::pending()).await;
            drop(requests);
            result
        });
        all.push(Carried { application, peer, task });
    }
    all
}

impl Carried {
    /// From the application to the peer.
    async fn transfer(&mut self, bytes: usize) {
        let data = vec![7; bytes];
        let reading = async {
            let mut left = bytes;
            while left > 0 {
                let data = self.peer.1.data().await.unwrap().unwrap();
                left -= data.len();
                self.peer.1.flow_control().release_capacity(data.len()).unwrap();
            }
        };
        let (written, ()) = tokio::join!(self.application.write_all(&data), reading);
        written.unwrap();
    }
}

#[tokio::test]
async fn idle_streams_leave_the_peers_window_to_those_that_have_something_to_send() {
    let test = async {
        for side in [SocketIs::Client, SocketIs::Server] {
            for (number, stream) in carried_together(101, side).await.iter_mut().enumerate() {
                // After a large transfer, and after a message, nothing may be kept.
                for bytes in [1 << 20, 10] {
                    let carried = tokio::time::timeout(Duration::from_secs(20), stream.transfer(bytes)).await;
                    assert!(carried.is_ok(), "{side:?}: the stream after {number} idle ones carries nothing");
                }
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_message_wakes_the_task_that_carries_it_once() {
    const MESSAGES: usize = 20;
    let test = async {
        let (mut clients, mut servers, _tunnel) = streams(1).await;
        let ((mut send, _), (_, mut received)) = (clients.remove(0), servers.remove(0));
        let (mut application, mut socket) = sockets().await;
        let budget = MemoryBudget::new(1 << 30, MemoryMetrics::default());
        let queue = TunnelMemory::new(&budget, 1 << 16).stream().send_queue();
        let wakes = Rc::new(Cell::new(0));
        let counted = Rc::clone(&wakes);
        spawn_local(async move {
            let mut copy = pin!(socket_to_stream(socket.split().0, &mut send, &queue, |_| {}));
            poll_fn(|cx| {
                counted.set(counted.get() + 1);
                copy.as_mut().poll(cx)
            })
            .await
        });
        tokio::task::yield_now().await;
        let before = wakes.get();
        for _ in 0..MESSAGES {
            application.write_all(b"request").await.unwrap();
            assert_eq!(received.data().await.unwrap().unwrap(), "request");
        }
        tokio::task::yield_now().await;
        assert_eq!(wakes.get() - before, MESSAGES);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn reset_stream_resets_the_socket_and_cancel_ends_it() {
    let test = async {
        for (reason, reset) in
            [(Reason::CONNECT_ERROR, true), (Reason::INTERNAL_ERROR, true), (Reason::CANCEL, false)]
        {
            let Carried { mut application, peer: (mut send, _recv), task } = carried().await;
            send.send_data(Bytes::from_static(b"half").into(), false).unwrap();
            application.read_exact(&mut [0; 4]).await.unwrap();
            send.send_reset(reason);
            let end = application.read(&mut [0]).await.map_err(|error| error.kind());
            assert_eq!(end, if reset { Err(io::ErrorKind::ConnectionReset) } else { Ok(0) }, "{reason}");
            assert_eq!(task.await.unwrap().is_err(), reset, "{reason}");
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn reset_socket_resets_the_stream_and_so_does_a_task_that_is_cut() {
    let test = async {
        for cut in [false, true] {
            let Carried { mut application, peer: (_send, mut recv), task } = carried().await;
            application.write_all(b"half").await.unwrap();
            assert_eq!(recv.data().await.unwrap().unwrap(), "half");
            if cut {
                task.abort();
            } else {
                crate::socket::reset(application);
            }
            let error = recv.data().await.unwrap().unwrap_err();
            assert_eq!(error.reason(), Some(Reason::CONNECT_ERROR), "cut: {cut}");
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn reader_that_stands_still_stops_the_writer() {
    let test = async {
        let Carried { mut application, peer: (_send, recv), task } = carried().await;
        let mut written = 0;
        let chunk = vec![0; 1 << 16];
        let endless = async {
            loop {
                written += application.write(&chunk).await.unwrap();
            }
        };
        // Nobody reads `recv`: the stream's window, one send buffer and the kernel's buffers fill
        // up, no more.
        let _ = tokio::time::timeout(Duration::from_millis(300), endless).await;
        assert!(written < 16 << 20, "{written} bytes went nowhere");
        drop((recv, task));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn silent_is_cut_in_the_end_half_closed_or_not_as_the_limits_say() {
    let day = Duration::from_hours(24);
    for (half_closed, idle, shut, expected) in [
        (day, None, true, Some("half-closed and silent for 86400s")),
        (day, Some(Duration::from_secs(9)), true, Some("half-closed and silent for 9s")),
        (day, Some(Duration::from_secs(9)), false, Some("silent for 9s")),
        (day, None, false, None),
    ] {
        let ((mut client, near), (_server, far)) = (sockets().await, sockets().await);
        if shut {
            client.shutdown().await.unwrap();
        }
        let (counters, limits) = (ByteCounters::default(), StreamConfig { half_closed, idle });
        let all = [&counters];
        let relayed = relay(near, far, &all, limits, std::future::pending());
        let result = tokio::time::timeout(3 * day, relayed).await;
        let said = result.ok().map(|result| result.unwrap_err().to_string());
        assert_eq!(said.is_some(), expected.is_some());
        assert!(said.unwrap_or_default().starts_with(expected.unwrap_or_default()), "{expected:?}");
    }
}
