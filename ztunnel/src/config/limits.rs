//! What connections, streams and pods may take, and for how long.

use std::time::Duration;

use serde::Serialize;

use super::value::seconds;

/// How long a connection may be open without traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamConfig {
    /// While one direction has ended.
    #[serde(serialize_with = "seconds")]
    pub half_closed: Duration,
    /// While both directions are open. `None`: without limit.
    pub idle: Option<Duration>,
}

impl StreamConfig {
    /// The limit of a half-closed connection: the shorter of both.
    #[must_use]
    pub fn half_closed(self) -> Duration {
        self.idle.map_or(self.half_closed, |idle| idle.min(self.half_closed))
    }
}

/// HBONE connections kept for reuse.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PoolConfig {
    /// Streams per connection; more open another connection.
    pub max_streams: u32,
    /// An unused connection is closed after this time.
    #[serde(serialize_with = "seconds")]
    pub idle: Duration,
    /// How long the peer may take to answer a request.
    #[serde(serialize_with = "seconds")]
    pub answer_limit: Duration,
}

/// What one pod, and what others do to it, may take of this process.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BudgetConfig {
    /// Descriptors that the connections of a pod may hold. `None`: as many as are free.
    pub pod_descriptors: Option<u32>,
    /// Descriptors that connections leave to others. `None`: a share of the limit of open files.
    pub reserved_descriptors: Option<u32>,
    /// Handshakes of peers under way.
    pub pod_handshakes: u32,
    /// Connects to applications under way.
    pub pod_dials: u32,
    /// Label sets of a metric.
    pub metric_label_sets: u32,
}

/// What streams may make the process hold, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MemoryConfig {
    /// Those of one pod.
    pub pod_bytes: usize,
    /// Those of all pods.
    pub total_bytes: usize,
}

/// HTTP/2 flow control, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct H2Config {
    /// Largest receive window of a stream.
    pub stream_window: u32,
    /// Receive window of a connection.
    pub connection_window: u32,
    /// Largest DATA frame.
    pub frame: u32,
}

impl H2Config {
    /// Streams that a peer may have open in one connection, as in Istio's tunnel.
    pub const STREAMS: u32 = 200;
    /// Largest window, RFC 9113 §6.9.1.
    pub const LARGEST_WINDOW: u32 = (1 << 31) - 1;
}

/// TCP keepalive of every socket.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct KeepaliveConfig {
    /// Idle time before the first probe.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// Time between probes.
    #[serde(serialize_with = "seconds")]
    pub interval: Duration,
    /// Unanswered probes after which the connection is closed.
    pub retries: u32,
}
