//! The kernel programs.
//!
//! * [`decide`]: both decision lists, shared by the address families
//! * [`connect`]: asks the first list when a pod connects, and redirects
//! * [`dns`]: redirects DNS queries, where that is asked for, and shows the answers as the resolver's
//! * [`sk_lookup`]: asks the second list when a connection arrives in a pod's netns, and steers
//! * [`sock_ops`]: hands the original destination over to the tunnel; notes its flows and listeners
//! * [`original_dst`]: answers SO_ORIGINAL_DST to the tunnel, and getpeername to the application
//! * [`tunnel_mark`]: keeps the tunnel's mark to connections that spend the client's address
//! * [`lifecycle`]: tells of cgroups and processes, and closes expected pods as their cgroup is made
//! * [`trace`]: says what was decided, while somebody watches
//! * [`address`], [`maps`]: what all of them rest on
//!
//! No function is named like the ELF section of its program: the linker takes both for one symbol.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "contexts and maps are raw pointers here")]
#![expect(
    clippy::inline_always,
    reason = "before it inlines, the verifier sees calls that share 512 bytes of stack"
)]
// For one instruction that has no name in `core` on this target: see `maps::add_deliveries`.
#![feature(asm_experimental_arch)]

mod address;
mod connect;
mod decide;
mod dns;
mod lifecycle;
mod maps;
mod original_dst;
mod sk_lookup;
mod sock_ops;
mod trace;
mod tunnel_mark;

/// The kernel lets only programs under the GPL use some helpers. This crate may be had under either of
/// its two licences; what is loaded is under this one.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
