//! The kernel programs.
//!
//! * [`connect`]: asks the outbound list when a pod connects, and redirects
//! * [`reserved_ports`]: tells of applications that want the tunnel's ports
//! * [`dns`]: redirects DNS queries where a pod wants that, and shows the answers as the resolver's
//! * [`sk_lookup`]: asks the inbound list when a connection arrives in a pod's netns, and steers
//! * [`unknown_netns`]: drops what arrives for pods whose netns is not known yet
//! * [`sock_ops`]: passes the original destination to the tunnel; records its flows and listeners
//! * [`original_dst`]: answers SO_ORIGINAL_DST to the tunnel, and getpeername to the application
//! * [`tunnel_mark`]: keeps the tunnel's mark to connections that use the client's address; tells the
//!   tunnel's DNS proxy which resolver was asked
//! * [`lifecycle`]: reports cgroups and processes, and closes expected pods as their cgroup is made
//! * [`trace`]: reports each verdict, while somebody watches
//! * [`maps`]: the maps, and the facts that the lists get from them
//! * [`context`]: safe access to the kernel's contexts
//!
//! The lists themselves are in `adit_ebpf_common::decide`.
//!
//! `unsafe` is allowed in [`context`], [`maps`] and [`lifecycle`], and for helpers in
//! [`trace`] and [`reserved_ports`]. No function is named like the ELF section of its program: the linker takes both for
//! one symbol.
#![no_std]
#![no_main]
// For instructions that have no name in `core` on this target: see
// `maps::flows::add_pinned_connections` and `maps::whole::in_memory`.
#![feature(asm_experimental_arch)]
#![expect(
    clippy::inline_always,
    reason = "before it inlines, the verifier sees calls that share 512 bytes of stack"
)]
#![allow(unreachable_pub, reason = "a binary has no outside: `pub` says what its other modules use")]
#![expect(clippy::needless_pass_by_value, reason = "aya's macros pass contexts by value")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "the kernel's fields are wider than what they hold, and a conversion that can fail costs a branch"
)]

mod connect;
mod context;
mod dns;
mod lifecycle;
mod maps;
mod original_dst;
mod reserved_ports;
mod sk_lookup;
mod sock_ops;
mod trace;
mod tunnel_mark;
mod unknown_netns;

/// The kernel lets only programs under the GPL use some helpers. This crate is available under
/// either of its two licences; the loaded object is under this one.
#[expect(unsafe_code, reason = "the kernel finds the licence by its section")]
// SAFETY: nothing else is in this section or has this name.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
