//! The facts that the decision lists get from the maps.

use core::arch::asm;

use adit_ebpf_common::{
    address::Address,
    decide::{ArrivalFacts, ConnectFacts, Facts},
    enrolment::{CgroupInfo, NetnsInfo, flag},
    flows::{Destination, Flow, check},
    listeners::ListenerKey,
    settings::Settings,
};
use aya_ebpf::helpers::{bpf_sk_release, generated::bpf_map_lookup_elem};

use super::{
    APP_LISTENER_STATE, APP_LISTENERS, Entry, ORIGINAL_DST, TUNNEL_FLOWS, TUNNEL_LISTENERS, is_cidr_excluded,
    is_port_excluded, netns, now, pod, pod_in, state_or_new,
};
use crate::context::{Lookup, Socket};

/// What a program of connect or sendmsg knows.
pub struct Caller {
    pub settings: &'static Settings,
    /// Of the netns that the socket was created in.
    pub netns_cookie: u64,
    pub socket: Socket,
    own: Option<Entry>,
    pod: Option<Entry>,
}

impl Caller {
    /// `own` is the entry of the calling task's cgroup.
    #[inline(always)]
    pub fn new(settings: &'static Settings, netns_cookie: u64, socket: Socket, own: Option<Entry>) -> Self {
        // The lists ask for no other entry where the caller's own is the one.
        let is_own = match own {
            Some(Entry { info, .. }) => {
                info.flags & flag::TUNNEL != 0 || info.netns_cookie == 0 || info.netns_cookie == netns_cookie
            }
            None => false,
        };
        let pod = if is_own { None } else { pod_in(netns_cookie) };
        Self { settings, netns_cookie, socket, own, pod }
    }

    /// Whether what the lists learnt of entries is of these entries, and of no others.
    #[inline(always)]
    pub fn is_current(&self) -> bool {
        let own = match self.own {
            Some(entry) => entry.is_current(),
            None => true,
        };
        own && match self.pod {
            Some(entry) => entry.is_current(),
            None => true,
        }
    }
}

impl Facts for Caller {
    #[inline(always)]
    fn settings(&self) -> &Settings {
        self.settings
    }

    #[inline(always)]
    fn is_port_excluded(&self, exclusion_id: u32, port: u16, direction: u16) -> bool {
        is_port_excluded(exclusion_id, port, direction)
    }
}

impl ConnectFacts for Caller {
    #[inline(always)]
    fn caller(&self) -> Option<&CgroupInfo> {
        self.own.map(|entry| entry.info)
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    #[inline(always)]
    fn netns_pod(&self) -> Option<&CgroupInfo> {
        let pod = self.pod.map(|entry| entry.info);
        if pod.is_none() {
            // Whether both entries are missing: the compiler would ask by one OR of two pointers,
            // which the verifier refuses. It does not join tests around this.
            // SAFETY: no instruction at all.
            unsafe { asm!("", options(nomem, nostack, preserves_flags)) };
        }
        pod
    }

    #[inline(always)]
    fn netns_flags(&self) -> u32 {
        netns(self.netns_cookie).map_or(0, |netns| netns.flags)
    }

    #[inline(always)]
    fn owner(&self, address: &Address) -> Option<u64> {
        pod(address).map(|pod| pod.netns_cookie)
    }

    #[inline(always)]
    fn is_cidr_excluded(&self, exclusion_id: u32, address: &Address) -> bool {
        is_cidr_excluded(exclusion_id, address)
    }

    /// The kernel removes the entry with the socket, however the tunnel ended.
    #[inline(always)]
    fn has_tunnel_listener(&self, key: &ListenerKey) -> bool {
        let map = (&raw const TUNNEL_LISTENERS).cast_mut().cast();
        let mut key = *key;
        // SAFETY: the key is of the map's type and lives on the stack. The helper holds a socket
        // that it finds, and `bpf_sk_release` gives it back, exactly once.
        unsafe {
            let socket = bpf_map_lookup_elem(map, (&raw mut key).cast());
            !socket.is_null() && {
                bpf_sk_release(socket);
                true
            }
        }
    }

    #[inline(always)]
    fn source_port(&self) -> u16 {
        self.socket.source_port()
    }

    #[inline(always)]
    fn is_bound_to_device(&self) -> bool {
        self.socket.is_bound_to_device()
    }

    #[inline(always)]
    fn record(&self, original: &Destination, redirect: &Destination) -> bool {
        let Some(state) = state_or_new(self.socket) else { return false };
        state.original = *original;
        state.redirect = *redirect;
        state.check = check(original, redirect);
        true
    }
}

/// What the sk_lookup program knows.
pub struct Arriving<'a> {
    pub settings: &'static Settings,
    pub lookup: &'a Lookup,
}

impl Facts for Arriving<'_> {
    #[inline(always)]
    fn settings(&self) -> &Settings {
        self.settings
    }

    #[inline(always)]
    fn is_port_excluded(&self, exclusion_id: u32, port: u16, direction: u16) -> bool {
        is_port_excluded(exclusion_id, port, direction)
    }
}

impl ArrivalFacts for Arriving<'_> {
    #[inline(always)]
    fn arrival_netns(&self) -> u64 {
        self.lookup.netns_cookie()
    }

    #[inline(always)]
    fn is_redirected(&self, flow: &Flow) -> bool {
        ORIGINAL_DST.get_ptr(flow).is_some()
    }

    #[inline(always)]
    fn netns(&self) -> Option<NetnsInfo> {
        netns(self.lookup.netns_cookie())
    }

    #[inline(always)]
    fn tunnel_flow(&self, flow: &Flow) -> Option<u64> {
        // SAFETY: one writer per key, the socket that has this flow; the value is copied at once.
        let found = unsafe { TUNNEL_FLOWS.get(flow) }.copied()?;
        (now() < found.valid_until).then_some(found.netns_cookie)
    }

    #[inline(always)]
    fn steer(&self, to: &ListenerKey) -> bool {
        TUNNEL_LISTENERS.redirect_sk_lookup(self.lookup.to_aya(), *to, 0).is_ok()
    }

    #[inline(always)]
    fn has_app_listener(&self, key: &ListenerKey) -> bool {
        APP_LISTENERS.get_ptr(key).is_some()
    }

    #[inline(always)]
    fn knows_all_app_listeners(&self, netns_cookie: u64) -> bool {
        // SAFETY: the value is copied at once; a program or the watcher may change it then, as if
        // it had done so later.
        unsafe { APP_LISTENER_STATE.get(netns_cookie) }.is_some_and(|state| state.complete != 0)
    }
}
