//! A program for pods with gRPC's health service, which the kubelet's gRPC probes ask.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    net::Ipv6Addr,
    task::{Context, Poll},
};

use tonic::{
    Request, Response, Status,
    codegen::{Body, BoxFuture, Service, StdError},
    server::{Grpc, NamedService, UnaryService},
    transport::Server,
};

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SERVING: i32 = 1;

#[derive(Clone, Debug)]
struct Health;

impl NamedService for Health {
    const NAME: &'static str = "grpc.health.v1.Health";
}

impl UnaryService<HealthCheckRequest> for Health {
    type Response = HealthCheckResponse;
    type Future = Ready<Result<Response<HealthCheckResponse>, Status>>;

    fn call(&mut self, _request: Request<HealthCheckRequest>) -> Self::Future {
        ready(Ok(Response::new(HealthCheckResponse { status: SERVING })))
    }
}

impl<B> Service<http::Request<B>> for Health
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        Box::pin(async move { Ok(Grpc::new(tonic_prost::ProstCodec::default()).unary(Self, request).await) })
    }
}

/// Serves on `port`, for ever.
pub(crate) fn serve(port: u16) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let server = Server::builder().add_service(Health).serve((Ipv6Addr::UNSPECIFIED, port).into());
    runtime.block_on(server).expect("a gRPC server");
}
