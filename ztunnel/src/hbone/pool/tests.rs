use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::Method;
use tokio::{
    sync::watch,
    task::{LocalSet, spawn_local},
    time::sleep,
};

use super::*;
use crate::{
    config::H2Config,
    hbone::client,
    memory::{MemoryBudget, MemoryMetrics, TunnelMemory},
};

const H2: H2Config = H2Config { stream_window: 1 << 20, connection_window: 4 << 20, frame: 1 << 20 };

const ANSWER_LIMIT: Duration = Duration::from_secs(15);

/// How long dialling takes.
const DIAL: Duration = Duration::from_millis(5);

/// What a server does with its connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    /// Answers 200 to everything, and keeps the streams.
    Good,
    /// Says GOAWAY after the first answer; that stream goes on.
    Leaves,
    /// Answers once, and breaks at the second request.
    Breaks,
    /// Answers nothing.
    Silent,
    /// Answers, and says GOAWAY when the bed is told to leave.
    LeavesLater,
    /// Answers the first request, and nothing more after the bed is told to leave.
    Dies,
}

struct Bed {
    pool: TunnelPool,
    dials: Rc<Cell<usize>>,
    leave: watch::Sender<bool>,
}

impl Bed {
    fn new(max_streams: u32, idle: Duration) -> Self {
        Self {
            pool: TunnelPool::new(
                config::PoolConfig { max_streams, idle, answer_limit: ANSWER_LIMIT },
                PoolMetrics::default(),
            ),
            dials: Rc::default(),
            leave: watch::Sender::new(false),
        }
    }

    async fn open(
        &self,
        key: &TunnelKey,
        server: Server,
    ) -> Result<(HboneStream, StreamLease), Arc<ConnectError>> {
        let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
        let dial = || {
            let (dials, leave) = (Rc::clone(&self.dials), self.leave.subscribe());
            async move {
                dials.set(dials.get() + 1);
                sleep(DIAL).await;
                let (ours, theirs) = tokio::io::duplex(64 << 10);
                spawn_local(serve(theirs, server, leave));
                let budget = MemoryBudget::new(1 << 30, MemoryMetrics::default());
                let memory = TunnelMemory::new(&budget, H2.stream_window);
                client::http(ours, "10.0.0.1:15008".parse().unwrap(), &H2, memory).await
            }
        };
        self.pool.open(key, &request, dial).await.map(|(_, stream, lease)| (stream, lease))
    }
}

async fn serve(io: tokio::io::DuplexStream, server: Server, mut leave: watch::Receiver<bool>) {
    let mut connection = h2::server::Builder::new().handshake::<_, Bytes>(io).await.unwrap();
    let (mut streams, mut waiting) = (Vec::new(), Vec::new());
    let mut left = false;
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            () = async { drop(leave.wait_for(|leave| *leave).await) }, if !left => {
                left = true;
                match server {
                    Server::LeavesLater => connection.graceful_shutdown(),
                    Server::Dies => std::future::pending().await,
                    _ => {}
                }
                continue;
            }
        };
        let Some(Ok((request, mut respond))) = accepted else { return };
        if server == Server::Breaks && !streams.is_empty() {
            return;
        }
        if server == Server::Silent {
            waiting.push((request, respond));
            continue;
        }
        streams.push((respond.send_response(Response::new(()), false).unwrap(), request));
        if server == Server::Leaves {
            connection.graceful_shutdown();
        }
    }
}

fn key(source: &str) -> TunnelKey {
    let id = |name: &str| format!("spiffe://td/ns/a/sa/{name}").parse().unwrap();
    let netns = adit_netns::Netns::current().unwrap().id();
    TunnelKey {
        source: id(source),
        expected: vec![id("server")],
        peer: "10.0.0.1:15008".parse().unwrap(),
        netns,
    }
}

async fn local(test: impl Future<Output = ()>) {
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn concurrent_first_requests_share_one_handshake() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(5));
        let key = key("a");
        let opened = join_all((0..20).map(|_| bed.open(&key, Server::Good))).await;
        assert!(opened.iter().all(Result::is_ok));
        assert_eq!((bed.dials.get(), bed.pool.tunnels(&key)), (1, 1));
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn full_tunnel_is_joined_by_another_and_keys_do_not_share() {
    let test = async {
        let bed = Bed::new(2, Duration::from_mins(5));
        let mut leases = Vec::new();
        for _ in 0..5 {
            leases.push(bed.open(&key("a"), Server::Good).await.unwrap());
        }
        assert_eq!(bed.dials.get(), 3);
        leases.clear();
        let _again = bed.open(&key("a"), Server::Good).await.unwrap();
        assert_eq!(bed.dials.get(), 3, "room again");
        let _other = bed.open(&key("b"), Server::Good).await.unwrap();
        assert_eq!(bed.dials.get(), 4);
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn server_that_leaves_gets_no_new_streams_and_none_is_lost() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(5));
        for round in 1..=3 {
            let _stays_open = bed.open(&key("a"), Server::Leaves).await.unwrap();
            assert_eq!(bed.dials.get(), round);
        }
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn request_that_lost_its_tunnel_is_sent_again() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(5));
        let _first = bed.open(&key("a"), Server::Breaks).await.unwrap();
        let _second = bed.open(&key("a"), Server::Breaks).await.unwrap();
        assert_eq!(bed.dials.get(), 2);
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_not_answered_ends_and_gives_its_place_back() {
    let test = async {
        let bed = Bed::new(1, Duration::from_mins(5));
        for _ in 0..3 {
            let error = bed.open(&key("a"), Server::Silent).await.expect_err("no answer");
            assert!(matches!(*error, ConnectError::NoAnswer { limit: ANSWER_LIMIT, .. }), "{error}");
        }
        assert_eq!(bed.dials.get(), 1, "the tunnel has room again");
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn unused_tunnel_is_closed_and_a_used_one_is_kept() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(1));
        let (idle, busy) = (key("idle"), key("busy"));
        drop(bed.open(&idle, Server::Good).await.unwrap());
        let kept = bed.open(&busy, Server::Good).await.unwrap();
        sleep(Duration::from_secs(59)).await;
        assert_eq!((bed.pool.tunnels(&idle), bed.pool.tunnels(&busy)), (1, 1));
        sleep(Duration::from_hours(1)).await;
        assert_eq!((bed.pool.tunnels(&idle), bed.pool.tunnels(&busy)), (0, 1));
        drop(kept);
        sleep(Duration::from_secs(61)).await;
        assert_eq!(bed.pool.tunnels(&busy), 0);
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn failed_handshake_fails_who_was_there_when_it_began_and_is_tried_anew_for_the_others() {
    let test = async {
        let pool = TunnelPool::new(
            config::PoolConfig { max_streams: 100, idle: Duration::from_mins(1), answer_limit: ANSWER_LIMIT },
            PoolMetrics::default(),
        );
        let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
        let dials = Rc::new(Cell::new(0));
        let dial = || {
            dials.set(dials.get() + 1);
            async { Err(ConnectError::Abandoned) }
        };
        let key = key("a");
        let opened = join_all((0..10).map(|_| pool.open(&key, &request, dial))).await;
        assert!(opened.iter().all(Result::is_err));
        assert_eq!(dials.get(), 2, "one for the first, one for the others");
        assert!(pool.open(&key, &request, dial).await.is_err());
        assert_eq!(dials.get(), 3);
        assert!(pool.0.groups.borrow().is_empty(), "no trace of keys that failed");
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn forgotten_netns_keeps_no_tunnel() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(5));
        let key = key("a");
        drop(bed.open(&key, Server::Good).await.unwrap());
        bed.pool.forget(key.netns);
        assert_eq!(bed.pool.tunnels(&key), 0);
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_handshake_does_not_fail_those_who_came_after_it_began() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(5));
        let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
        let key = key("a");
        let failing = bed.pool.open(&key, &request, || async {
            sleep(DIAL).await;
            Err(ConnectError::Abandoned)
        });
        let others = join_all((0..10).map(|_| bed.open(&key, Server::Good)));
        let (failed, others) = tokio::join!(failing, others);
        assert!(failed.is_err());
        assert!(others.iter().all(Result::is_ok));
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn many_first_requests_open_their_tunnels_at_the_same_time() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(5));
        let (key, begun) = (key("a"), Instant::now());
        let opened = join_all((0..1000).map(|_| bed.open(&key, Server::Good))).await;
        assert!(opened.iter().all(Result::is_ok));
        assert!(begun.elapsed() < 3 * DIAL, "{:?}, with {} tunnels", begun.elapsed(), bed.dials.get());
        assert!(bed.pool.tunnels(&key) <= 12, "{} tunnels", bed.pool.tunnels(&key));
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn tunnels_that_are_leaving_are_passed_over_however_many_they_are() {
    let test = async {
        let bed = Bed::new(2, Duration::from_mins(5));
        let key = key("a");
        let mut open = Vec::new();
        for _ in 0..12 {
            open.push(bed.open(&key, Server::LeavesLater).await.unwrap());
        }
        assert_eq!(bed.dials.get(), 6);
        // Each has room for one more, and has said GOAWAY.
        let mut number = 0;
        open.retain(|_| {
            number += 1;
            number % 2 == 0
        });
        bed.leave.send_replace(true);
        sleep(Duration::from_secs(1)).await;
        bed.open(&key, Server::Good).await.expect("a seventh tunnel carries it");
        assert_eq!(bed.dials.get(), 7);
    };
    local(test).await;
}

#[tokio::test(start_paused = true)]
async fn many_streams_are_spread_over_a_few_tunnels_and_few_streams_share_one() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(5));
        let key = key("a");
        let mut open = Vec::new();
        for (streams, tunnels) in [(20, 1), (40, 2), (200, 4), (400, 4)] {
            while open.len() < streams {
                open.push(bed.open(&key, Server::Good).await.unwrap());
                sleep(DIAL * 2).await;
            }
            assert_eq!(bed.pool.tunnels(&key), tunnels, "{streams} streams");
        }
    };
    local(test).await;
}

/// Nobody asks an unused tunnel whether its peer lives. So its next user finds out, in less time
/// than it takes for a tunnel in use, and another tunnel carries it.
#[tokio::test(start_paused = true)]
async fn a_tunnel_that_died_unused_delays_its_next_user_and_does_not_fail_it() {
    let test = async {
        let bed = Bed::new(100, Duration::from_mins(5));
        let key = key("a");
        drop(bed.open(&key, Server::Dies).await.unwrap());
        bed.leave.send_replace(true);
        sleep(Duration::from_mins(1)).await;
        assert_eq!(bed.pool.tunnels(&key), 1);
        bed.leave.send_replace(false);
        let begun = Instant::now();
        bed.open(&key, Server::Good).await.expect("another tunnel");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert_eq!(bed.dials.get(), 2);
    };
    local(test).await;
}
