//! The decisions about a connection: one list for those that a pod opens, one for those that it
//! receives. In each list the first rule that applies wins.
//!
//! The lists ask a [`Facts`] for what they need. The kernel programs answer by looking maps up;
//! `watcher explain` answers from the same maps as user space reads them; the tests from plain
//! values. So all three agree.
//!
//! *Ready*: a tunnel is connected and has acknowledged the pod. A pod that is not ready follows its
//! fail mode: open passes in clear, closed is refused. The same goes for a pod whose tunnel has no
//! listener any more, which the kernel notices without the watcher.

use crate::{
    address::{Address, UNSPECIFIED, is_link_local, is_loopback, is_unspecified, is_v4, mapped, same},
    enrolment::{CgroupInfo, NetnsInfo, flag},
    exclusions::{Listed, OUTBOUND},
    flows::{Destination, Flow},
    listeners::ListenerKey,
    redirect_ports::redirect_port,
    settings::Settings,
    trace::Rule,
};

pub use self::inbound::{Arrival, Inbound, inbound};

mod inbound;
#[cfg(any(test, feature = "plain"))]
pub mod plain;
#[cfg(test)]
mod tests;

/// The port of DNS.
pub const DNS_PORT: u16 = 53;

const LOOPBACK_V4: Address = mapped([127, 0, 0, 1]);
const LOOPBACK_V6: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// What both lists need to know.
pub trait Facts {
    /// The settings of the node.
    fn settings(&self) -> &Settings;
    /// What the list `exclusion_id` says of `port` in `direction` ([`OUTBOUND`] or
    /// [`INBOUND`](crate::exclusions::INBOUND)).
    fn port_listed(&self, exclusion_id: u32, port: u16, direction: u16) -> Listed;
}

/// What the outbound list needs to know besides.
pub trait ConnectFacts: Facts {
    /// The pod's entry, which [`entry`] picks.
    fn entry(&self) -> Option<&CgroupInfo>;
    /// The cookie of the netns that the socket was created in.
    fn netns_cookie(&self) -> u64;
    /// The flags of that netns, as far as it is known as a pod's; 0: it is not.
    fn netns_flags(&self) -> u32;
    /// Whether the enrolled pod in that netns has `address`, on that interface; 0: on whichever.
    fn has_address(&self, netns_cookie: u64, address: &Address, device: u32) -> bool;
    /// What the list `exclusion_id` says of the narrowest range that `address` is in.
    fn address_listed(&self, exclusion_id: u32, address: &Address) -> Listed;
    /// Whether the list `exclusion_id` leaves the user or the group of the calling process alone.
    fn is_guarded_id(&self, exclusion_id: u32) -> bool;
    /// Whether the list `exclusion_id` excludes the interface that the socket is bound to.
    fn is_excluded_device(&self, exclusion_id: u32) -> bool;
    /// Whether the tunnel has exactly this listener.
    fn has_tunnel_listener(&self, key: &ListenerKey) -> bool;
    /// The port that the socket is bound to, in host byte order; 0: the kernel is to choose one.
    fn source_port(&self) -> u16;
    /// The address that the socket is bound to; unspecified: to none.
    fn source(&self) -> Address;
    /// The number of the interface that the socket is bound to, from where the loopback, and addresses
    /// of other interfaces, are out of reach; 0: to none.
    fn device(&self) -> u32;
    /// Records on the socket where it wanted to go, and where it goes instead. Whether it could.
    fn record(&self, original: &Destination, redirect: &Destination) -> bool;
}

/// What the inbound list needs to know besides.
pub trait ArrivalFacts: Facts {
    /// The cookie of the netns that the connection arrives in.
    fn arrival_netns(&self) -> u64;
    /// What is known of that netns, as a pod's.
    fn netns(&self) -> Option<NetnsInfo>;
    /// Whether the kubelet opened `flow`, and it may still be on its way.
    fn is_of_kubelet(&self, flow: &Flow) -> bool;
    /// The cookie of the netns from which the tunnel opened `flow`, if it did.
    fn tunnel_flow(&self, flow: &Flow) -> Option<u64>;
    /// Whether connect(2) redirected `flow` to the tunnel, which has not accepted it yet.
    fn is_redirected(&self, flow: &Flow) -> bool;
    /// Gives the connection to exactly this listener of the tunnel. Whether it is there.
    fn steer(&self, to: &ListenerKey) -> bool;
    /// Whether an application is known to have exactly this listener.
    fn has_app_listener(&self, key: &ListenerKey) -> bool;
    /// Whether every listener of the netns is known.
    fn knows_all_app_listeners(&self, netns_cookie: u64) -> bool;
}

/// A call of connect(2), or of sendmsg(2) with an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// MPTCP counts as TCP.
    pub is_tcp: bool,
    /// Neither TCP nor UDP: both false.
    pub is_udp: bool,
    /// Where it wants to go.
    pub destination: Destination,
}

impl Connect {
    /// Whether it may be a DNS query.
    #[inline(always)]
    #[must_use]
    pub const fn is_query(&self) -> bool {
        self.destination.port == DNS_PORT && (self.is_tcp || self.is_udp)
    }
}

/// The verdict about a call of connect(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outbound {
    /// It goes where it wants to.
    Leave(Rule),
    /// The call fails with `EPERM`.
    Refuse(Rule),
    /// It goes there instead.
    Redirect(Rule, Destination),
}

impl Outbound {
    /// The rule that decided.
    #[inline(always)]
    #[must_use]
    pub const fn rule(&self) -> Rule {
        match self {
            Self::Leave(rule) | Self::Refuse(rule) | Self::Redirect(rule, _) => *rule,
        }
    }
}

/// *The pod's entry* is that of the caller's cgroup. If that has none, or the socket is in another
/// netns than the cgroup's pod, it is the entry of the pod that has the socket's netns: so what runs
/// in a pod's netns outside its cgroup is captured too.
#[inline(always)]
#[must_use]
pub const fn entry<'a>(
    caller: Option<&'a CgroupInfo>,
    netns_pod: Option<&'a CgroupInfo>,
    netns_cookie: u64,
) -> Option<&'a CgroupInfo> {
    match (caller, netns_pod) {
        (Some(info), _) if is_the_one(info, netns_cookie) => Some(info),
        (_, Some(pod)) => Some(pod),
        (caller, None) => caller,
    }
}

/// Whether the entry of the caller's cgroup decides, whatever is known of the socket's netns.
#[inline(always)]
#[must_use]
pub const fn is_the_one(caller: &CgroupInfo, netns_cookie: u64) -> bool {
    caller.flags & flag::TUNNEL != 0 || is_here(caller, netns_cookie)
}

/// Whether the socket is in the netns of the entry's pod, as far as that is known.
#[inline(always)]
const fn is_here(info: &CgroupInfo, netns_cookie: u64) -> bool {
    info.netns_cookie == 0 || info.netns_cookie == netns_cookie
}

/// Decides about an outbound connection, by the pod's [`entry`]:
///
/// 1. a DNS query that [`dns_redirect`] captures: redirect to the tunnel's DNS port
/// 2. not TCP: leave
/// 3. to loopback, which 0.0.0.0 and :: mean too: leave; but refuse the tunnel's ports to an
///    enrolled, ready pod
/// 4. the caller is a tunnel: leave, or its own traffic would come back to it
/// 5. there is no entry, though the socket's netns is an enrolled pod's: by that pod's fail mode. The
///    entry found no room, or somebody removed it
/// 6. there is no entry, it does not enrol, or a sidecar carries its traffic: leave
/// 7. the socket is in a netns that is no pod's, and the entry's pod has another one: leave. What a
///    program runs in a netns of its own reaches nobody but by the pod's
/// 8. to one of the pod's own addresses: leave; but refuse the tunnel's ports
/// 9. the caller is guarded, by its container, its user or its group: leave
/// 10. excluded by port, by CIDR, or by the interface that the socket is bound to: leave; so if there
///     are inclusion lists, and none has its port or address. A range that only a route excludes
///     counts if the socket is bound to no interface: another one would not take the route
/// 11. the pod is not ready: by its fail mode
/// 12. to a link-local address of IPv6: leave. It means nothing without its interface, which a
///     redirect would lose
/// 13. the pod has no address of this family, or the socket is bound to an address that is not known
///     as the pod's, or to an interface that has no such address, so there is nothing to redirect to:
///     refuse
/// 14. the tunnel's listener is gone: by the pod's fail mode
/// 15. the original destination cannot be recorded, so the tunnel would not learn it: refuse
/// 16. redirect to the tunnel
#[inline(always)]
pub fn outbound(facts: &impl ConnectFacts, call: &Connect) -> Outbound {
    let to = &call.destination;
    if call.is_query() {
        let redirect = dns_redirect(facts, to);
        if redirect.is_somewhere() {
            return Outbound::Redirect(Rule::DnsRedirect, redirect);
        }
    }
    if !call.is_tcp {
        return Outbound::Leave(Rule::NotTcp);
    }
    let settings = facts.settings();
    let local = is_loopback(&to.address) || is_unspecified(&to.address);
    if local && !settings.is_reserved(to.port) {
        return Outbound::Leave(Rule::Loopback);
    }
    let Some(info) = facts.entry() else {
        return if local { Outbound::Leave(Rule::Loopback) } else { without_entry(facts.netns_flags()) };
    };
    if info.flags & flag::TUNNEL != 0 {
        return Outbound::Leave(Rule::Tunnel);
    }
    if info.flags & flag::IN_MESH == 0 || (info.flags | info.detected) & flag::SIDECAR != 0 {
        return Outbound::Leave(Rule::NotEnrolled);
    }
    if !is_here(info, facts.netns_cookie()) {
        return Outbound::Leave(Rule::OtherNetns);
    }
    let ready = is_ready(settings, info.flags);
    if local || is_own_address(facts, info, &to.address) {
        return if ready && settings.is_reserved(to.port) {
            Outbound::Refuse(Rule::DropReserved)
        } else {
            Outbound::Leave(if local { Rule::Loopback } else { Rule::OwnAddress })
        };
    }
    if is_guarded(facts, info) {
        return Outbound::Leave(Rule::Guarded);
    }
    if let Some(rule) = outside(facts, info, to) {
        return Outbound::Leave(rule);
    }
    if !ready {
        return without_tunnel(info);
    }
    if is_link_local(&to.address) {
        return Outbound::Leave(Rule::LinkLocal);
    }
    let tunnel = redirect_address(facts, info, is_v4(&to.address));
    if same(&tunnel, &UNSPECIFIED) {
        return Outbound::Refuse(Rule::NoAddress);
    }
    let listener = ListenerKey::new(info.netns_cookie, info.redirect_port, is_v4(&to.address));
    if !facts.has_tunnel_listener(&listener) && !facts.has_tunnel_listener(&listener.v6()) {
        return without_tunnel(info);
    }
    let port = if info.flags & flag::SPREAD != 0 {
        redirect_port(to, facts.source_port())
    } else {
        info.redirect_port
    };
    let redirect = Destination::new(tunnel, port);
    // Always overwritten: one socket may connect, dissolve and connect again.
    if !facts.record(to, &redirect) {
        return Outbound::Refuse(Rule::NotRecorded);
    }
    Outbound::Redirect(Rule::Redirect, redirect)
}

/// Whether the calling process is left alone. Without guards this asks for nothing.
#[inline(always)]
fn is_guarded(facts: &impl ConnectFacts, info: &CgroupInfo) -> bool {
    info.flags & flag::GUARDED != 0
        || info.flags & flag::GUARDS_IDS != 0 && facts.is_guarded_id(info.exclusion_id)
}

/// The rule by which the lists leave connections to `to` outside the mesh, if they do.
#[inline(always)]
fn outside(facts: &impl ConnectFacts, info: &CgroupInfo, to: &Destination) -> Option<Rule> {
    let exclusion_id = info.exclusion_id;
    if info.flags & flag::EXCLUDES_DEVICES != 0
        && facts.device() != 0
        && facts.is_excluded_device(exclusion_id)
    {
        return Some(Rule::ExcludedDevice);
    }
    let port = facts.port_listed(exclusion_id, to.port, OUTBOUND);
    if port == Listed::EXCLUDED {
        return Some(Rule::ExcludedPort);
    }
    let address = facts.address_listed(exclusion_id, &to.address);
    // One that is bound to an excluded interface was left alone above.
    if address == Listed::EXCLUDED || address == Listed::BY_ROUTE && facts.device() == 0 {
        return Some(Rule::ExcludedCidr);
    }
    if address == Listed::OUTSIDE && port != Listed::INCLUDED { Some(Rule::NotIncluded) } else { None }
}

/// For a caller of whom nothing is known, by the flags of the socket's netns.
#[inline(always)]
fn without_entry(netns_flags: u32) -> Outbound {
    if netns_flags & flag::IN_MESH == 0 || netns_flags & flag::SIDECAR != 0 {
        Outbound::Leave(Rule::NotEnrolled)
    } else if netns_flags & flag::FAIL_OPEN != 0 {
        Outbound::Leave(Rule::FailOpen)
    } else {
        Outbound::Refuse(Rule::NoEntry)
    }
}

/// The fail mode of a pod that no tunnel serves.
#[inline(always)]
fn without_tunnel(info: &CgroupInfo) -> Outbound {
    if info.flags & flag::FAIL_OPEN != 0 {
        Outbound::Leave(Rule::FailOpen)
    } else {
        Outbound::Refuse(Rule::FailClosed)
    }
}

/// The address of the pod to which a connection is redirected; unspecified: there is none.
///
/// A socket that is bound to an address is redirected to that one: so both of its ends are the same,
/// by which the inbound list and the tunnel know it as the pod's own, and the tunnel learns its
/// choice. Another pod might have an address that is not known as this one's. From a socket that is
/// bound to an interface, another one's address is not local: the connection would leave there, in
/// clear.
#[inline(always)]
fn redirect_address(facts: &impl ConnectFacts, info: &CgroupInfo, v4: bool) -> Address {
    let mut to = if v4 { info.v4 } else { info.v6 };
    let (source, device) = (facts.source(), facts.device());
    let is_other = !is_unspecified(&source) && !same(&source, &to);
    if is_other {
        to = source;
    }
    // The record of the first address may come a moment after the entry.
    let is_known = !is_other && device == 0 || facts.has_address(info.netns_cookie, &to, device);
    if is_known { to } else { UNSPECIFIED }
}

/// Whether `address` is one of the pod's. Its cgroup's entry has the first one of each family only;
/// the others have a record with the pod's netns.
#[inline(always)]
fn is_own_address(facts: &impl ConnectFacts, info: &CgroupInfo, address: &Address) -> bool {
    same(address, &info.v4) || same(address, &info.v6) || facts.has_address(info.netns_cookie, address, 0)
}

/// Where a DNS query to `resolver` goes instead; port 0 means nowhere:
///
/// 1. the pod's queries are not captured, its traffic is not the tunnel's, or the socket is in
///    another netns: nowhere
/// 2. no tunnel is ready for the pod: nowhere. DNS is no security boundary: the resolver answers a
///    name that the tunnel does not, and the connection that follows meets the pod's fail mode
/// 3. the resolver is the pod's own (loopback, or one of its addresses) or on the link, or the
///    socket is bound to a device, from where the loopback is out of reach: nowhere
/// 4. the caller is guarded: nowhere
/// 5. excluded by port or by CIDR, or not included: nowhere
/// 6. the settings name resolvers, and this is none of them: nowhere
/// 7. the tunnel does not serve DNS in this netns: nowhere, for the same reason as 2
/// 8. the resolver cannot be recorded, so the answer would come from a wrong address: nowhere
/// 9. to the tunnel's DNS port
#[inline(always)]
pub fn dns_redirect(facts: &impl ConnectFacts, resolver: &Destination) -> Destination {
    const WANTED: u32 = flag::IN_MESH | flag::DNS_CAPTURE | flag::READY;
    const FOREIGN: u32 = flag::TUNNEL | flag::SIDECAR;
    let settings = facts.settings();
    let Some(info) = facts.entry() else { return Destination::NOWHERE };
    if !is_here(info, facts.netns_cookie()) {
        return Destination::NOWHERE;
    }
    if info.flags & WANTED != WANTED || (info.flags | info.detected) & FOREIGN != 0 || settings.tunnel_up == 0
    {
        return Destination::NOWHERE;
    }
    let to = &resolver.address;
    if is_loopback(to)
        || is_unspecified(to)
        || is_link_local(to)
        || is_own_address(facts, info, to)
        || facts.device() != 0
    {
        return Destination::NOWHERE;
    }
    if is_guarded(facts, info) || outside(facts, info, resolver).is_some() || !is_captured(settings, to) {
        return Destination::NOWHERE;
    }
    // The tunnel listens for TCP once it serves UDP too.
    let listener = ListenerKey::new(info.netns_cookie, settings.dns_port, is_v4(to));
    if !facts.has_tunnel_listener(&listener) {
        return Destination::NOWHERE;
    }
    let loopback = if is_v4(to) { LOOPBACK_V4 } else { LOOPBACK_V6 };
    let redirect = Destination::new(loopback, settings.dns_port);
    if facts.record(resolver, &redirect) { redirect } else { Destination::NOWHERE }
}

#[inline(always)]
fn is_captured(settings: &Settings, resolver: &Address) -> bool {
    let named = &settings.resolvers;
    same(&named[0], &UNSPECIFIED)
        || same(&named[0], resolver)
        || same(&named[1], resolver)
        || same(&named[2], resolver)
}

#[inline(always)]
fn is_ready(settings: &Settings, flags: u32) -> bool {
    settings.tunnel_up != 0 && flags & flag::READY != 0
}
