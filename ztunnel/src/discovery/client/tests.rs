use bytes::Bytes;
use tokio::{net::UnixListener, time::timeout};

use super::*;
use crate::{config::Config, readiness::Readiness};

/// Answers pings, and nothing else.
async fn mute(socket: tokio::net::UnixStream, begun: mpsc::UnboundedSender<()>) {
    let mut connection = h2::server::handshake(socket).await.unwrap();
    let mut kept = Vec::new();
    while let Some(Ok(stream)) = connection.accept().await {
        let stream: (http::Request<h2::RecvStream>, h2::server::SendResponse<Bytes>) = stream;
        kept.push(stream);
        let _ = begun.send(());
    }
}

#[tokio::test]
async fn a_control_plane_that_answers_pings_and_nothing_else_is_called_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("xds.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (begun, mut calls) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            tokio::spawn(mute(socket, begun.clone()));
        }
    });
    let vars = [("XDS_ADDRESS", format!("unix:{}", path.display())), ("AUTH_TOKEN", "a.b.c".to_owned())];
    let config = Config::from_vars(vars.map(|(key, value)| (key.to_owned(), value))).unwrap();
    let readiness = Readiness::default();
    let mut client = DiscoveryClient::new(
        config.xds.as_ref().unwrap(),
        ResourceDefaults::from(&config),
        Arc::default(),
        None,
        None,
        &Metrics::default(),
        readiness.task("state manager"),
    );
    client.begin = Duration::from_millis(100);
    let stop = CancellationToken::new();
    let running = tokio::spawn(client.run(stop.clone()));
    for call in 0..3 {
        let begun = timeout(Duration::from_secs(20), calls.recv()).await;
        assert!(matches!(begun, Ok(Some(()))), "call {call} was never made");
    }
    stop.cancel();
    running.await.unwrap();
}
