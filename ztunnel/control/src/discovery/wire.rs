//! Responses on the wire. Each resource is encoded once, for all tunnels; a response is their bytes, and
//! the few that are its own. They are put together piece by piece, as a tunnel takes them: gRPC's own
//! encoder would make one buffer of the whole mesh for each tunnel, and keep it while the stream lives.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{Stream as _, future::BoxFuture, stream::BoxStream};
use http::{HeaderMap, header::CONTENT_TYPE};
use http_body::Frame;
use prost::Message as _;
use tonic::{
    Request, Status,
    body::Body,
    codegen::{Body as HttpBody, Service},
    metadata::{GRPC_CONTENT_TYPE, MetadataMap},
    server::NamedService,
};
use ztunnel_api::discovery::DeltaDiscoveryResponse;

use super::{
    DiscoveryService,
    requests::{HEAD, Requests},
};
use crate::snapshot::Resource;

const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Bytes of a piece, or a little more.
const PIECE: usize = 16 << 10;

/// A response.
#[derive(Debug)]
pub(super) struct EncodedResponse {
    resources: std::vec::IntoIter<Arc<Resource>>,
    /// Everything but the resources. `None`: it is sent.
    rest: Option<DeltaDiscoveryResponse>,
    has_head: bool,
}

impl EncodedResponse {
    /// `rest`: everything but the resources.
    pub(super) fn new(resources: Vec<Arc<Resource>>, rest: DeltaDiscoveryResponse) -> Self {
        Self { resources: resources.into_iter(), rest: Some(rest), has_head: false }
    }

    /// The next bytes. `None`: there are no more.
    fn next_piece(&mut self) -> Option<Result<Bytes, Status>> {
        let rest = self.rest.as_ref()?;
        let mut piece = BytesMut::with_capacity(HEAD);
        if !std::mem::replace(&mut self.has_head, true) {
            let entries = self.resources.as_slice().iter().map(|resource| resource.entry().len());
            let Ok(length) = u32::try_from(entries.sum::<usize>() + rest.encoded_len()) else {
                return Some(Err(Status::internal("a response of more than 4 GiB")));
            };
            piece.put_u8(0);
            piece.put_u32(length);
        }
        while piece.len() < PIECE
            && let Some(resource) = self.resources.next()
        {
            piece.extend_from_slice(resource.entry());
        }
        if self.resources.as_slice().is_empty()
            && let Some(rest) = self.rest.take()
        {
            // In whatever order fields come, they are read as the same.
            piece.extend_from_slice(&rest.encode_to_vec());
        }
        Some(Ok(piece.freeze()))
    }
}

/// Responses as the body of HTTP.
struct Responses {
    next: BoxStream<'static, Result<EncodedResponse, Status>>,
    current: Option<EncodedResponse>,
    is_over: bool,
}

impl HttpBody for Responses {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if self.is_over {
                return Poll::Ready(None);
            }
            let ended = match self.current.as_mut().and_then(EncodedResponse::next_piece) {
                Some(Ok(piece)) => return Poll::Ready(Some(Ok(Frame::data(piece)))),
                Some(Err(status)) => status,
                None => match std::task::ready!(Pin::new(&mut self.next).poll_next(context)) {
                    Some(Ok(response)) => {
                        self.current = Some(response);
                        continue;
                    }
                    Some(Err(status)) => status,
                    None => Status::ok(""),
                },
            };
            self.is_over = true;
            let mut trailers = HeaderMap::new();
            return Poll::Ready(Some(ended.add_header(&mut trailers).map(|()| Frame::trailers(trailers))));
        }
    }
}

/// What a server adds: [`DiscoveryService`] by gRPC.
#[derive(Clone, Debug)]
pub struct DiscoveryServer(DiscoveryService);

impl DiscoveryServer {
    /// Serves `service`.
    #[must_use]
    pub fn new(service: DiscoveryService) -> Self {
        Self(service)
    }
}

impl NamedService for DiscoveryServer {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl Service<http::Request<Body>> for DiscoveryServer {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            if parts.uri.path() != PATH {
                return Ok(Status::unimplemented("there is no such method").into_http());
            }
            let requests = Requests::new(body);
            let metadata = MetadataMap::from_headers(parts.headers);
            let request = Request::from_parts(metadata, parts.extensions, requests);
            Ok(match service.stream(request).await {
                Ok(next) => {
                    let body = Responses { next, current: None, is_over: false };
                    let mut response = http::Response::new(Body::new(body));
                    response.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
                    response
                }
                Err(status) => status.into_http(),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Resource;

    #[test]
    fn pieces_are_one_message_with_everything() {
        for count in [0, 1, 3000] {
            let resources: Vec<_> = (0..count)
                .map(|number| {
                    let workload = ztunnel_api::workload::Workload {
                        uid: format!("Kubernetes//Pod/demo/web-{number}"),
                        ..Default::default()
                    };
                    Arc::new(Resource::workload(workload))
                })
                .collect();
            let rest = DeltaDiscoveryResponse { nonce: "7".to_owned(), ..Default::default() };
            let mut response = EncodedResponse::new(resources.clone(), rest);
            let mut whole = BytesMut::new();
            while let Some(piece) = response.next_piece() {
                let piece = piece.unwrap();
                assert!(!piece.is_empty() && piece.len() < 2 * PIECE);
                whole.extend_from_slice(&piece);
            }
            let head = whole.split_to(HEAD);
            assert_eq!(head[..1], [0]);
            assert_eq!(usize::try_from(u32::from_be_bytes(head[1..].try_into().unwrap())), Ok(whole.len()));
            let read = DeltaDiscoveryResponse::decode(whole).unwrap();
            assert_eq!(read.nonce, "7");
            let names = read.resources.iter().map(|resource| resource.name.as_str());
            assert!(names.eq(resources.iter().map(|resource| resource.name())));
            assert!(read.resources.iter().all(|resource| resource.resource.is_some()));
        }
    }
}
