//! cgroup_skb: a packet on its way to a socket.

use adit_ebpf_common::address::{from_v4_word, from_words, is_loopback, same};
use aya_ebpf::{
    bindings::{__sk_buff, BPF_TCP_LISTEN},
    helpers::generated::{bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id, bpf_skb_load_bytes},
    programs::SkBuffContext,
};

const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86dd;

/// The context of programs that see the packets of sockets. Its data begins with the IP header.
pub struct Packet(*mut __sk_buff);

impl Packet {
    #[inline(always)]
    pub fn new(context: SkBuffContext) -> Self {
        Self(context.skb.skb)
    }

    /// Whether it is for a socket that listens: it opens a connection.
    #[inline(always)]
    pub fn is_for_listener(&self) -> bool {
        let socket = read!(self.0, __bindgen_anon_2.sk);
        !socket.is_null() && read!(socket, state) == BPF_TCP_LISTEN
    }

    /// The id of the cgroup that the socket was created in.
    #[inline(always)]
    pub fn cgroup_id(&self) -> u64 {
        // SAFETY: the helper takes the context of this program type, which lives until the program
        // returns.
        unsafe { bpf_skb_cgroup_id(self.0) }
    }

    /// The id of that cgroup's ancestor at `level`; 0 below its own level.
    #[inline(always)]
    pub fn ancestor_cgroup_id(&self, level: i32) -> u64 {
        // SAFETY: as in `cgroup_id`.
        unsafe { bpf_skb_ancestor_cgroup_id(self.0, level) }
    }

    /// Whether it comes from the loopback, or from the address that it goes to.
    #[inline(always)]
    pub fn is_from_itself(&self) -> bool {
        let mut words = [0u32; 8];
        let (at, length) = match u32::from(u16::from_be(read!(self.0, protocol) as u16)) {
            ETH_P_IP => (12, 8),
            ETH_P_IPV6 => (8, 32),
            _ => return false,
        };
        let to = (&raw mut words).cast();
        // SAFETY: the helper writes at most `length` bytes, for which there is room.
        let loaded = unsafe {
            if length == 8 {
                bpf_skb_load_bytes(self.0.cast(), at, to, 8)
            } else {
                bpf_skb_load_bytes(self.0.cast(), at, to, 32)
            }
        };
        if loaded != 0 {
            return false;
        }
        let (from, own) = if length == 8 {
            (from_v4_word(words[0]), from_v4_word(words[1]))
        } else {
            (
                from_words([words[0], words[1], words[2], words[3]]),
                from_words([words[4], words[5], words[6], words[7]]),
            )
        };
        is_loopback(&from) || same(&from, &own)
    }
}
