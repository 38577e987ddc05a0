//! The facts that the decision lists get from the maps.

use adit_ebpf_common::{
    address::Address,
    decide::{ArrivalFacts, ConnectFacts, Facts, is_the_one},
    enrolment::{CgroupInfo, NetnsInfo},
    exclusions::Listed,
    flows::{Destination, Flow, check},
    listeners::ListenerKey,
    sealed::Sealed,
    settings::Settings,
};
use aya_ebpf::helpers::{bpf_sk_release, generated::bpf_map_lookup_elem};

use super::{
    APP_LISTENER_STATE, APP_LISTENERS, ORIGINAL_DST, TUNNEL_LISTENERS, address_listed,
    flows::{is_kubelet_flow, tunnel_flow},
    is_excluded_device, is_guarded_id,
    pods::{CLOSED, Entry, has_address, netns, pod_in},
    port_listed, state_or_new,
    whole::in_memory,
};
use crate::context::{Lookup, Socket};

/// What a program of connect or sendmsg knows.
pub struct Caller {
    pub settings: &'static Settings,
    /// Of the netns that the socket was created in.
    pub netns_cookie: u64,
    pub socket: Socket,
    /// That it is bound to.
    source: Address,
    has_entry: bool,
    /// The one that decides, if there is one.
    entry: Sealed<CgroupInfo>,
}

impl Caller {
    /// `source` is the address that the socket is bound to, `own` the entry of the calling task's
    /// cgroup.
    #[inline(always)]
    pub fn new(
        settings: &'static Settings,
        netns_cookie: u64,
        socket: Socket,
        source: Address,
        own: Option<Entry>,
    ) -> Self {
        // Each field has a value from the beginning, see `Destination::NOWHERE`.
        let mut caller = Self { settings, netns_cookie, socket, source, has_entry: false, entry: CLOSED };
        if let Some(own) = own {
            caller.has_entry = true;
            own.read(&mut caller.entry);
            if is_the_one(caller.entry.unchecked(), netns_cookie) {
                return caller;
            }
        }
        if let Some(pod) = pod_in(netns_cookie) {
            caller.has_entry = true;
            pod.read(&mut caller.entry);
        }
        caller
    }
}

impl Facts for Caller {
    #[inline(always)]
    fn settings(&self) -> &Settings {
        self.settings
    }

    #[inline(always)]
    fn port_listed(&self, exclusion_id: u32, port: u16, direction: u16) -> Listed {
        port_listed(exclusion_id, port, direction)
    }
}

impl ConnectFacts for Caller {
    #[inline(always)]
    fn entry(&self) -> Option<&CgroupInfo> {
        if self.has_entry { Some(in_memory(&self.entry).unchecked()) } else { None }
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    #[inline(always)]
    fn netns_flags(&self) -> u32 {
        netns(self.netns_cookie).map_or(0, |netns| netns.flags)
    }

    #[inline(always)]
    fn has_address(&self, netns_cookie: u64, address: &Address, device: u32) -> bool {
        has_address(netns_cookie, address, device)
    }

    #[inline(always)]
    fn address_listed(&self, exclusion_id: u32, address: &Address) -> Listed {
        address_listed(exclusion_id, address)
    }

    #[inline(always)]
    fn is_guarded_id(&self, exclusion_id: u32) -> bool {
        is_guarded_id(exclusion_id)
    }

    #[inline(always)]
    fn is_excluded_device(&self, exclusion_id: u32) -> bool {
        is_excluded_device(exclusion_id, self.socket.device())
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
    fn source(&self) -> Address {
        self.source
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        self.socket.device()
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
    fn port_listed(&self, exclusion_id: u32, port: u16, direction: u16) -> Listed {
        port_listed(exclusion_id, port, direction)
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
    fn is_of_kubelet(&self, flow: &Flow) -> bool {
        is_kubelet_flow(flow)
    }

    #[inline(always)]
    fn tunnel_flow(&self, flow: &Flow) -> Option<u64> {
        tunnel_flow(flow)
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
