//! HBONE: TCP in HTTP/2 CONNECT in mutual TLS, on port 15008 of the peer's pod.
//!
//! * this file: request headers and HTTP/2 settings, which both ends share
//! * [`keepalive`]: detects a dead peer; `read_ahead`: buffers what is read from it; `tls_buffers`:
//!   TLS, whose buffers are in the budgets
//! * [`client`]: one tunnel to a peer; `pool`: tunnels shared by the connections of a worker
//! * `nested`: a tunnel inside a stream of another
//! * `server`: accepts the CONNECT requests of one tunnel

pub mod client;
mod keepalive;
pub(crate) mod nested;
pub(crate) mod pool;
mod read_ahead;
pub(crate) mod server;
mod tls_buffers;

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use http::{HeaderValue, Method, Request, header::HeaderName};

use crate::{
    config::H2Config,
    memory::{RESET_REMEMBERED, RESETS},
};

pub(crate) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
pub(crate) const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
/// The network of the client, on a request through a gateway.
pub const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Time limit for the TLS and HTTP/2 handshakes together.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes that one stream may queue for sending. With several busy streams, more than one frame each
/// only adds latency.
const SEND_BUFFER: usize = 256 << 10;

/// The headers of a CONNECT request.
#[derive(Debug)]
pub struct ConnectHeaders<'a> {
    pub(crate) authority: &'a str,
    /// The workload that connects.
    pub baggage: Option<String>,
    pub(crate) client: SocketAddr,
    /// The service that the client dialled, if any.
    pub service: Option<&'a str>,
    /// The client's network, if the request leaves it.
    pub network: Option<&'a str>,
}

impl ConnectHeaders<'_> {
    pub(crate) fn request(&self) -> Result<Request<()>, http::Error> {
        let mut forwarded = format!("for=\"{}\"", self.client);
        if let Some(host) = self.service {
            forwarded.push_str(";host=");
            forwarded.push_str(host);
        }
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(self.authority)
            .version(http::Version::HTTP_2)
            .body(())?;
        let headers = request.headers_mut();
        headers.insert(FORWARDED, HeaderValue::try_from(forwarded)?);
        // W3C Trace Context: version, trace, parent, flags "not sampled".
        let trace = format!("00-{:032x}-{:016x}-00", rand::random::<u128>(), rand::random::<u64>());
        headers.insert(TRACEPARENT, HeaderValue::try_from(trace)?);
        if let Some(network) = self.network {
            headers.insert(FORWARDED_NETWORK, HeaderValue::try_from(network)?);
        }
        if let Some(baggage) = self.baggage.as_deref().filter(|b| !b.is_empty()) {
            headers.insert(BAGGAGE, HeaderValue::try_from(baggage)?);
        }
        Ok(request)
    }
}

/// The destination of a stream: the `:authority` of its CONNECT (RFC 9113 §8.5). The port is never
/// 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectTarget {
    /// An address and port.
    Address(SocketAddr),
    /// A name, which the receiver resolves.
    Host {
        /// The name, as the client sent it.
        name: String,
        /// The port.
        port: u16,
    },
}

/// A CONNECT whose `:authority` is no address or name with a port.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no valid authority pseudo header")]
pub struct InvalidTarget;

impl FromStr for ConnectTarget {
    type Err = InvalidTarget;

    fn from_str(authority: &str) -> Result<Self, InvalidTarget> {
        if let Ok(address) = authority.parse::<SocketAddr>() {
            return if address.port() == 0 { Err(InvalidTarget) } else { Ok(Self::Address(address)) };
        }
        let (name, port) = authority.rsplit_once(':').ok_or(InvalidTarget)?;
        // Rust parses "+80" as a number. An address must not be taken for a name.
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        match port.parse() {
            Ok(port) if port != 0 && digits && name.parse::<IpAddr>().is_err() && is_host_name(name) => {
                Ok(Self::Host { name: name.to_owned(), port })
            }
            _ => Err(InvalidTarget),
        }
    }
}

/// RFC 1123 §2.1. With `xds.on_demand` a peer's name is kept and goes to the control plane.
fn is_host_name(name: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric();
    let is_label = |label: &str| {
        let bytes = label.as_bytes();
        (1..=63).contains(&bytes.len())
            && bytes.iter().all(|byte| letter(*byte) || *byte == b'-')
            && letter(bytes[0])
            && letter(bytes[bytes.len() - 1])
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// The service that the client dialled, from its tunnel's `forwarded` header (RFC 7239):
/// `for="…";host=…`.
#[must_use]
pub fn forwarded_host(forwarded: &str) -> Option<&str> {
    let host = forwarded.split(';').find_map(|part| part.trim().strip_prefix("host="))?;
    Some(host.trim_matches('"'))
}

/// Each small DATA frame that no stream has taken from the connection yet counts as 256 bytes
/// against it. Too many close the connection for all streams. Streams take frames also while their
/// application is slow, so only those count that arrive at once: this allows 65,536.
const DATA_FRAME_BUDGET: usize = 16 << 20;

/// `window`: of each stream.
fn client_settings(config: &H2Config, window: u32) -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(window)
        .initial_connection_window_size(config.connection_window)
        .max_frame_size(config.frame)
        .max_header_list_size(16 << 10)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .max_concurrent_reset_streams(RESETS)
        .reset_stream_duration(RESET_REMEMBERED)
        .enable_push(false);
    builder
}

fn server_settings(config: &H2Config, window: u32) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(window)
        .initial_connection_window_size(config.connection_window)
        .max_frame_size(config.frame)
        .max_header_list_size(64 << 10)
        .max_concurrent_streams(H2Config::STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .max_concurrent_reset_streams(RESETS)
        .reset_stream_duration(RESET_REMEMBERED);
    builder
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        for (authority, expected) in [
            ("10.0.0.7:8080", Some(ConnectTarget::Address("10.0.0.7:8080".parse().unwrap()))),
            ("[fd00::7]:8080", Some(ConnectTarget::Address("[fd00::7]:8080".parse().unwrap()))),
            ("a.b.svc:80", Some(ConnectTarget::Host { name: "a.b.svc".into(), port: 80 })),
            ("10.0.0.7", None),
            ("10.0.0.7:0", None),
            ("a.b.svc:0", None),
            ("a.b.svc:70000", None),
            ("10.0.0.7:+80", None),
            ("a.b.svc:+80", None),
            (":80", None),
            ("fd00::7:80", None),
            ("", None),
        ] {
            assert_eq!(authority.parse().ok(), expected, "{authority}");
        }
        let of = |name: &str| format!("{name}:80").parse::<ConnectTarget>();
        let longest = [&"a".repeat(63)[..]; 4].join(".")[..253].to_owned();
        of(&longest).unwrap();
        of("1-a.B.svc").unwrap();
        let too_long = format!("{}.{}", &longest[..250], "abc");
        for name in [&too_long, &"a".repeat(64), "a..b", ".a", "a.", "-a", "a-", "a b", "a%2fb", "ä", "a_b"]
        {
            assert_eq!(of(name), Err(InvalidTarget), "{name}");
        }
    }

    #[test]
    fn a_request_says_who_and_for_whom() {
        let connect = ConnectHeaders {
            authority: "[fd00::7]:80",
            baggage: Some("k8s.namespace.name=a".into()),
            client: "10.0.0.1:5".parse().unwrap(),
            service: Some("b.a.svc.cluster.local"),
            network: Some("east"),
        };
        let request = connect.request().unwrap();
        assert_eq!(request.method(), Method::CONNECT);
        assert_eq!(request.uri().authority().unwrap().as_str(), "[fd00::7]:80");
        assert_eq!(request.uri().path_and_query(), None);
        assert_eq!(request.headers()[FORWARDED], "for=\"10.0.0.1:5\";host=b.a.svc.cluster.local");
        assert_eq!(request.headers()[BAGGAGE], "k8s.namespace.name=a");
        assert_eq!(request.headers()[FORWARDED_NETWORK], "east");
        let near = ConnectHeaders { network: None, ..connect };
        assert!(!near.request().unwrap().headers().contains_key(FORWARDED_NETWORK));
        let trace = request.headers()[TRACEPARENT].to_str().unwrap().to_owned();
        assert_eq!(trace.len(), 55);
        assert!(trace.starts_with("00-") && trace.ends_with("-00"));
        assert_ne!(near.request().unwrap().headers()[TRACEPARENT], trace.as_str());
    }
}
