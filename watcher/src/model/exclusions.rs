//! Ports and address ranges that bypass the tunnel, and those that do not where the rest does.
//!
//! An invalid item is noted and ignored, the others stay active: a typing error in one port must
//! not take a pod out of the mesh, nor put the other ports into it.
//!
//! Whoever may create a pod writes these lists. So reading one takes time in proportion to its
//! text: ranges are merged and never expanded, and what a list can take of the kernel's maps and of
//! messages has limits.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    ops::{ControlFlow, RangeInclusive},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;

use super::{guards::Guards, notes::Notes};

/// How many items of a list are read. All annotations of a pod together have 256 KiB.
const MAX_ITEMS: usize = 65_536;
/// How many ranges of ports, merged, a list may have. At the worst a pod's four lists take a third of
/// the kernel's map; they mostly take much less.
const MAX_PORT_RANGES: usize = 512;
/// How many ranges of addresses, merged, a list may have: an eighth of the kernel's map.
const MAX_CIDRS: usize = 16_384;
/// How many names or patterns of interfaces a list may have.
const MAX_INTERFACES: usize = 16;
/// As the kernel limits them, without the ending zero.
const MAX_INTERFACE_NAME: usize = 15;
/// How many invalid items of a list are noted one by one.
const MAX_INVALID: usize = 4;
/// How much of an invalid item a note shows, in characters.
const SHOWN: usize = 40;

/// Traffic of a pod that bypasses the tunnel. Ranges are in order, and no two of a list overlap or
/// touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Exclusions {
    /// Destination ports of its connections.
    pub outbound_ports: Vec<RangeInclusive<u16>>,
    /// Destination addresses of its connections.
    pub outbound_cidrs: Vec<IpNet>,
    /// Its own ports, for connections to it.
    pub inbound_ports: Vec<RangeInclusive<u16>>,
    /// `Some`: of its other connections only these go through the tunnel.
    pub outbound_included: Option<Included>,
    /// The same of connections to it, by its own ports.
    pub inbound_included: Option<Vec<RangeInclusive<u16>>>,
    /// Interfaces, as patterns: what leaves by them bypasses the tunnel.
    pub interfaces: BTreeSet<String>,
    /// Where the pod's routes send by these. It bypasses the tunnel, but for sockets that are bound to
    /// another interface. No range lies within one of `outbound_cidrs`.
    pub by_route: Vec<IpNet>,
    /// The numbers of those in the pod's netns.
    pub devices: BTreeSet<u32>,
    /// Processes whose connections bypass the tunnel, whatever their destination.
    pub guards: Guards,
}

/// Connections that go through the tunnel where others do not: those to one of these ports, or to
/// one of these addresses. No port of them is excluded, and no range lies within an excluded one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Included {
    /// Destination ports.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Destination addresses.
    pub cidrs: Vec<IpNet>,
}

impl Exclusions {
    /// Whether all of its traffic goes through the tunnel.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the kernel's maps have entries for it.
    #[must_use]
    pub fn takes_entries(&self) -> bool {
        !self.outbound_ports.is_empty()
            || !self.outbound_cidrs.is_empty()
            || !self.by_route.is_empty()
            || !self.inbound_ports.is_empty()
            || self.outbound_included.is_some()
            || self.inbound_included.is_some()
            || !self.devices.is_empty()
            || self.guards.has_ids()
    }

    /// Whether a connection to `to`, of a process that is not guarded, bypasses the tunnel. `is_bound`:
    /// to an interface, which is none of those that are excluded.
    #[must_use]
    pub fn leaves_outside(&self, to: SocketAddr, is_bound: bool) -> bool {
        let (has_port, has_address) = (has_port(to.port()), has_address(to.ip()));
        if has_port(&self.outbound_ports) || has_address(&self.outbound_cidrs) {
            return true;
        }
        if has_address(&self.by_route) {
            return !is_bound;
        }
        self.outbound_included
            .as_ref()
            .is_some_and(|Included { ports, cidrs }| !has_port(ports) && !has_address(cidrs))
    }

    /// Whether a connection from somebody else to its own `port` bypasses the tunnel.
    #[must_use]
    pub fn leaves_outside_at(&self, port: u16) -> bool {
        let has_port = has_port(port);
        has_port(&self.inbound_ports)
            || self.inbound_included.as_deref().is_some_and(|ports| !has_port(ports))
    }

    /// Excludes these interfaces besides, and the addresses that routes send by them.
    pub fn exclude_also(&mut self, ranges: &[IpNet], devices: &BTreeSet<u32>) {
        // The narrower range would count: it must not undo the wider one.
        self.by_route = outside_of(&IpNet::aggregate(&ranges.to_vec()), &self.outbound_cidrs);
        self.devices.extend(devices);
        if let Some(included) = &mut self.outbound_included {
            included.cidrs = outside_of(&included.cidrs, &self.by_route);
        }
    }

    /// The same without inclusion lists that decide nothing, since they have everything or everything
    /// is excluded.
    pub(super) fn in_short(mut self) -> Self {
        let has_all = |ports: &[RangeInclusive<u16>]| ports == [1..=u16::MAX];
        let has_both = |cidrs: &[IpNet]| cidrs.iter().filter(|cidr| cidr.prefix_len() == 0).count() == 2;
        let nothing_is_left = has_all(&self.outbound_ports) || has_both(&self.outbound_cidrs);
        let decides = |Included { ports, cidrs }: &Included| !has_all(ports) && !has_both(cidrs);
        self.outbound_included =
            self.outbound_included.filter(|included| !nothing_is_left && decides(included));
        let nothing_is_left = has_all(&self.inbound_ports);
        self.inbound_included = self.inbound_included.filter(|ports| !nothing_is_left && !has_all(ports));
        self
    }
}

fn has_port(port: u16) -> impl Fn(&[RangeInclusive<u16>]) -> bool + Copy {
    move |ports| ports.iter().any(|range| range.contains(&port))
}

fn has_address(address: IpAddr) -> impl Fn(&[IpNet]) -> bool + Copy {
    move |cidrs| cidrs.iter().any(|cidr| cidr.contains(&address))
}

/// Reads ports (`6379`, `"6379, 7070"`, `"7000-7010"`); invalid items go to `notes`, named by
/// `key`.
pub fn ports(key: &str, value: &Value, notes: &mut Notes) -> Vec<RangeInclusive<u16>> {
    let expected = "a port from 1 to 65535 or a range such as 7000-7010";
    let ranges = read(key, value, expected, notes, range);
    let mut merged = union(ranges.iter());
    limit(key, "ranges of ports", &mut merged, MAX_PORT_RANGES, notes);
    merged
}

/// In order, and merged.
pub(super) fn union<'a>(ranges: impl Iterator<Item = &'a RangeInclusive<u16>>) -> Vec<RangeInclusive<u16>> {
    let mut all: Vec<(u16, u16)> = ranges.map(|range| (*range.start(), *range.end())).collect();
    all.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::new();
    for (first, last) in all {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged.into_iter().map(|(first, last)| first..=last).collect()
}

/// Those of `ranges` that are not within one of `others`, merged. `others` is merged and in order.
/// What of a range another one excludes stays within it: the narrowest range counts.
pub(super) fn outside_of(ranges: &[IpNet], others: &[IpNet]) -> Vec<IpNet> {
    let is_within = |range: &&IpNet| {
        // Ranges nest or are apart: only the last one that begins before it can have it.
        let after = others.partition_point(|other| begin(other) <= begin(range));
        after.checked_sub(1).is_some_and(|at| others[at].contains(*range))
    };
    let left: Vec<IpNet> = ranges.iter().filter(|range| !is_within(range)).copied().collect();
    IpNet::aggregate(&left)
}

/// IPv4 before IPv6, as [`IpNet::aggregate`] orders them.
fn begin(range: &IpNet) -> (bool, IpAddr) {
    (matches!(range, IpNet::V6(_)), range.network())
}

/// `*` is every port.
fn range(item: &str) -> Option<RangeInclusive<u16>> {
    if item == "*" {
        return Some(1..=u16::MAX);
    }
    let (first, last) = item.split_once('-').unwrap_or((item, item));
    let (first, last) = (first.trim().parse::<u16>().ok()?, last.trim().parse::<u16>().ok()?);
    (first != 0 && first <= last).then_some(first..=last)
}

/// Reads CIDRs or single addresses, or `*` for everything of both families; invalid items go to `notes`, named by `key`. IPv4 in mapped
/// form is IPv4.
pub fn cidrs(key: &str, value: &Value, notes: &mut Notes) -> Vec<IpNet> {
    let cidrs = read(key, value, "a CIDR such as 10.0.0.0/8 or fd00::/8", notes, |item| {
        if item == "*" {
            return Some((Ipv4Net::default().into(), Some(Ipv6Net::default().into())));
        }
        let cidr = item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from)).ok()?;
        Some((canonical(cidr).trunc(), None))
    });
    let cidrs: Vec<IpNet> = cidrs.into_iter().flat_map(|(one, other)| [Some(one), other]).flatten().collect();
    let mut merged = IpNet::aggregate(&cidrs);
    limit(key, "address ranges", &mut merged, MAX_CIDRS, notes);
    merged
}

/// Reads names of interfaces (`net1`), with `*` for anything and `?` for one character; invalid items go
/// to `notes`, named by `key`.
pub fn interfaces(key: &str, value: &Value, notes: &mut Notes) -> BTreeSet<String> {
    let expected = "the name of an interface such as net1, or a pattern such as net*";
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:@*?".contains(&byte);
    let names = read(key, value, expected, notes, |item| {
        let is_name = (1..=MAX_INTERFACE_NAME).contains(&item.len()) && item.bytes().all(fits);
        (is_name && item.trim_matches('*') != "lo").then(|| item.to_owned())
    });
    let mut names: Vec<String> = names.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    limit(key, "interfaces", &mut names, MAX_INTERFACES, notes);
    names.into_iter().collect()
}

/// A range within `::ffff:0:0/96` as the range of IPv4 that it stands for.
fn canonical(cidr: IpNet) -> IpNet {
    let mapped = || {
        let IpNet::V6(v6) = cidr else { return None };
        let length = v6.prefix_len().checked_sub(96)?;
        Ipv4Net::new(v6.addr().to_ipv4_mapped()?, length).ok()
    };
    mapped().map_or(cidr, IpNet::V4)
}

/// The items of `value` that `parse` takes; the others are noted.
pub(crate) fn read<T>(
    key: &str,
    value: &Value,
    expected: &str,
    notes: &mut Notes,
    parse: impl Fn(&str) -> Option<T>,
) -> Vec<T> {
    let (mut found, mut seen, mut invalid) = (Vec::new(), 0usize, 0usize);
    let whole = each_item(value, &mut |item| {
        if seen == MAX_ITEMS {
            return ControlFlow::Break(());
        }
        seen += 1;
        if let Some(parsed) = parse(item) {
            found.push(parsed);
            return ControlFlow::Continue(());
        }
        invalid += 1;
        if invalid <= MAX_INVALID {
            let shown: String = item.chars().take(SHOWN).collect();
            notes.push(format!("{key}: \"{shown}\" ignored, expected {expected}"));
        }
        ControlFlow::Continue(())
    });
    if invalid > MAX_INVALID {
        notes.push(format!("{key}: {} more invalid items ignored", invalid - MAX_INVALID));
    }
    if whole.is_break() {
        notes.push(format!("{key}: only the first {MAX_ITEMS} items are used, the others are ignored"));
    }
    found
}

/// Calls `each` for the single items of `value`, which is a number, a text with commas between
/// items, or a list of both.
fn each_item(value: &Value, each: &mut impl FnMut(&str) -> ControlFlow<()>) -> ControlFlow<()> {
    match value {
        Value::Array(list) => list.iter().try_for_each(|value| each_item(value, each)),
        Value::String(text) => {
            text.split(',').map(str::trim).filter(|item| !item.is_empty()).try_for_each(each)
        }
        Value::Null => ControlFlow::Continue(()),
        other => each(&other.to_string()),
    }
}

fn limit<T>(key: &str, what: &str, list: &mut Vec<T>, most: usize, notes: &mut Notes) {
    if list.len() > most {
        notes.push(format!("{key}: {} {what}, of which the first {most} are used", list.len()));
        list.truncate(most);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_routes_exclude_counts_for_sockets_that_take_them() {
        let list = |text: &str| cidrs("", &text.into(), &mut Notes::default());
        let mut here = Exclusions {
            outbound_cidrs: list("10.9.0.0/16"),
            outbound_included: Some(Included { ports: Vec::new(), cidrs: list("10.6.0.0/16,10.7.1.0/24") }),
            ..Exclusions::default()
        };
        here.exclude_also(&list("10.7.0.0/16,10.9.8.0/24"), &[7].into());
        assert_eq!(here.by_route, list("10.7.0.0/16"));
        assert_eq!(here.outbound_included.as_ref().unwrap().cidrs, list("10.6.0.0/16"));
        for (to, free, bound) in [
            ("10.7.1.1:80", true, false),
            ("10.9.8.1:80", true, true),
            ("10.6.1.1:80", false, false),
            ("192.0.2.1:80", true, true),
        ] {
            let leaves = [false, true].map(|is_bound| here.leaves_outside(to.parse().unwrap(), is_bound));
            assert_eq!(leaves, [free, bound], "{to}");
        }
    }

    fn read_ports(value: &Value) -> (Vec<RangeInclusive<u16>>, usize) {
        let mut notes = Notes::default();
        (ports("excludeOutboundPorts", value, &mut notes), notes.len())
    }

    #[test]
    fn ports_are_read_as_numbers_texts_and_ranges_and_merged() {
        assert_eq!(
            read_ports(&json!([6379, "7000-7002", 65535, 7003])),
            (vec![6379..=6379, 7000..=7003, 65535..=65535], 0)
        );
        assert_eq!(read_ports(&json!("6379, 7070")), (vec![6379..=6379, 7070..=7070], 0));
        assert_eq!(read_ports(&json!("100-200,1-65535,65534-65535")), (vec![1..=65535], 0));
        assert_eq!(read_ports(&json!(80)), (vec![80..=80], 0));
        assert_eq!(read_ports(&json!(null)), (vec![], 0));
    }

    #[test]
    fn an_invalid_item_is_noted_and_the_others_stay() {
        for bad in [
            json!(0),
            json!(65536),
            json!(-1),
            json!("9-8"),
            json!("http"),
            json!("1-"),
            json!(1.5),
            json!(true),
        ] {
            assert_eq!(read_ports(&json!([bad, 80])), (vec![80..=80], 1), "{bad}");
        }
    }

    fn read_cidrs(value: &Value) -> (Vec<String>, Notes) {
        let mut notes = Notes::default();
        let read = cidrs("excludeOutboundCidrs", value, &mut notes);
        (read.iter().map(ToString::to_string).collect(), notes)
    }

    #[test]
    fn cidrs_may_be_everything_of_a_family_or_one_address() {
        let (read, notes) = read_cidrs(&json!(["::/0", "10.1.2.3/8", "192.0.2.1", "10/8", "10.0.0.0/9"]));
        assert_eq!(read, ["10.0.0.0/8", "192.0.2.1/32", "::/0"]);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].contains("\"10/8\""), "{notes:?}");
        assert_eq!(read_cidrs(&json!("0.0.0.0/0,10.0.0.0/8,fd00::1")).0, ["0.0.0.0/0", "fd00::1/128"]);
    }

    #[test]
    fn ipv4_in_mapped_form_is_ipv4() {
        for (given, read) in [
            ("::ffff:10.1.2.3", "10.1.2.3/32"),
            ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::ffff:0:0/95", "::fffe:0:0/95"),
        ] {
            assert_eq!(read_cidrs(&json!(given)).0, [read], "{given}");
        }
    }

    /// As long as all annotations of a pod together may be.
    fn longest(item: &str) -> Value {
        Value::String(item.repeat(256 * 1024 / item.len()))
    }

    #[test]
    fn the_longest_lists_take_little() {
        let count = |value: &Value| {
            let mut items = 0;
            let _ = each_item(value, &mut |_| {
                items += 1;
                ControlFlow::Continue(())
            });
            items
        };
        let all = longest("1-65535,");
        assert_eq!(count(&all), 32_768, "each item is looked at once");
        assert_eq!(read_ports(&all), (vec![1..=65535], 0));

        for nonsense in ["x,", "65536,", "1-65535-,"] {
            let mut notes = Notes::default();
            assert!(ports("k", &longest(nonsense), &mut notes).is_empty());
            assert!(cidrs("k", &longest(nonsense), &mut notes).is_empty());
            assert!(notes.len() <= 2 * (MAX_INVALID + 2), "{} notes of {nonsense}", notes.len());
            assert!(notes.iter().map(String::len).sum::<usize>() < 2000, "{notes:?}");
            assert!(notes.iter().any(|note| note.contains("more invalid items")), "{notes:?}");
        }
        assert_eq!(read_cidrs(&longest("10.2.0.0/16,::/0,")).0, ["10.2.0.0/16", "::/0"]);
    }

    #[test]
    fn what_is_past_a_limit_is_ignored_and_noted_by_name() {
        let mut notes = Notes::default();
        let odd: Vec<u32> = (1..65_536).step_by(2).collect();
        assert_eq!(ports("excludeInboundPorts", &json!(odd), &mut notes).len(), MAX_PORT_RANGES);
        assert_eq!(
            notes.to_vec(),
            ["excludeInboundPorts: 32768 ranges of ports, of which the first 512 are used"]
        );
        let mut notes = Notes::default();
        let single: Vec<String> = (0..20_000).map(|n| format!("10.{}.{}.1", n / 256, n % 256)).collect();
        assert_eq!(cidrs("k", &json!(single), &mut notes).len(), MAX_CIDRS);
        assert_eq!(notes.to_vec(), ["k: 20000 address ranges, of which the first 16384 are used"]);
        let mut notes = Notes::default();
        assert_eq!(ports("k", &json!(vec![80; MAX_ITEMS + 1]), &mut notes), [80..=80]);
        assert_eq!(notes.to_vec(), ["k: only the first 65536 items are used, the others are ignored"]);
        // What clusters have in practice fits whole.
        let mut notes = Notes::default();
        let ten_thousand: Vec<String> =
            (0..10_000).map(|n| format!("10.{}.{}.1", n / 256, n % 256)).collect();
        assert_eq!((cidrs("k", &json!(ten_thousand), &mut notes).len(), notes.len()), (10_000, 0));
    }
}
