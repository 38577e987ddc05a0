//! Requests on the wire. A tunnel that comes back tells the version of everything that it has, in one
//! message. gRPC's own reader would keep the room for the largest message of each tunnel while the stream
//! lives; here it is given back with the message.

use std::{future::poll_fn, pin::Pin};

use bytes::{Buf as _, BytesMut};
use prost::Message as _;
use tonic::{Status, body::Body, codegen::Body as _};
use ztunnel_api::discovery::DeltaDiscoveryRequest;

/// Of a message of gRPC: whether it is compressed, and its length.
pub(super) const HEAD: usize = 5;
/// Bytes of one.
const LARGEST: usize = 64 << 20;

/// What a tunnel asks for, one request after the other.
#[derive(Debug)]
pub(super) struct Requests {
    body: Body,
    /// What is there of the next one.
    read: BytesMut,
}

impl Requests {
    /// Those in the body of a call.
    pub(super) fn new(body: Body) -> Self {
        Self { body, read: BytesMut::new() }
    }

    /// The next one. `None`: the tunnel has closed its half. May be given up while it waits.
    ///
    /// # Errors
    /// The connection broke, or what was read is no request.
    pub(super) async fn next(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        loop {
            if let Some(request) = self.take()? {
                return Ok(Some(request));
            }
            let frame = poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await;
            match frame.transpose()? {
                Some(frame) => {
                    if let Ok(data) = frame.into_data() {
                        self.read.extend_from_slice(&data);
                    }
                }
                None if self.read.is_empty() => return Ok(None),
                None => return Err(Status::internal("the stream ended within a message")),
            }
        }
    }

    /// The next one, if it is there as a whole.
    fn take(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        let Some(&[is_compressed, a, b, c, d]) = self.read.first_chunk::<HEAD>() else { return Ok(None) };
        if is_compressed != 0 {
            return Err(Status::unimplemented("compressed messages are not understood"));
        }
        let length = u32::from_be_bytes([a, b, c, d]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > LARGEST {
            return Err(Status::out_of_range(format!(
                "a message of {length} bytes; at most {LARGEST} are read"
            )));
        }
        if self.read.len() - HEAD < length {
            return Ok(None);
        }
        let mut message = std::mem::take(&mut self.read);
        message.advance(HEAD);
        self.read.extend_from_slice(&message[length..]);
        message.truncate(length);
        let request = DeltaDiscoveryRequest::decode(message);
        request.map(Some).map_err(|error| Status::internal(format!("no request: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut as _, Bytes};
    use tonic::Code;

    use super::*;

    fn message(request: &DeltaDiscoveryRequest) -> BytesMut {
        let mut bytes = BytesMut::new();
        bytes.put_u8(0);
        bytes.put_u32(request.encoded_len().try_into().unwrap());
        bytes.extend_from_slice(&request.encode_to_vec());
        bytes
    }

    /// The body comes in pieces of `size` bytes.
    fn requests(bytes: &[u8], size: usize) -> Requests {
        let pieces: Vec<_> =
            bytes.chunks(size).map(|piece| Ok::<_, Status>(Bytes::copy_from_slice(piece))).collect();
        let body = axum::body::Body::from_stream(futures_util::stream::iter(pieces));
        Requests::new(Body::new(body))
    }

    fn named(name: &str) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest { resource_names_subscribe: vec![name.to_owned()], ..Default::default() }
    }

    #[tokio::test]
    async fn requests_come_whole_however_they_are_cut() {
        let long = "b".repeat(100_000);
        let all = [named("a"), DeltaDiscoveryRequest::default(), named(&long), named("c")];
        let bytes: Vec<u8> = all.iter().flat_map(|one| message(one).to_vec()).collect();
        for size in [1, 3, 7, 1000, bytes.len()] {
            let mut requests = requests(&bytes, size);
            for expected in &all {
                assert_eq!(requests.next().await.unwrap().as_ref(), Some(expected), "pieces of {size}");
                assert!(
                    requests.read.capacity() < 4 * size.max(1000)
                        || expected.resource_names_subscribe != ["c"]
                );
            }
            assert_eq!(requests.next().await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn what_is_no_request_ends_the_stream() {
        let whole = message(&named("a"));
        for (bytes, code) in [
            (&whole[..4], Code::Internal),
            (&whole[..whole.len() - 1], Code::Internal),
            (&[1, 0, 0, 0, 0][..], Code::Unimplemented),
            (&[0, 0xff, 0xff, 0xff, 0xff][..], Code::OutOfRange),
            (&[0, 0, 0, 0, 1, 0xff][..], Code::Internal),
        ] {
            assert_eq!(requests(bytes, 2).next().await.unwrap_err().code(), code, "{bytes:?}");
        }
    }
}
