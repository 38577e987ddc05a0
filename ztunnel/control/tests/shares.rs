//! What one caller may take, so that something is left for the others.

use std::time::Duration;

use tokio::{
    io::AsyncReadExt as _,
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tonic::Code;

use crate::rig::{Control, LIMIT, unique};

/// A connection from another address than those of the tests' tunnels.
async fn from_elsewhere(control: &Control) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    socket.connect(control.grpc).await.unwrap()
}

/// More than there may be handshakes at a time.
#[test]
#[ignore = "needs an API server: make test"]
fn an_address_has_its_share_of_connections_and_others_are_served() {
    let control = Control::start(&[]);
    let mut held: Vec<TcpStream> = control.runtime.block_on(async {
        let mut held = Vec::new();
        for _ in 0..300 {
            held.push(from_elsewhere(&control).await);
        }
        held
    });
    // They would be given up after 10 s.
    let token = control.token(&unique("node"));
    let opened = control.runtime.block_on(async { timeout(Duration::from_secs(5), control.connect()).await });
    assert!(opened.is_ok(), "nobody else is served");
    control.stream(&token).unwrap();
    let last = held.last_mut().unwrap();
    let read = control.runtime.block_on(async { timeout(LIMIT, last.read(&mut [0; 1])).await });
    assert!(matches!(read, Ok(Ok(0) | Err(_))), "it is refused: {read:?}");
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_node_has_its_share_of_streams() {
    let control = Control::start(&[]);
    let token = control.token(&unique("node"));
    let mut held: Vec<_> = (0..8).map(|_| control.stream(&token).unwrap()).collect();
    let refused = control.stream(&token).err().expect("a refusal");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    control.stream(&control.token(&unique("node"))).expect("another node has its own");
    held.pop();
    testbed::wait::wait_for("the place of one that ended", || control.stream(&token).ok().map(drop));
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_connection_without_a_call_is_cut() {
    let control = Control::start(&[]);
    let token = control.token(&unique("node"));
    let mut stream = control.stream(&token).unwrap();
    let ended = control.runtime.block_on(async {
        let mut silent = control.connect().await;
        // The server greets; then it waits for a call.
        let mut all = Vec::new();
        timeout(Duration::from_secs(40), silent.read_to_end(&mut all)).await
    });
    assert!(ended.is_ok(), "it is still open");
    assert!(stream.is_silent_for(Duration::from_millis(100)), "a connection with a stream stays");
}
