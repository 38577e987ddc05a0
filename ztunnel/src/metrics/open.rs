//! The connections that are open now: shown to whoever asks, and counted while they live.
//!
//! Sharded by thread, so that workers, which open and close connections all the time, do not wait for each other.

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
pub trait LiveConnection: Send + Sync + fmt::Debug {
    /// Adds what it carried since the last time to the counters.
    fn count(&self);
    fn view(&self) -> ConnectionView;
}

/// An open connection, for a reader. The first four names are Istio's.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionView {
    pub src: SocketAddr,
    /// What the client dialled, as far as the tunnel knows.
    pub original_dst: Option<String>,
    pub actual_dst: String,
    /// `HBONE` or `TCP`.
    pub protocol: &'static str,
    /// `inbound` or `outbound`.
    pub direction: &'static str,
    /// The pod of ours: namespace and name.
    #[serde(skip)]
    pub pod: (Arc<str>, Arc<str>),
    /// The other end's workload, `namespace/name`, if it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The other end's proven identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_identity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<Arc<str>>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    #[serde(rename = "ageSecs", serialize_with = "whole_seconds")]
    pub age: Duration,
}

const SHARDS: usize = 32;

/// All of them.
#[derive(Debug)]
pub struct OpenConnections([Mutex<Slab<Arc<dyn LiveConnection>>>; SHARDS]);

/// The slot of one connection, for [`OpenConnections::remove`].
#[derive(Clone, Copy, Debug)]
pub struct ConnectionSlot {
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
    pub fn add(&self, live: Arc<dyn LiveConnection>) -> ConnectionSlot {
        let shard = own_shard();
        ConnectionSlot { shard, key: self.shard(shard).insert(live) }
    }

    pub fn remove(&self, slot: ConnectionSlot) {
        self.shard(slot.shard).try_remove(slot.key);
    }

    /// Counts what all of them have carried so far.
    pub fn count(&self) {
        self.for_each(|live| live.count());
    }

    /// At most `limit` of them, and how many there are.
    pub fn views(&self, limit: usize) -> (Vec<ConnectionView>, usize) {
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
            // Copied out: a worker that opens a connection must not wait for a reader.
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
