//! Serves the DNS of one pod: receives queries, answers or forwards them, and ends with the pod.

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::op::ResponseCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinSet, yield_now},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    DnsContext,
    forward::{self, AskedResolver, Forwarder},
    health::ResolverHealth,
    message::{self, HandledQuery, QueryOutcome, Transport},
    names::DnsClient,
    share::QueryShare,
    sockets::{self, DnsSockets},
};
use crate::{
    metrics::{
        LabelSet,
        dns::{DnsCounters, DnsLabels},
    },
    pod::ServedPod,
    rarely::Rarely,
    socket,
    threads::{finish_all, report_panic},
};

/// Limit of forwarded queries in progress per pod. Further queries get SERVFAIL: a flood from one
/// pod must use up neither the ports of its netns nor the tunnel's file descriptors.
const MOST_FORWARDED: usize = 256;
/// Limit of TCP connections per pod.
const MOST_CONNECTIONS: usize = 64;
/// An idle connection is closed after this time (RFC 7766 §6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// Datagrams of one pod that are handled before it is the next one's turn.
const TURN: usize = 16;
/// Size of the largest query that is taken over UDP.
const LARGEST_QUERY: usize = 4096;
/// A port without a sender (RFC 863).
const DISCARD: u16 = 9;
/// Time for the kernel to deliver a datagram for which it has already chosen the socket.
const LAST_DATAGRAM: Duration = Duration::from_millis(100);
/// How long an open connection may send queries after the pod is removed.
const LAST_QUESTION: Duration = Duration::from_millis(500);
/// Time limit for queries in progress when the pod is removed.
const LAST: Duration = Duration::from_secs(5);

/// The limits of one pod.
#[derive(Debug)]
struct PodDns {
    pod: Arc<ServedPod>,
    context: Rc<DnsContext>,
    forwards: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    share: QueryShare,
    health: ResolverHealth,
    /// How many datagrams in a row nobody told the resolver of.
    untold: Cell<u32>,
}

/// Serves `pod` on all of `pairs` until its `stop`.
pub(super) async fn serve(context: Rc<DnsContext>, pod: Arc<ServedPod>, pairs: Vec<DnsSockets>) {
    let pod_dns = Rc::new(PodDns {
        pod,
        context,
        forwards: Arc::new(Semaphore::new(MOST_FORWARDED)),
        connections: Arc::new(Semaphore::new(MOST_CONNECTIONS)),
        share: QueryShare::new(),
        health: ResolverHealth::default(),
        untold: Cell::new(0),
    });
    let mut tasks = JoinSet::new();
    for pair in pairs {
        match (UdpSocket::from_std(pair.udp), TcpListener::from_std(pair.tcp)) {
            (Ok(udp), Ok(tcp)) => tasks.spawn_local(one_address(Rc::clone(&pod_dns), Rc::new(udp), tcp)),
            (Err(error), _) | (_, Err(error)) => {
                warn!(pod.uid = pod_dns.pod.uid, %error, "cannot take the pod's DNS sockets");
                continue;
            }
        };
    }
    finish_all(&mut tasks).await;
}

async fn one_address(pod_dns: Rc<PodDns>, udp: Rc<UdpSocket>, tcp: TcpListener) {
    let mut tasks = JoinSet::new();
    loop {
        // No fixed order: a flood of datagrams must not block connections.
        tokio::select! {
            () = pod_dns.pod.stop.cancelled() => break,
            Some(ended) = tasks.join_next() => report_panic(ended),
            received = pod_dns.readable(&udp) => {
                if let Err(error) = received.and_then(|()| pod_dns.receive(&udp, &mut tasks)) {
                    pause("receive a query", &error).await;
                }
                // Or this pod would go on until its socket is empty.
                yield_now().await;
            }
            accepted = tcp.accept() => match accepted {
                Ok((stream, _)) => pod_dns.connection(stream, &mut tasks),
                Err(error) => pause("accept a connection", &error).await,
            },
        }
    }
    // This one first: our kernel programs stop sending queries here when it is closed. Waiting
    // connections are served; closing alone would reset them.
    if let Ok(tcp) = tcp.into_std() {
        while let Ok((stream, _)) = tcp.accept() {
            if let Ok(stream) = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
                pod_dns.connection(stream, &mut tasks);
            }
        }
    }
    // A connected socket receives nothing from other senders, so a successor receives new
    // datagrams. Those that are already queued here are still answered.
    if let Ok(own) = udp.local_addr() {
        let _ = udp.connect((own.ip(), DISCARD)).await;
    }
    let last = sleep(LAST_DATAGRAM);
    tokio::pin!(last);
    loop {
        tokio::select! {
            received = udp.readable() => {
                if received.and_then(|()| pod_dns.receive(&udp, &mut tasks)).is_err() {
                    break;
                }
            }
            () = &mut last => break,
        }
    }
    if timeout(LAST, finish_all(&mut tasks)).await.is_err() {
        debug!(pod.uid = pod_dns.pod.uid, "queries of a stopped pod are given up");
    }
}

/// Out of descriptors or memory: retrying at once would spin.
async fn pause(attempt: &str, error: &io::Error) {
    /// For all pods: they fail together.
    static FAILED: Rarely = Rarely::every(Duration::from_secs(10));
    if let Some(left_out) = FAILED.due() {
        warn!(%error, left_out, "cannot {attempt}");
    }
    sleep(Duration::from_millis(100)).await;
}

impl PodDns {
    /// Waits for a datagram, and for the pod's share of queries.
    async fn readable(&self, socket: &UdpSocket) -> io::Result<()> {
        self.share.available().await;
        socket.readable().await
    }

    /// Handles the datagrams that are there, at most a turn's.
    fn receive(self: &Rc<Self>, socket: &Rc<UdpSocket>, tasks: &mut JoinSet<()>) -> io::Result<()> {
        let mut scratch = self.context.scratch.borrow_mut();
        for _ in 0..TURN {
            match socket.try_recv_from(&mut scratch) {
                Ok((length, client)) => self.datagram(socket, &scratch[..length], client, tasks),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn datagram(
        self: &Rc<Self>,
        socket: &Rc<UdpSocket>,
        query: &[u8],
        client: SocketAddr,
        tasks: &mut JoinSet<()>,
    ) {
        match self.handle(query, Transport::Udp) {
            Outcome::Nothing => {}
            Outcome::Reply(reply) => send(socket, &reply, client),
            Outcome::Ask(counters, permit) => {
                let (pod_dns, socket, query) = (Rc::clone(self), Rc::clone(socket), query.to_vec());
                tasks.spawn_local(async move {
                    let asked = pod_dns.asked(client);
                    if let Some(reply) = pod_dns.ask(&query, Transport::Udp, asked, counters, permit).await {
                        send(&socket, &reply, client);
                    }
                });
            }
        }
    }

    /// The resolver that `client` sent its datagram to. Where nothing in the kernel knows it, as
    /// under an iptables agent, that is soon asked for in vain only now and then.
    fn asked(&self, client: SocketAddr) -> Option<AskedResolver> {
        let untold = self.untold.get();
        self.untold.set(untold.wrapping_add(1));
        if untold >= 16 && !untold.is_multiple_of(64) {
            return None;
        }
        let (address, socket) = sockets::asked(&self.pod, client)?;
        self.untold.set(0);
        Some(AskedResolver { address, socket: Some(socket) })
    }

    fn connection(self: &Rc<Self>, stream: TcpStream, tasks: &mut JoinSet<()>) {
        // Closed at once: the client notices and may use UDP.
        let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else { return };
        let Some(descriptors) = self.pod.budget.descriptors.take(1) else { return };
        let pod_dns = Rc::clone(self);
        tasks.spawn_local(async move {
            if let Err(error) = pod_dns.talk(stream).await {
                debug!(pod.uid = pod_dns.pod.uid, %error, "a DNS connection broke");
            }
            drop((permit, descriptors));
        });
    }

    /// Handles one query after the other until the client closes, is idle for too long, or the pod
    /// is removed.
    async fn talk(&self, mut stream: TcpStream) -> io::Result<()> {
        let own = stream.local_addr()?;
        let asked = socket::original_dst(&stream).ok().map(|asked| asked.address);
        let asked = asked.filter(|asked| *asked != socket::canonical(own));
        loop {
            self.share.available().await;
            let stopped = async {
                self.pod.stop.cancelled().await;
                sleep(LAST_QUESTION).await;
            };
            let length = tokio::select! {
                () = stopped => return Ok(()),
                length = timeout(IDLE, stream.read_u16()) => match length {
                    Ok(Ok(length)) => length,
                    Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                    Ok(Err(error)) => return Err(error),
                    Err(_) => return Ok(()),
                },
            };
            let query = timeout(IDLE, forward::read_message(&mut stream, length)).await??;
            let reply = match self.handle(&query, Transport::Tcp) {
                Outcome::Nothing => return Ok(()),
                Outcome::Reply(reply) => Some(reply),
                Outcome::Ask(counters, permit) => {
                    let asked = asked.map(|address| AskedResolver { address, socket: None });
                    self.ask(&query, Transport::Tcp, asked, counters, permit).await
                }
            };
            let Some(reply) = reply else { return Ok(()) };
            timeout(IDLE, stream.write_all(&forward::framed(&reply)?)).await??;
        }
    }

    fn client(&self) -> DnsClient<'_> {
        DnsClient { namespace: &self.pod.info.namespace, network: &self.context.process.config.network }
    }

    fn handle(&self, query: &[u8], transport: Transport) -> Outcome {
        self.share.take();
        if transport == Transport::Udp && query.len() > LARGEST_QUERY {
            return message::error(query, ResponseCode::FormErr).map_or(Outcome::Nothing, Outcome::Reply);
        }
        let mesh = self.context.process.store.snapshot();
        let HandledQuery { query_type, step } =
            message::answer(&mesh, &self.context.zone, self.client(), transport, query);
        if step == QueryOutcome::Ignore {
            return Outcome::Nothing;
        }
        let workload = self.pod.workload(&mesh);
        let labels = DnsLabels::new(query_type, transport.as_str(), workload.map(|workload| &**workload));
        let counters = self.context.process.metrics.dns.get(labels);
        counters.requests.inc();
        match step {
            QueryOutcome::Reply(reply) => Outcome::Reply(reply),
            QueryOutcome::Forward => match Arc::clone(&self.forwards).try_acquire_owned() {
                Ok(permit) => Outcome::Ask(counters, permit),
                Err(_) => {
                    message::error(query, ResponseCode::ServFail).map_or(Outcome::Nothing, Outcome::Reply)
                }
            },
            QueryOutcome::Ignore => Outcome::Nothing,
        }
    }

    /// The upstream reply, or an error reply if there is none.
    async fn ask(
        &self,
        query: &[u8],
        transport: Transport,
        asked: Option<AskedResolver>,
        counters: QueryCounters,
        _permit: OwnedSemaphorePermit,
    ) -> Option<Vec<u8>> {
        counters.upstream_requests.inc();
        let started = Instant::now();
        let DnsContext { resolvers, scratch, process, zone } = &*self.context;
        let forwarder = Forwarder { pod: &self.pod, health: &self.health, configured: resolvers, scratch };
        let reply = forward::ask(forwarder, asked, query, transport).await;
        counters.upstream_duration.observe(started.elapsed().as_secs_f64());
        reply
            .inspect_err(|error| {
                counters.upstream_failures.inc();
                let error: &dyn std::error::Error = error;
                debug!(pod.uid = self.pod.uid, error, "a query was not answered");
            })
            .ok()
            .map(|reply| match message::code(&reply) {
                ResponseCode::NXDomain => {
                    let mesh = process.store.snapshot();
                    message::answer_instead(&mesh, zone, self.client(), transport, query).unwrap_or(reply)
                }
                _ => reply,
            })
            .or_else(|| message::error(query, ResponseCode::ServFail))
    }
}

/// Those of the client that asks.
type QueryCounters = Arc<LabelSet<DnsLabels, DnsCounters>>;

/// The remaining work for a query.
enum Outcome {
    Nothing,
    Reply(Vec<u8>),
    Ask(QueryCounters, OwnedSemaphorePermit),
}

/// A reply that cannot be sent at once is dropped, as datagrams may be; the client retries.
fn send(socket: &UdpSocket, reply: &[u8], client: SocketAddr) {
    if let Err(error) = socket.try_send_to(reply, client) {
        debug!(%error, "a reply was lost");
    }
}
