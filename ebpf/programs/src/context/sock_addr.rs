//! connect, sendmsg, recvmsg, getpeername: programs about an address that an application gives or
//! gets.

use core::ffi::c_void;

use adit_ebpf_common::{
    address::{Address, from_v4_word, from_words, to_words},
    flows::Destination,
};
use aya_ebpf::{
    bindings::bpf_sock_addr, helpers::generated::bpf_get_netns_cookie, programs::SockAddrContext,
};

use super::{IPPROTO_TCP, Socket, clear_mark};

const IPPROTO_UDP: u32 = 17;

/// The context of programs about an address that an application gives or gets: connect, sendmsg,
/// recvmsg, getpeername.
pub struct SockAddr(*mut bpf_sock_addr);

impl SockAddr {
    #[inline(always)]
    pub fn new(context: SockAddrContext) -> Self {
        Self(context.sock_addr)
    }

    /// For the helpers that take the context.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut c_void {
        self.0.cast()
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        read!(self.0, protocol) == IPPROTO_TCP
    }

    #[inline(always)]
    pub fn is_udp(&self) -> bool {
        read!(self.0, protocol) == IPPROTO_UDP
    }

    #[inline(always)]
    pub fn socket(&self) -> Socket {
        Socket(read!(self.0, __bindgen_anon_1.sk))
    }

    /// The cookie of the netns that the socket was created in. Linux 5.7.
    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper takes the context of this program type, which lives until the program
        // returns.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// In host byte order.
    #[inline(always)]
    pub fn port(&self) -> u16 {
        u16::from_be(read!(self.0, user_port) as u16)
    }

    /// The address of a program of the IPv4 family.
    #[inline(always)]
    pub fn address_v4(&self) -> Address {
        from_v4_word(read!(self.0, user_ip4))
    }

    /// The address of a program of the IPv6 family.
    #[inline(always)]
    pub fn address_v6(&self) -> Address {
        from_words([
            read!(self.0, user_ip6[0]),
            read!(self.0, user_ip6[1]),
            read!(self.0, user_ip6[2]),
            read!(self.0, user_ip6[3]),
        ])
    }

    /// Replaces the address in a program of the IPv4 family by `to`, which is IPv4 in mapped form.
    #[inline(always)]
    pub fn set_v4(&self, to: &Destination) {
        write!(self.0, to_words(&to.address)[3], user_ip4);
        self.set_port(to.port);
    }

    /// Replaces the address in a program of the IPv6 family.
    #[inline(always)]
    pub fn set_v6(&self, to: &Destination) {
        let words = to_words(&to.address);
        write!(self.0, words[0], user_ip6[0]);
        write!(self.0, words[1], user_ip6[1]);
        write!(self.0, words[2], user_ip6[2]);
        write!(self.0, words[3], user_ip6[3]);
        self.set_port(to.port);
    }

    #[inline(always)]
    fn set_port(&self, port: u16) {
        write!(self.0, u32::from(port.to_be()), user_port);
    }

    /// In a program of connect: takes the mark off the socket. Linux 5.8.
    #[inline(always)]
    pub fn clear_mark(&self) {
        clear_mark(self.0.cast());
    }
}
