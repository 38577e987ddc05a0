//! A tunnel that lives, answers pings, and reads nothing.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message as _;
use testbed::wait::wait_at_most;
use tokio::time::timeout;
use ztunnel_api::discovery::DeltaDiscoveryRequest;

use crate::rig::{AUTHORIZATION, Control, LIMIT, unique};

/// A message as gRPC frames it: not compressed, and its length.
fn framed(message: &DeltaDiscoveryRequest) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.encoded_len().try_into().unwrap());
    message.encode(&mut frame).unwrap();
    frame.freeze()
}

/// With a window of nothing: whatever is sent waits, and so would an error.
async fn connect(control: &Control, token: &str) -> tokio::task::JoinHandle<Result<(), h2::Error>> {
    let stream = control.connect().await;
    let (mut client, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake(stream).await.unwrap();
    let request = http::Request::post(format!(
        "https://localhost:{}/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
        control.grpc.port()
    ));
    let request = request
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {token}"));
    let (response, mut body) = client.send_request(request.body(()).unwrap(), false).unwrap();
    let subscribe =
        DeltaDiscoveryRequest { type_url: AUTHORIZATION.to_owned(), ..DeltaDiscoveryRequest::default() };
    body.send_data(framed(&subscribe), false).unwrap();
    tokio::spawn(async move {
        // All of it is held while the connection lives.
        let held = (client, body, response);
        let ended = connection.await;
        drop(held);
        ended
    })
}

#[test]
#[ignore = "needs an API server: make test"]
fn a_tunnel_that_does_not_read_loses_its_connection() {
    let control = Control::start(&["--acknowledge-secs", "1"]);
    let token = control.token(&unique("node"));
    let connection = control.runtime.block_on(connect(&control, &token));
    wait_at_most(LIMIT, "the tunnel to be given up", || {
        (control.metric("ztunnel_control_unacknowledged_total") >= 1.0).then_some(())
    });
    // Its last response could not even be sent.
    let ended = control.runtime.block_on(async { timeout(Duration::from_secs(10), connection).await });
    assert!(ended.is_ok(), "the connection is still open\n{}", control.log());
}
