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

const MESH: &str = "
workloads:
- {name: web, namespace: demo, serviceAccount: web, workloadIps: [10.0.0.1], authorizationPolicies: [demo/p]}
services:
- {name: web, namespace: demo, hostname: web.demo.svc.cluster.local, vips: [/10.96.0.1], ports: {80: 8080}}
policies:
- {name: p, namespace: demo, scope: WorkloadSelector, action: Allow, rules: []}
";

/// The clock is tokio's, which goes on as soon as everybody waits.
#[tokio::test(start_paused = true)]
async fn nothing_that_is_known_ends_while_the_control_plane_is_away_for_an_hour() {
    let vars = [("XDS_ADDRESS", "unix:/nowhere/xds.sock"), ("AUTH_TOKEN", "a.b.c")];
    let config = Config::from_vars(vars.map(|(key, value)| (key.to_owned(), value.to_owned()))).unwrap();
    let defaults = ResourceDefaults::from(&config);
    let mesh = crate::mesh::local_file::parse(MESH, &defaults).unwrap();
    let store = Arc::new(Store::new(mesh));
    let readiness = Readiness::default();
    let (stop, metrics) = (CancellationToken::new(), Metrics::default());
    let client = DiscoveryClient::new(
        config.xds.as_ref().unwrap(),
        defaults,
        Arc::clone(&store),
        None,
        None,
        &metrics,
        readiness.task("state manager"),
    );
    let (before, known) = (store.snapshot(), store.is_known());
    let running = tokio::spawn(client.run(stop.clone()));
    let began = tokio::time::Instant::now();
    tokio::time::sleep(Duration::from_hours(1)).await;
    assert!(began.elapsed() >= Duration::from_hours(1) && !running.is_finished());
    assert!(Arc::ptr_eq(&before, &store.snapshot()), "it changed");
    assert_eq!((store.is_known(), before.workloads().count(), before.policies().count()), (known, 1, 1));
    stop.cancel();
    running.await.unwrap();
}
