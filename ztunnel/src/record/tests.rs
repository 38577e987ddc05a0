use std::{
    io,
    sync::{Mutex, MutexGuard},
};

use tracing::{Level, subscriber::with_default};

use super::*;
use crate::{
    direction::Direction,
    mesh::tests::{service, workload},
};

/// What the log shows of `run`, without times.
fn logged(run: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl Lines {
        fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap()
        }
    }
    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.lock().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .without_time()
        .with_ansi(false)
        .with_max_level(Level::INFO)
        .with_writer(move || writer.clone())
        .finish();
    with_default(subscriber, run);
    let text = lines.lock().clone();
    // How long it took is the one thing that differs.
    let text = String::from_utf8(text).unwrap();
    match text.split_once("duration=\"") {
        Some((before, rest)) => {
            format!("{before}duration=\"{}", rest.trim_start_matches(|c: char| c.is_ascii_digit()))
        }
        None => text,
    }
}

#[derive(Debug, thiserror::Error)]
#[error("connection failed")]
struct Refused(#[source] io::Error);

impl ConnectionFailure for Refused {
    fn reason(&self) -> FailureReason {
        FailureReason::Connect
    }

    fn response_flags(&self) -> &'static str {
        "CONNECT"
    }
}

fn refused() -> Refused {
    Refused(io::Error::new(io::ErrorKind::ConnectionRefused, "refused"))
}

/// `client` to service `web` over HBONE.
fn ends(direction: Direction) -> ConnectionEnds {
    let (client, web) = (workload("client", "10.0.0.1"), workload("web-1", "10.0.0.2"));
    ConnectionEnds {
        hbone: Some("10.0.0.2:8080".parse().unwrap()),
        source_identity: Some(client.identity()),
        source_workload: Some(client.into()),
        destination_identity: Some(web.identity()),
        destination_workload: Some(web.into()),
        destination_service: Some(service("web", "10.96.0.1").into()),
        ..ConnectionEnds::new(direction, "10.0.0.1:40000".parse().unwrap(), "10.0.0.2:15008".parse().unwrap())
    }
}

#[test]
fn a_record_has_istios_fields_in_their_order() {
    let log = logged(|| {
        let record = ConnectionRecord::open(&Arc::new(Metrics::default()), ends(Direction::Outbound));
        record.counters().sent(11);
        record.counters().received(22);
        record.close(Ok(()));
    });
    let expected = " INFO access: connection complete src.addr=10.0.0.1:40000 src.workload=\"client\" \
        src.namespace=\"default\" src.identity=\"spiffe://cluster.local/ns/default/sa/client\" \
        src.cluster=\"Kubernetes\" dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:8080 \
        dst.service=\"web.default.svc.cluster.local\" dst.workload=\"web-1\" dst.namespace=\"default\" \
        dst.identity=\"spiffe://cluster.local/ns/default/sa/web\" dst.cluster=\"Kubernetes\" \
        direction=\"outbound\" bytes_sent=11 bytes_recv=22 duration=\"ms\"\n";
    assert_eq!(log, expected);
}

#[test]
fn what_is_unknown_is_left_out() {
    let log = logged(|| {
        let ends = ConnectionEnds::new(
            Direction::Inbound,
            "10.0.0.1:40000".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
        );
        ConnectionRecord::open(&Arc::new(Metrics::default()), ends).close(Ok(()));
    });
    assert_eq!(
        log,
        " INFO access: connection complete src.addr=10.0.0.1:40000 dst.addr=10.0.0.2:80 direction=\"inbound\" \
         bytes_sent=0 bytes_recv=0 duration=\"ms\"\n"
    );
}

#[test]
fn a_failure_is_an_error_with_its_causes() {
    let metrics = Arc::new(Metrics::default());
    let log = logged(|| ConnectionRecord::open(&metrics, ends(Direction::Outbound)).close(Err(&refused())));
    assert!(log.starts_with("ERROR access: connection complete "), "{log}");
    assert!(log.ends_with(" error=\"connection failed: refused\" reason=\"connect\"\n"), "{log}");
    let text = metrics.encode().unwrap();
    assert!(text.contains("ztunnel_connection_failures_total{direction=\"outbound\",reason=\"connect\"} 1"));
    let failed = text.lines().find(|line| line.starts_with("istio_tcp_connections_failed_total{")).unwrap();
    assert!(failed.contains("response_flags=\"CONNECT\"") && failed.ends_with(" 1"), "{failed}");
}

#[test]
fn a_record_that_nobody_closed_was_cut() {
    let metrics = Arc::new(Metrics::default());
    let log = logged(|| drop(ConnectionRecord::open(&metrics, ends(Direction::Inbound))));
    assert!(log.ends_with(" error=\"connection cut\" reason=\"cut\"\n"), "{log}");
    assert!(metrics.encode().unwrap().contains("reason=\"cut\"} 1"));
}

#[test]
fn who_is_denied_early_was_never_open() {
    let metrics = Metrics::default();
    let ends = ConnectionEnds::new(
        Direction::Inbound,
        "10.0.0.1:1".parse().unwrap(),
        "10.0.0.2:15008".parse().unwrap(),
    );
    let log = logged(|| record_early_failure(&metrics, &ends, &refused()));
    assert_eq!(
        log,
        " WARN access: connection failed src.addr=10.0.0.1:1 dst.addr=10.0.0.2:15008 direction=\"inbound\" \
         error=\"connection failed: refused\" reason=\"connect\"\n"
    );
    let text = metrics.encode().unwrap();
    assert!(!text.contains("istio_tcp_connections_opened_total{"), "{text}");
    assert!(text.contains("istio_tcp_connections_failed_total{"), "{text}");
}

#[test]
fn metrics_tell_from_the_servers_side_at_both_reporters() {
    let metrics = Arc::new(Metrics::default());
    for direction in [Direction::Inbound, Direction::Outbound] {
        let record = ConnectionRecord::open(&metrics, ends(direction));
        record.counters().sent(11);
        record.counters().received(22);
        record.close(Ok(()));
    }
    let text = metrics.encode().unwrap();
    for (name, value) in [
        ("istio_tcp_received_bytes_total", 11),
        ("istio_tcp_sent_bytes_total", 22),
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_connections_closed_total", 1),
    ] {
        for reporter in ["source", "destination"] {
            let start = format!("{name}{{reporter=\"{reporter}\"");
            let line =
                text.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{start}"));
            assert!(line.ends_with(&format!(" {value}")), "{line}");
            for label in [
                "source_workload=\"client\"",
                "source_principal=\"spiffe://cluster.local/ns/default/sa/client\"",
                "destination_service=\"web.default.svc.cluster.local\"",
                "destination_service_name=\"web\"",
                "destination_app=\"web\"",
                "destination_version=\"unknown\"",
                "connection_security_policy=\"mutual_tls\"",
                "response_flags=\"-\"",
            ] {
                assert!(line.contains(label), "{label} in {line}");
            }
        }
    }
    assert!(text.contains("istio_tcp_sockets_open{reporter=\"source\"} 0"), "{text}");
}

#[test]
fn what_is_learnt_later_shows_in_the_record_and_leaves_the_counters_balanced() {
    let metrics = Arc::new(Metrics::default());
    let log = logged(|| {
        let mut early = ends(Direction::Outbound);
        early.hbone = None;
        early.destination_workload = None;
        let mut record = ConnectionRecord::open(&metrics, early);
        *record.ends_mut() = ends(Direction::Outbound);
        record.close(Ok(()));
    });
    assert!(log.contains("dst.hbone_addr=10.0.0.2:8080") && log.contains("dst.workload=\"web-1\""), "{log}");
    let text = metrics.encode().unwrap();
    let count =
        |name: &str| text.lines().filter(|line| line.starts_with(name) && line.ends_with(" 1")).count();
    assert_eq!(count("istio_tcp_connections_opened_total"), 1);
    assert_eq!(count("istio_tcp_connections_closed_total"), 1);
}

#[test]
fn what_is_open_is_counted_while_it_lives_and_shown_until_it_ends() {
    let metrics = Arc::new(Metrics::default());
    let record = ConnectionRecord::open(&metrics, ends(Direction::Outbound));
    record.counters().sent(11);
    record.counters().received(22);
    let scraped = |name: &str| {
        let text = metrics.encode().unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(scraped("istio_tcp_received_bytes_total"), 11);
    assert_eq!(scraped("istio_tcp_sent_bytes_total"), 22);
    record.counters().sent(1);
    let (views, all) = metrics.open.views(10);
    assert_eq!(all, 1);
    let shown = serde_json::to_value(&views[0]).unwrap();
    assert_eq!(shown["src"], "10.0.0.1:40000");
    assert_eq!(shown["originalDst"], "10.0.0.2:8080");
    assert_eq!(shown["actualDst"], "10.0.0.2:15008");
    assert_eq!(shown["protocol"], "HBONE");
    assert_eq!(shown["bytesSent"], 12);
    assert_eq!(shown["peer"], "default/web-1");
    assert_eq!(&*views[0].pod.1, "client");
    record.close(Ok(()));
    assert_eq!(scraped("istio_tcp_received_bytes_total"), 12);
    assert_eq!(metrics.open.views(10).1, 0);
}

#[test]
fn a_table_of_open_connections_shows_as_many_as_asked_and_counts_all() {
    let metrics = Arc::new(Metrics::default());
    let open = |_| ConnectionRecord::open(&metrics, ends(Direction::Inbound));
    let elsewhere =
        std::thread::scope(|scope| scope.spawn(|| (0..3).map(open).collect::<Vec<_>>()).join().unwrap());
    let here: Vec<_> = (0..4).map(open).collect();
    let (views, all) = metrics.open.views(5);
    assert_eq!((views.len(), all), (5, 7));
    drop((elsewhere, here));
    assert_eq!(metrics.open.views(5).1, 0);
}
