//! sk_lookup: the program that chooses who accepts a connection.

use core::arch::asm;

use adit_ebpf_common::{
    address::{from_v4_word, from_words},
    decide::Arrival,
    enrolment::NETNS_COOKIE_PLACEHOLDER,
    flows::Flow,
};
use aya_ebpf::{bindings::bpf_sk_lookup, programs::SkLookupContext};

use super::{AF_INET, IPPROTO_TCP};

/// The context of sk_lookup programs.
pub struct Lookup(*mut bpf_sk_lookup);

impl Lookup {
    #[inline(always)]
    pub fn new(context: SkLookupContext) -> Self {
        Self(context.lookup)
    }

    /// For aya's method that assigns a socket, which consumes its context.
    #[inline(always)]
    pub fn to_aya(&self) -> SkLookupContext {
        SkLookupContext::new(self.0)
    }

    /// The cookie of the netns that this copy of the program is attached to. The loader writes it
    /// into this very instruction of each copy, since no helper tells it to programs of this type.
    #[expect(clippy::unused_self, reason = "only a running program of this type has it")]
    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        let cookie;
        // SAFETY: loads a number into a register, and does nothing else.
        unsafe {
            asm!(
                "{cookie} = {placeholder} ll",
                cookie = out(reg) cookie,
                placeholder = const NETNS_COOKIE_PLACEHOLDER,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        cookie
    }

    /// The connection, as its opener sees it; `None` if it is not TCP.
    ///
    /// All fields are copied to the stack: the kernel takes no pointer into a context as a map key.
    #[inline(always)]
    pub fn arrival(&self) -> Option<Arrival> {
        if read!(self.0, protocol) != IPPROTO_TCP {
            return None;
        }
        let is_v4 = read!(self.0, family) == AF_INET;
        let remote_v4 = read!(self.0, remote_ip4);
        let local_v4 = read!(self.0, local_ip4);
        let remote_v6 = [
            read!(self.0, remote_ip6[0]),
            read!(self.0, remote_ip6[1]),
            read!(self.0, remote_ip6[2]),
            read!(self.0, remote_ip6[3]),
        ];
        let local_v6 = [
            read!(self.0, local_ip6[0]),
            read!(self.0, local_ip6[1]),
            read!(self.0, local_ip6[2]),
            read!(self.0, local_ip6[3]),
        ];
        let (local, remote) = if is_v4 {
            (from_v4_word(remote_v4), from_v4_word(local_v4))
        } else {
            (from_words(remote_v6), from_words(local_v6))
        };
        // The word around `remote_port` reads the same as before Linux 5.18, where that field
        // became 16 bits wide.
        let local_port = u16::from_be(read!(self.0, remote_port));
        let remote_port = read!(self.0, local_port) as u16;
        Some(Arrival { flow: Flow { local, remote, local_port, remote_port }, is_v4 })
    }
}
