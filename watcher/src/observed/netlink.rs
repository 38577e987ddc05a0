//! Lists that the kernel gives by netlink, of the calling thread's netns.

use std::io;

use rtnetlink::{
    packet_core::{
        NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
        NetlinkSerializable,
    },
    sys::{Socket, SocketAddr},
};

/// The kernel sends no more at a time (`netlink_dump`).
const LARGEST: usize = 32 * 1024;

/// A socket that talks to the kernel.
pub fn socket(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Gives everything that the kernel lists for `request` to `take`.
pub fn dump<M>(
    socket: &Socket,
    request: impl Into<NetlinkMessage<M>>,
    mut take: impl FnMut(M),
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
        answers.clear();
        socket.recv(&mut answers, 0)?;
        let mut rest = answers.as_slice();
        while let Ok(buffer) = NetlinkBuffer::new_checked(rest) {
            let length = buffer.length() as usize;
            let answer = NetlinkMessage::<M>::deserialize(&rest[..length])
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match answer.payload {
                NetlinkPayload::InnerMessage(answer) => take(answer),
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}
