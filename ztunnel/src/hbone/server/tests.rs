use std::{cell::Cell, rc::Rc};

use http::HeaderMap;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    sync::watch,
    task::{LocalSet, spawn_local, yield_now},
    time::Instant,
};

use super::*;
use crate::memory::{MemoryBudget, MemoryMetrics};

const H2: H2Config = H2Config { stream_window: 1 << 20, connection_window: 200 << 20, frame: 1 << 20 };
const STREAMS: usize = 200;

/// Passes on what the client sends, and counts it; what the server sends only while `open`.
async fn pass(
    client: DuplexStream,
    server: DuplexStream,
    sent: Rc<Cell<usize>>,
    mut open: watch::Receiver<bool>,
) {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (tokio::io::split(client), tokio::io::split(server));
    let there = async {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
            to_server.write_all(&buffer[..n]).await.unwrap();
            sent.set(sent.get() + n);
        }
    };
    let back = async {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
            open.wait_for(|open| *open).await.unwrap();
            to_client.write_all(&buffer[..n]).await.unwrap();
        }
    };
    tokio::join!(there, back);
}

/// More data arrives for streams that were reset than h2 forgives for streams that it has forgotten.
#[tokio::test]
async fn streams_that_are_cut_while_data_is_on_its_way_do_not_end_their_tunnel() {
    let test = async {
        let (open, sent, cut, reset) =
            (watch::Sender::new(true), Rc::default(), CancellationToken::new(), Rc::new(Cell::new(0)));
        let ((client, near), (far, server)) = (duplex(1 << 20), duplex(1 << 20));
        spawn_local(pass(near, far, Rc::clone(&sent), open.subscribe()));
        let (cutting, counter) = (cut.clone(), Rc::clone(&reset));
        spawn_local(async move {
            let budget = MemoryBudget::new(1 << 30, MemoryMetrics::default());
            let handle = |connect: ConnectRequest| {
                let (cut, reset) = (cutting.clone(), Rc::clone(&counter));
                let late = cut.is_cancelled();
                async move {
                    let stream = connect.accept(HeaderMap::new()).unwrap();
                    if late {
                        std::future::pending::<()>().await;
                    }
                    cut.cancelled().await;
                    drop(stream);
                    reset.set(reset.get() + 1);
                }
            };
            serve(server, &H2, TunnelMemory::new(&budget, H2.stream_window), CancellationToken::new(), handle)
                .await
        });
        let (mut requests, connection) = h2::client::handshake(client).await.unwrap();
        spawn_local(connection);
        let connect = || Request::builder().method("CONNECT").uri("a:1").body(()).unwrap();
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            requests = requests.ready().await.unwrap();
            let (response, stream) = requests.send_request(connect(), false).unwrap();
            streams.push((response.await.unwrap(), stream));
        }
        open.send_replace(false);
        cut.cancel();
        while reset.get() < STREAMS {
            yield_now().await;
        }
        let (before, each) = (sent.get(), 10 * 1000);
        for (_, stream) in &mut streams {
            for _ in 0..10 {
                stream.send_data(bytes::Bytes::from_static(&[0; 1000]), false).unwrap();
            }
        }
        while sent.get() < before + STREAMS * each {
            yield_now().await;
        }
        open.send_replace(true);
        drop(streams);
        let mut requests = requests.ready().await.expect("the tunnel takes streams");
        let (response, _stream) = requests.send_request(connect(), false).unwrap();
        assert_eq!(response.await.expect("an answer").status(), StatusCode::OK);
    };
    LocalSet::new().run_until(async { timeout(Duration::from_mins(1), test).await.expect("in time") }).await;
}

/// Its netns is gone, and its socket with it: nothing comes any more, not even an end.
#[tokio::test(start_paused = true)]
async fn a_client_that_is_gone_without_a_word_does_not_keep_a_server_that_leaves() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    let (mut client, server) = duplex(1 << 20);
    client.write_all(&[PREFACE, SETTINGS].concat()).await.unwrap();
    let (stop, budget) = (CancellationToken::new(), MemoryBudget::new(1 << 30, MemoryMetrics::default()));
    let ending = async {
        serve(server, &H2, TunnelMemory::new(&budget, H2.stream_window), stop.clone(), |_| async {
            unreachable!("it asks for nothing")
        })
        .await
        .unwrap();
        Instant::now()
    };
    let stopped = async {
        sleep(Duration::from_mins(5)).await;
        stop.cancel();
        Instant::now()
    };
    let (ended, stopped) = tokio::join!(ending, stopped);
    let waited = ended - stopped;
    assert!(waited >= FAREWELL && waited <= 2 * FAREWELL, "{waited:?}");
}
