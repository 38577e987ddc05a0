//! TLS over the connection to a peer, whose buffers count in the memory budgets.
//!
//! What a tunnel writes is encrypted before the connection takes it: rustls keeps up to 256 KiB of a
//! tunnel whose peer does not read. Once the pod or the process holds what its budget allows, it
//! keeps one record at a time. What it has received and HTTP/2 has not taken yet is two records at
//! most, since it reads no more before; the [buffer](ReadAhead) below it counts while it is large.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsStream;

use super::read_ahead::ReadAhead;
use crate::memory::{TunnelBuffers, TunnelMemory};

/// So much plaintext is encrypted before it is written to the socket; by itself rustls stops at 64
/// KiB.
pub(super) const TLS_WRITE: usize = 256 << 10;
/// The plaintext of the largest record (RFC 8446 §5.1).
const RECORD: usize = 16 << 10;

/// A [`TlsStream`] in the budgets of its tunnel.
pub(crate) struct TlsIo<S> {
    tls: TlsStream<ReadAhead<S>>,
    memory: TunnelBuffers,
    /// Bytes given to TLS, and taken by the connection by then, when nothing was left to write.
    empty_at: u64,
    /// Bytes given to TLS since.
    given: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsIo<S> {
    /// After the handshake; its buffer limit is [`TLS_WRITE`].
    pub(crate) fn new(tls: impl Into<TlsStream<ReadAhead<S>>>, memory: &TunnelMemory) -> Self {
        let tls = tls.into();
        let empty_at = tls.get_ref().0.written();
        Self { tls, memory: memory.buffers(), empty_at, given: 0 }
    }

    /// What is encrypted and was not taken by the connection: without what encryption adds, which is
    /// 22 bytes for each record.
    fn unwritten(&mut self) -> usize {
        let (io, session) = self.tls.get_ref();
        if !session.wants_write() {
            (self.empty_at, self.given) = (io.written(), 0);
            return 0;
        }
        let left = self.given.saturating_sub(io.written() - self.empty_at);
        usize::try_from(left).unwrap_or(usize::MAX)
    }

    fn count(&mut self) {
        let kept = self.unwritten() + self.tls.get_ref().0.kept();
        self.memory.keep(kept);
    }

    /// Ready when a write may be taken, with how much of it.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.memory.has_room() {
            return Poll::Ready(Ok(usize::MAX));
        }
        if self.unwritten() > 0 {
            let flushed = Pin::new(&mut self.tls).poll_flush(cx);
            self.count();
            ready!(flushed)?;
        }
        Poll::Ready(Ok(RECORD))
    }

    fn given(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &written {
            self.given += *count as u64;
        }
        self.count();
        written
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = self.tls.get_ref().0.kept();
        let read = Pin::new(&mut self.tls).poll_read(cx, into);
        if self.tls.get_ref().0.kept() != before {
            self.count();
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(cx))?;
        let written = Pin::new(&mut self.tls).poll_write(cx, &data[..data.len().min(room)]);
        self.given(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(cx))?;
        let first = data.iter().find(|part| !part.is_empty());
        let written = match first.filter(|_| room < usize::MAX) {
            Some(part) => Pin::new(&mut self.tls).poll_write(cx, &part[..part.len().min(room)]),
            None => Pin::new(&mut self.tls).poll_write_vectored(cx, data),
        };
        self.given(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.tls).poll_flush(cx);
        self.count();
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use rustls_pki_types::ServerName;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::timeout,
    };
    use tokio_rustls::{TlsAcceptor, TlsConnector};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        config::Config,
        identity::Certificates,
        memory::{MemoryBudget, MemoryMetrics},
    };

    /// What the connection between the two takes.
    const CONNECTION: usize = 4 << 10;

    /// The two ends of a tunnel, the first one in `memory`.
    async fn shaken(memory: &TunnelMemory) -> (TlsIo<DuplexStream>, TlsStream<DuplexStream>) {
        let folder = tempfile::tempdir().unwrap();
        let vars = HashMap::from([("DEVELOPMENT_CA_DIR".to_owned(), folder.path().display().to_string())]);
        let certificates = Certificates::new(&Config::from_vars(vars).unwrap(), Arc::default()).unwrap();
        let fetching = tokio::spawn(Arc::clone(&certificates).run(CancellationToken::new()));
        let _lease = certificates.lease("demo".into(), "web".into());
        let identity = "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap();
        let credentials = certificates.get(&identity).await.unwrap();
        fetching.abort();
        let (near, far) = duplex(CONNECTION);
        let name = ServerName::IpAddress(std::net::IpAddr::from([10, 0, 0, 1]).into());
        let client = TlsConnector::from(credentials.client(&[identity]));
        let server = TlsAcceptor::from(credentials.server());
        let (client, server) = tokio::join!(client.connect(name, ReadAhead::new(near)), server.accept(far));
        let mut client = client.unwrap();
        client.get_mut().1.set_buffer_limit(Some(TLS_WRITE));
        (TlsIo::new(client, memory), server.unwrap().into())
    }

    /// Writes until nothing more is taken; how much was.
    async fn fill(io: &mut TlsIo<DuplexStream>) -> usize {
        let (block, mut taken) = (vec![7; 64 << 10], 0);
        while let Ok(written) = timeout(std::time::Duration::from_millis(50), io.write(&block)).await {
            taken += written.unwrap();
        }
        taken
    }

    async fn drain(far: &mut TlsStream<DuplexStream>, bytes: usize, io: &mut TlsIo<DuplexStream>) {
        let mut received = vec![0; bytes];
        let (read, flushed) = tokio::join!(far.read_exact(&mut received), io.flush());
        assert_eq!((read.unwrap(), flushed.unwrap()), (bytes, ()));
        assert!(received.iter().all(|&byte| byte == 7));
    }

    fn held(metrics: &MemoryMetrics) -> usize {
        metrics.held.get().try_into().unwrap()
    }

    #[tokio::test]
    async fn what_tls_keeps_for_a_peer_that_does_not_read_is_shown_until_it_reads() {
        let metrics = MemoryMetrics::default();
        let memory = TunnelMemory::new(&MemoryBudget::new(1 << 30, metrics.clone()), 1 << 20);
        let (mut io, mut far) = shaken(&memory).await;
        let taken = fill(&mut io).await;
        assert!(taken >= TLS_WRITE, "{taken}");
        assert!((TLS_WRITE - (64 << 10)..=TLS_WRITE).contains(&held(&metrics)), "{}", held(&metrics));
        drain(&mut far, taken, &mut io).await;
        assert_eq!(held(&metrics), 0);
        let taken = fill(&mut io).await;
        assert!(taken >= TLS_WRITE && held(&metrics) > 0);
        drop(io);
        assert_eq!(held(&metrics), 0, "it went with the tunnel");
    }

    #[tokio::test]
    async fn tls_keeps_one_record_when_the_budget_is_spent() {
        let metrics = MemoryMetrics::default();
        let process = MemoryBudget::new(1 << 30, metrics.clone());
        let pod = process.of_pod(1 << 20);
        let spent = TunnelMemory::new(&pod, 1 << 20);
        let much = spent.stream().send_queue().data(vec![0; 1 << 20].into(), 1 << 20);
        let memory = TunnelMemory::new(&pod, 1 << 20);
        let (mut io, mut far) = shaken(&memory).await;
        let taken = fill(&mut io).await;
        assert_eq!(taken, RECORD);
        drain(&mut far, taken, &mut io).await;
        drop(much);
        assert!(fill(&mut io).await >= TLS_WRITE, "there is room again");
    }
}
