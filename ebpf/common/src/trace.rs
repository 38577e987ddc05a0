//! One record per verdict, in ring buffer `trace`, while [`crate::settings::Settings::debug`] is
//! on.

use crate::{address::Address, plain_data};

/// One verdict, as the pod sees the connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct TraceRecord {
    /// The cgroup id of the calling task. Where no task calls (`sk_lookup`), that of the pod whose
    /// netns it is, or 0.
    pub cgroup_id: u64,
    /// The pod's address.
    pub local: Address,
    /// The address at the other end.
    pub remote: Address,
    /// Host byte order; 0 for a connect, whose port is not chosen yet.
    pub local_port: u16,
    /// Host byte order.
    pub remote_port: u16,
    /// A [`Hook`].
    pub hook: u16,
    /// A [`Rule`].
    pub rule: u16,
}

plain_data!(TraceRecord);

/// The key in `trace_watched` of the cgroup `id`.
#[inline(always)]
#[must_use]
pub const fn watched_cgroup(id: u64) -> Address {
    no_address(b'c', id)
}

/// The key in `trace_watched` of the netns `cookie`.
#[inline(always)]
#[must_use]
pub const fn watched_netns(cookie: u64) -> Address {
    no_address(b'n', cookie)
}

/// A multicast address, which no TCP connection has at either end.
#[inline(always)]
const fn no_address(kind: u8, id: u64) -> Address {
    let id = id.to_be_bytes();
    [0xff, kind, 0, 0, 0, 0, 0, 0, id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]]
}

/// Numbers with names: what is stored is the number, what people read is the name.
macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $number:literal, $text:literal;)+ }) => {
        $(#[$meta])*
        #[repr(u16)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$doc])* #[doc = $text] $variant = $number,)+ }
        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$variant),+];
            /// As logs, metrics and commands print it.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
            /// The one with this number, if there is one.
            #[must_use]
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

numbered! {
    /// Where a verdict was given.
    Hook {
        Connect4 = 0, "connect4";
        Connect6 = 1, "connect6";
        SkLookup = 2, "sk_lookup";
        Sendmsg4 = 3, "sendmsg4";
        Sendmsg6 = 4, "sendmsg6";
    }
}

numbered! {
    /// The rule that decided, of the lists in [`crate::decide`].
    Rule {
        NotTcp = 0, "leave: not TCP";
        Loopback = 1, "leave: loopback";
        Tunnel = 2, "leave: caller is the tunnel";
        NotEnrolled = 3, "leave: caller is not enrolled";
        OwnAddress = 4, "leave: the pod's own address";
        ExcludedPort = 5, "leave: port excluded";
        ExcludedCidr = 6, "leave: CIDR excluded";
        FailOpen = 7, "leave: tunnel away, pod fails open";
        FailClosed = 8, "refuse: tunnel away, pod fails closed";
        NoAddress = 9, "refuse: pod has no address of this family";
        NotRecorded = 10, "refuse: original destination cannot be recorded";
        Redirect = 11, "redirect to the tunnel";
        SameHost = 12, "pass: from the pod itself";
        NotedFlow = 13, "pass: the tunnel's own flow";
        UnknownNetns = 14, "refuse: no pod is known to have this netns";
        SteerHbone = 15, "steer to HBONE";
        SteerPlain = 16, "steer to plaintext inbound";
        DropReserved = 17, "refuse: reserved port";
        DnsRedirect = 18, "redirect: DNS query to the tunnel";
        NotListening = 19, "refuse: nobody listens on the port";
        OtherNetns = 20, "leave: socket of another netns than the pod's";
        LinkLocal = 21, "leave: link-local address";
        SteerOutbound = 22, "steer to outbound";
        ListenerGone = 23, "refuse: the tunnel went away after the redirect";
        NoEntry = 24, "refuse: enrolled netns of a pod without an entry";
        Kubelet = 25, "pass: the kubelet's own connection, such as a probe";
        NotIncluded = 26, "leave: in no inclusion list";
        Guarded = 27, "leave: caller is guarded";
        ExcludedDevice = 28, "leave: interface excluded";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_cgroups_and_netns_are_no_addresses_and_differ() {
        let keys = [watched_cgroup(1), watched_cgroup(256), watched_netns(1), watched_netns(u64::MAX)];
        for (at, key) in keys.iter().enumerate() {
            assert!(core::net::Ipv6Addr::from(*key).is_multicast() && !keys[..at].contains(key));
        }
    }

    #[test]
    fn every_rule_is_found_by_its_number() {
        for rule in Rule::ALL {
            assert_eq!(Rule::from_number(*rule as u16), Some(*rule), "{}", rule.as_str());
        }
        assert_eq!(Rule::from_number(999), None);
    }
}
