//! The connections that are open now, for the admin server, and for counting bytes before they
//! close.
//!
//! Sharded by thread, so that workers do not contend for a lock when they open and close
//! connections.

use std::{
    cell::Cell,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use slab::Slab;

/// A connection that is open.
pub(crate) trait LiveConnection: Send + Sync + fmt::Debug {
    /// Adds what it carried since the last time to the counters.
    fn count(&self);
    /// What the admin server shows of it.
    fn view(&self) -> ConnectionView;
}

/// An open connection, for the admin server. The first four names are Istio's.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ConnectionView {
    /// The client.
    pub src: SocketAddr,
    /// The address that the client connected to, if the tunnel knows it.
    pub original_dst: Option<String>,
    /// The address that the tunnel connected to.
    pub actual_dst: String,
    /// `HBONE` or `TCP`.
    pub protocol: &'static str,
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// The pod on this node: namespace and name.
    #[serde(skip)]
    pub pod: (Arc<str>, Arc<str>),
    /// The other end's workload, `namespace/name`, if it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The other end's proven identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_identity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    /// Host name of the service that the client connected to.
    pub service: Option<Arc<str>>,
    /// Bytes from the client.
    pub bytes_sent: u64,
    /// Bytes to the client.
    pub bytes_received: u64,
    #[serde(rename = "ageSecs", serialize_with = "whole_seconds")]
    /// Time since it was opened.
    pub age: Duration,
}

const SHARDS: usize = 32;

/// All open connections of this process.
#[derive(Debug)]
pub(crate) struct OpenConnections([Mutex<Slab<Arc<dyn LiveConnection>>>; SHARDS]);

/// The slot of one connection, for [`OpenConnections::remove`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionSlot {
    shard: usize,
    key: usize,
}

thread_local! {
    static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
}

fn own_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    SHARD.get().unwrap_or_else(|| {
        let shard = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
        SHARD.set(Some(shard));
        shard
    })
}

impl Default for OpenConnections {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Mutex::default()))
    }
}

impl OpenConnections {
    /// Adds a connection.
    pub(crate) fn add(&self, live: Arc<dyn LiveConnection>) -> ConnectionSlot {
        let shard = own_shard();
        ConnectionSlot { shard, key: self.shard(shard).insert(live) }
    }

    /// Removes a connection.
    pub(crate) fn remove(&self, slot: ConnectionSlot) {
        self.shard(slot.shard).try_remove(slot.key);
    }

    /// Adds the bytes carried since the last call to the counters.
    pub(crate) fn count(&self) {
        self.for_each(|live| live.count());
    }

    /// At most `limit` connections, and the number of all.
    pub(crate) fn views(&self, limit: usize) -> (Vec<ConnectionView>, usize) {
        let (mut views, mut all) = (Vec::new(), 0);
        self.for_each(|live| {
            all += 1;
            if views.len() < limit {
                views.push(live.view());
            }
        });
        (views, all)
    }

    fn for_each(&self, mut each: impl FnMut(&dyn LiveConnection)) {
        for shard in 0..SHARDS {
            // Copied out, so that workers do not wait for the reader.
            let live: Vec<_> = self.shard(shard).iter().map(|(_, live)| Arc::clone(live)).collect();
            for live in &live {
                each(&**live);
            }
        }
    }

    fn shard(&self, shard: usize) -> MutexGuard<'_, Slab<Arc<dyn LiveConnection>>> {
        self.0[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn whole_seconds<S: serde::Serializer>(age: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(age.as_secs())
}
