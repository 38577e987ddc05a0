//! Who listens where: the applications' listening ports, and the tunnel's own sockets.

use std::collections::BTreeSet;

use adit_ebpf_common::{
    listeners::{AppListenerState, ListenerKey},
    maps::{APP_LISTENER_STATE, APP_LISTENERS, RESERVED_BINDS, TUNNEL_LISTENERS},
    reserved_ports::{ReservedBind, ReservedPort},
};
use aya::maps::SockHash;

use crate::{Kernel, KernelError, maps::find};

/// All return [`KernelError::Map`] if the kernel refuses.
impl Kernel {
    /// Records that an application has a listener.
    ///
    /// # Errors
    /// The map cannot be written, or is full.
    pub fn add_app_listener(&mut self, key: &ListenerKey) -> Result<(), KernelError> {
        self.insert(APP_LISTENERS.name, *key, &1u32)
    }

    /// Removes an application's listener, if it is there.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn remove_app_listener(&mut self, key: &ListenerKey) -> Result<(), KernelError> {
        self.take::<ListenerKey, u32>(APP_LISTENERS.name, key)
    }

    /// All applications' listeners, in no order.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn app_listeners(&self) -> Result<Vec<ListenerKey>, KernelError> {
        self.list::<ListenerKey, u32>(APP_LISTENERS.name)
            .map(|all| all.into_iter().map(|(key, _)| key).collect())
    }

    /// What is known of a netns' listeners as a whole.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn app_listener_state(&self, netns_cookie: u64) -> Result<Option<AppListenerState>, KernelError> {
        self.get(APP_LISTENER_STATE.name, &netns_cookie)
    }

    /// Writes the same. From the first time on, the programs record who begins to listen there.
    ///
    /// # Errors
    /// The map cannot be written, or is full.
    pub fn set_app_listener_state(
        &mut self,
        netns_cookie: u64,
        state: &AppListenerState,
    ) -> Result<(), KernelError> {
        self.insert(APP_LISTENER_STATE.name, netns_cookie, state)
    }

    /// Removes the state of a netns, if there is one: the programs record no more of it.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn remove_app_listener_state(&mut self, netns_cookie: u64) -> Result<(), KernelError> {
        self.take::<u64, AppListenerState>(APP_LISTENER_STATE.name, &netns_cookie)
    }

    /// The netns that have a state, in no order.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn app_listener_netns(&self) -> Result<Vec<u64>, KernelError> {
        self.list::<u64, AppListenerState>(APP_LISTENER_STATE.name)
            .map(|all| all.into_iter().map(|(cookie, _)| cookie).collect())
    }

    /// Forgets who listens in these netns. One pass over the map, however many they are.
    pub(crate) fn forget_app_listeners(&mut self, netns_cookies: &BTreeSet<u64>) -> Result<(), KernelError> {
        // First, so that the programs record no more.
        for cookie in netns_cookies {
            self.remove_app_listener_state(*cookie)?;
        }
        for key in self.app_listeners()?.iter().filter(|key| netns_cookies.contains(&key.netns_cookie)) {
            self.remove_app_listener(key)?;
        }
        Ok(())
    }

    /// Which applications wanted ports of the tunnel, in all netns and in no order: as far back as there
    /// was room.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn reserved_binds(&self) -> Result<Vec<(ReservedPort, ReservedBind)>, KernelError> {
        self.list(RESERVED_BINDS.name)
    }

    /// The tunnel's listeners that are open, in no order. The kernel shows user space the keys only,
    /// and removes each with its socket.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn tunnel_listeners(&self) -> Result<Vec<ListenerKey>, KernelError> {
        let failed = |error| KernelError::map("read", TUNNEL_LISTENERS.name)(error);
        let map = SockHash::<_, ListenerKey>::try_from(find(&self.object, TUNNEL_LISTENERS.name))
            .map_err(failed)?;
        map.keys().collect::<Result<_, _>>().map_err(failed)
    }

    /// The cookies of the netns in which a tunnel has a listener.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn tunnel_netns(&self) -> Result<BTreeSet<u64>, KernelError> {
        Ok(self.tunnel_listeners()?.into_iter().map(|key| key.netns_cookie).collect())
    }
}
