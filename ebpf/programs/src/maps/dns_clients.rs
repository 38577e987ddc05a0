//! Where a UDP socket of the netns was redirected from: what the tunnel asks of the clients of its DNS
//! proxy.

use core::{mem::size_of, ptr::null_mut};

use adit_ebpf_common::{
    address::to_words,
    flows::{Destination, SocketState, check},
};
use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::{
        bpf_sk_release,
        generated::{bpf_sk_lookup_udp, bpf_sk_storage_get},
    },
};

use super::SOCKET_STATE;
use crate::context::SockAddr;

/// Two ends of a UDP flow, as the kernel's `bpf_sock_tuple` has them for IPv4: network byte order.
#[repr(C)]
struct TupleV4 {
    source: u32,
    destination: u32,
    source_port: u16,
    destination_port: u16,
}

/// The same for IPv6.
#[repr(C)]
struct TupleV6 {
    source: [u32; 4],
    destination: [u32; 4],
    source_port: u16,
    destination_port: u16,
}

/// The netns of the socket that the program is about (`BPF_F_CURRENT_NETNS`).
const CURRENT_NETNS: u64 = u64::MAX;

/// Where the UDP socket at `client`, an address of the loopback in the netns of `call`, wanted to go
/// when it was redirected to `port` of the same address. Nowhere if there is none.
#[inline(always)]
pub fn original_v4(call: &SockAddr, client: &Destination, port: u16) -> Destination {
    let address = to_words(&client.address)[3];
    let mut tuple = TupleV4 {
        source: address,
        destination: address,
        source_port: port.to_be(),
        destination_port: client.port.to_be(),
    };
    original(call, (&raw mut tuple).cast(), size_of::<TupleV4>() as u32, port)
}

/// The same for IPv6.
#[inline(always)]
pub fn original_v6(call: &SockAddr, client: &Destination, port: u16) -> Destination {
    let address = to_words(&client.address);
    let mut tuple = TupleV6 {
        source: address,
        destination: address,
        source_port: port.to_be(),
        destination_port: client.port.to_be(),
    };
    original(call, (&raw mut tuple).cast(), size_of::<TupleV6>() as u32, port)
}

#[inline(always)]
fn original(call: &SockAddr, tuple: *mut bpf_sock_tuple, size: u32, port: u16) -> Destination {
    let map = (&raw const SOCKET_STATE).cast_mut().cast();
    let mut found = Destination::NOWHERE;
    // SAFETY: `call` is the context of the running program, whose type may call these helpers. The
    // tuple lives on the caller's stack and has this size. The lookup holds a socket that it finds,
    // and `bpf_sk_release` gives it back, exactly once; until then the value of its storage lives.
    // It is copied, since the socket's own program may write it meanwhile, and `check` tells
    // whether that happened.
    unsafe {
        let socket = bpf_sk_lookup_udp(call.as_ptr(), tuple, size, CURRENT_NETNS, 0);
        if socket.is_null() {
            return found;
        }
        let state = bpf_sk_storage_get(map, socket.cast(), null_mut(), 0).cast::<SocketState>();
        if !state.is_null() {
            let state = state.read_volatile();
            if state.redirect.port == port && state.check == check(&state.original, &state.redirect) {
                found = state.original;
            }
        }
        bpf_sk_release(socket.cast());
    }
    found
}
