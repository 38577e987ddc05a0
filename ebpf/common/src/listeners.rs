//! Who listens where: the tunnel's sockets, and those of applications.

use crate::plain_data;

/// A listening port of one netns. Key of `tunnel_listeners` (the kernel adds an entry when the
/// tunnel calls `listen(2)`) and of `app_listeners`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct ListenerKey {
    /// The netns that the listener was created in.
    pub netns_cookie: u64,
    /// Host byte order.
    pub port: u32,
    /// 4 or 6: see [`family`](Self::family).
    pub family: u32,
}

impl ListenerKey {
    /// The listener of `port`, of the IPv4 or the IPv6 family. A socket of IPv6 may serve IPv4 as
    /// well.
    #[inline(always)]
    #[must_use]
    pub const fn new(netns_cookie: u64, port: u16, is_v4: bool) -> Self {
        Self { netns_cookie, port: port as u32, family: if is_v4 { 4 } else { 6 } }
    }

    /// The IPv6 listener of the same port.
    #[inline(always)]
    #[must_use]
    pub const fn v6(self) -> Self {
        Self { family: 6, ..self }
    }
}

/// What is known of the applications' listeners in one netns as a whole. Value of
/// `app_listener_state`, keyed by netns cookie. Without an entry the programs add nothing to
/// `app_listeners` for this netns.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct AppListenerState {
    /// How many entries the programs added since the watcher last set this to 0.
    pub count: u32,
    /// 1: `app_listeners` has every listener of this netns, so a connection to another port is
    /// refused. 0: some may be missing, and no port is refused.
    pub complete: u32,
}

/// At most this many entries of one netns, or one pod could fill the map.
pub const MAX_APP_LISTENERS: u32 = 1024;

plain_data!(ListenerKey, AppListenerState);
