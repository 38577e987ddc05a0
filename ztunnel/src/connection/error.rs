//! Why a connection failed.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use http::{Method, StatusCode};

use crate::{
    discovery::demand::UnresolvedName,
    hbone::{
        InvalidTarget,
        client::{ConnectError, is_of_peer},
        server::Abandoned,
    },
    identity::{Identity, IdentityError},
    lookup::LookupError,
    policy::Denied,
    reason::FailureReason,
    record::ConnectionFailure,
    route::{OutboundRoute, RouteError},
    stream::StreamError,
    workload_lookup::UnknownWorkload,
};

/// The client gave up before its destination was connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClientLeft;

/// Why an outbound connection failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutboundError {
    #[error("cannot find out what was dialled")]
    OriginalDst(#[source] io::Error),
    #[error("attempted recursive call to ourselves")]
    Recursive,
    #[error("the client left before it was connected")]
    ClientLeft,
    #[error(transparent)]
    UnknownWorkload(#[from] UnknownWorkload),
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error(transparent)]
    Unanswered(#[from] UnresolvedName),
    #[error("connection failed")]
    Dial(#[source] io::Error),
    #[error("no endpoint was connected within {0:?}")]
    OutOfTime(Duration),
    #[error("cannot ask for {authority:?}")]
    Request { authority: String, source: http::Error },
    #[error(transparent)]
    Hbone(#[from] Arc<ConnectError>),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl From<ClientLeft> for OutboundError {
    fn from(ClientLeft: ClientLeft) -> Self {
        Self::ClientLeft
    }
}

impl OutboundError {
    /// Whether another endpoint may be reached although that of `route` was not. Nothing of the client
    /// was sent by then.
    pub(super) fn is_of_endpoint(&self, route: &OutboundRoute) -> bool {
        match self {
            Self::Dial(error) => is_of_peer(error),
            Self::Hbone(error) => error.is_of_peer(route.endpoint() == route.target),
            _ => false,
        }
    }
}

impl ConnectionFailure for OutboundError {
    fn reason(&self) -> FailureReason {
        match self {
            Self::OriginalDst(_) => FailureReason::NoOriginalDst,
            Self::Recursive => FailureReason::Recursive,
            Self::ClientLeft => FailureReason::ClientLeft,
            Self::UnknownWorkload(_) => FailureReason::UnknownWorkload,
            Self::Route(error) => error.reason(),
            Self::Lookup(_) => FailureReason::Lookup,
            Self::Unanswered(error) => unresolved(error),
            Self::Dial(_) | Self::OutOfTime(_) => FailureReason::Connect,
            Self::Request { .. } => FailureReason::InvalidRequest,
            Self::Hbone(error) => error.reason(),
            Self::Stream(error) => error.reason(),
        }
    }

    fn response_flags(&self) -> &'static str {
        match self {
            Self::Dial(_) | Self::OutOfTime(_) => "CONNECT",
            Self::Hbone(error) => error.response_flags(),
            _ => "-",
        }
    }
}

fn unresolved(error: &UnresolvedName) -> FailureReason {
    match error {
        UnresolvedName::Unanswered { .. } => FailureReason::Unanswered,
        UnresolvedName::TooMany { .. } => FailureReason::TooManyUnanswered,
    }
}

/// Why an inbound connection failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InboundError {
    #[error("too many handshakes of peers under way for the pod (budget.pod_handshakes)")]
    TooManyHandshakes,
    #[error("too many connections of the pod (budget.pod_descriptors)")]
    TooManyConnections,
    #[error("too many connects to the pod's applications under way (budget.pod_dials)")]
    TooManyDials,
    #[error("the client left before it was connected")]
    ClientLeft,
    #[error("no certificate to answer with")]
    Identity(#[source] IdentityError),
    #[error("tls handshake error")]
    Tls(#[source] io::Error),
    #[error("http2 connection failed")]
    Http(#[source] h2::Error),
    #[error("expected method CONNECT, got {0}")]
    Method(Method),
    #[error(transparent)]
    Authority(#[from] InvalidTarget),
    #[error("ip mismatch: {connection} != {authority}")]
    IpMismatch { connection: IpAddr, authority: IpAddr },
    #[error("{0} is no address of the pod")]
    NotOwnAddress(IpAddr),
    #[error("no service or workload for hostname {0}")]
    UnknownHost(String),
    #[error("requested service {service}:{port} cannot resolve port")]
    UnknownPort { service: String, port: u16 },
    #[error("attempted recursive call to ourselves")]
    Recursive,
    #[error(transparent)]
    UnknownWorkload(#[from] UnknownWorkload),
    #[error(transparent)]
    Unanswered(#[from] UnresolvedName),
    #[error("a certificate of the peer is revoked")]
    Revoked,
    #[error("clients of the trust domain of {0} are not accepted")]
    Untrusted(Identity),
    #[error("connection closed due to policy rejection")]
    Denied(#[source] Denied),
    #[error("connection refused: a policy is not known")]
    UnknownPolicy(#[source] Denied),
    #[error("connection failed")]
    Dial(#[source] io::Error),
    #[error("connection closed due to policy change")]
    PolicyChange,
    #[error(transparent)]
    Stream(StreamError),
}

impl From<ClientLeft> for InboundError {
    fn from(ClientLeft: ClientLeft) -> Self {
        Self::ClientLeft
    }
}

impl From<Abandoned> for InboundError {
    fn from(Abandoned: Abandoned) -> Self {
        Self::ClientLeft
    }
}

impl From<Denied> for InboundError {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Unheard(_) => Self::UnknownPolicy(denied),
            denied => Self::Denied(denied),
        }
    }
}

impl From<StreamError> for InboundError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Cut => Self::PolicyChange,
            other => Self::Stream(other),
        }
    }
}

impl InboundError {
    /// The answer to the CONNECT.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Method(_) | Self::Authority(_) | Self::IpMismatch { .. } => StatusCode::BAD_REQUEST,
            Self::Denied(_) | Self::Revoked | Self::Untrusted(_) => StatusCode::UNAUTHORIZED,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl ConnectionFailure for InboundError {
    fn reason(&self) -> FailureReason {
        match self {
            Self::TooManyHandshakes => FailureReason::TooManyHandshakes,
            Self::TooManyConnections => FailureReason::TooManyConnections,
            Self::TooManyDials => FailureReason::TooManyDials,
            Self::ClientLeft => FailureReason::ClientLeft,
            Self::Identity(_) => FailureReason::Identity,
            Self::Tls(_) => FailureReason::Tls,
            Self::Http(_) => FailureReason::H2,
            Self::Method(_) => FailureReason::Method,
            Self::Authority(_) => FailureReason::Authority,
            Self::IpMismatch { .. } => FailureReason::IpMismatch,
            Self::NotOwnAddress(_) => FailureReason::NotOwnAddress,
            Self::UnknownHost(_) => FailureReason::UnknownHost,
            Self::UnknownPort { .. } => FailureReason::NoSuchPort,
            Self::Recursive => FailureReason::Recursive,
            Self::UnknownWorkload(_) => FailureReason::UnknownWorkload,
            Self::Unanswered(error) => unresolved(error),
            Self::Denied(_) => FailureReason::Denied,
            Self::UnknownPolicy(_) => FailureReason::UnknownPolicy,
            Self::Revoked => FailureReason::Revoked,
            Self::Untrusted(_) => FailureReason::Untrusted,
            Self::Dial(_) => FailureReason::Connect,
            Self::PolicyChange => FailureReason::PolicyChange,
            Self::Stream(error) => error.reason(),
        }
    }

    fn response_flags(&self) -> &'static str {
        match self {
            Self::Identity(_) => "IDENTITY_ERROR",
            Self::Tls(_) | Self::Untrusted(_) => "TLS_FAILURE",
            Self::Http(_) => "H2_HANDSHAKE_FAILURE",
            Self::Denied(_) | Self::PolicyChange => "DENY",
            Self::Dial(_) => "CONNECT",
            Self::Revoked => "CERT_REVOKED",
            _ => "-",
        }
    }
}
