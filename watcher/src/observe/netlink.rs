//! Netlink requests to the kernel, in the calling thread's netns.

use std::{io, ops::ControlFlow};

use rtnetlink::{
    packet_core::{
        NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
        NetlinkSerializable,
    },
    sys::{Socket, SocketAddr},
};

/// The interface index of `lo`, which is the first one of every netns.
pub(crate) const LO: u32 = 1;

/// The most that the kernel sends at a time (`netlink_dump`).
pub(crate) const LARGEST: usize = 32 * 1024;

/// A socket connected to the kernel.
///
/// # Errors
/// The kernel does not know `protocol`.
pub(crate) fn socket(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Passes what the kernel lists for `request` to `take`, until that breaks off. Then the socket is
/// of no more use.
///
/// # Errors
/// The kernel refuses the request, or sends something that does not parse.
pub(crate) fn dump<M>(
    socket: &Socket,
    request: impl Into<NetlinkMessage<M>>,
    mut take: impl FnMut(M) -> ControlFlow<()>,
) -> io::Result<()>
where
    M: NetlinkSerializable + NetlinkDeserializable,
{
    let mut message = request.into();
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut packet = vec![0; message.buffer_len()];
    message.serialize(&mut packet);
    socket.send(&packet, 0)?;
    let mut answers = Vec::with_capacity(LARGEST);
    loop {
        for answer in receive(socket, &mut answers)? {
            match answer?.payload {
                NetlinkPayload::InnerMessage(answer) => match take(answer) {
                    ControlFlow::Continue(()) => {}
                    ControlFlow::Break(()) => return Ok(()),
                },
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}

/// Waits for answers. They must fit into `buffer`; the kernel truncates a longer one.
///
/// # Errors
/// The socket fails; an item: it does not parse.
pub(crate) fn receive<'a, M: NetlinkDeserializable + 'a>(
    socket: &Socket,
    buffer: &'a mut Vec<u8>,
) -> io::Result<impl Iterator<Item = io::Result<NetlinkMessage<M>>> + 'a> {
    buffer.clear();
    socket.recv(buffer, 0)?;
    let mut rest = buffer.as_slice();
    Ok(std::iter::from_fn(move || {
        let length = NetlinkBuffer::new_checked(rest).ok()?.length() as usize;
        let answer = NetlinkMessage::deserialize(&rest[..length])
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(answer)
    }))
}
