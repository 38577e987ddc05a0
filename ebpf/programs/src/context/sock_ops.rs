//! sock_ops: programs that follow TCP sockets.

use adit_ebpf_common::{
    address::{Address, from_v4_word, from_words},
    flows::Flow,
};
use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE, bpf_sock_ops},
    helpers::generated::bpf_sock_ops_cb_flags_set,
    programs::SockOpsContext,
};

use super::{AF_INET, AF_INET6, Socket, clear_mark};

/// The context of sock_ops programs.
pub struct SockOps(*mut bpf_sock_ops);

impl SockOps {
    #[inline(always)]
    pub fn new(context: SockOpsContext) -> Self {
        Self(context.ops)
    }

    /// For the helpers that take this context.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut bpf_sock_ops {
        self.0
    }

    /// Which callback this is: `BPF_SOCK_OPS_…`.
    #[inline(always)]
    pub fn op(&self) -> u32 {
        read!(self.0, op)
    }

    /// In the state callback: whether the socket closes.
    #[inline(always)]
    pub fn is_closing(&self) -> bool {
        read!(self.0, __bindgen_anon_1.args[1]) == BPF_TCP_CLOSE
    }

    /// Null while there is only half a socket.
    #[inline(always)]
    pub fn socket(&self) -> Socket {
        Socket(read!(self.0, __bindgen_anon_2.sk))
    }

    /// Calls the state callback for this socket too.
    #[inline(always)]
    pub fn watch_close(&self) {
        let flags = read!(self.0, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
        // SAFETY: the helper takes the context of this program type, which lives until the program
        // returns.
        let _ = unsafe { bpf_sock_ops_cb_flags_set(self.0, flags as i32) };
    }

    /// The address, port (host byte order) and family of the socket's own end.
    #[inline(always)]
    pub fn local(&self) -> Local {
        let port = read!(self.0, local_port) as u16;
        let is_v4 = read!(self.0, family) == AF_INET;
        let v4 = read!(self.0, local_ip4);
        let v6 = self.local_v6();
        Local { address: if is_v4 { from_v4_word(v4) } else { from_words(v6) }, port, is_v4 }
    }

    /// The connection, as this end sees it; `None` if it is neither IPv4 nor IPv6.
    #[inline(always)]
    pub fn flow(&self) -> Option<Flow> {
        // The local port is in host byte order, the remote one in the upper half of a big-endian
        // word.
        let local_port = read!(self.0, local_port) as u16;
        let remote_port = u32::from_be(read!(self.0, remote_port)) as u16;
        let family = read!(self.0, family);
        let local_v4 = read!(self.0, local_ip4);
        let remote_v4 = read!(self.0, remote_ip4);
        let local_v6 = self.local_v6();
        let remote_v6 = [
            read!(self.0, remote_ip6[0]),
            read!(self.0, remote_ip6[1]),
            read!(self.0, remote_ip6[2]),
            read!(self.0, remote_ip6[3]),
        ];
        let (local, remote) = match family {
            AF_INET => (from_v4_word(local_v4), from_v4_word(remote_v4)),
            AF_INET6 => (from_words(local_v6), from_words(remote_v6)),
            _ => return None,
        };
        Some(Flow { local, remote, local_port, remote_port })
    }

    #[inline(always)]
    fn local_v6(&self) -> [u32; 4] {
        [
            read!(self.0, local_ip6[0]),
            read!(self.0, local_ip6[1]),
            read!(self.0, local_ip6[2]),
            read!(self.0, local_ip6[3]),
        ]
    }

    /// Takes the mark off the socket. Linux 5.8.
    #[inline(always)]
    pub fn clear_mark(&self) {
        clear_mark(self.0.cast());
    }
}

/// One end of a connection, or a listener.
pub struct Local {
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// The family of the socket.
    pub is_v4: bool,
}
