//! Exclusion lists in the kernel: written whole or not at all, read, and taken over from an earlier
//! build's maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    path::Path,
};

use adit_ebpf_common::{
    address::{Address, is_v4},
    exclusions::{
        CidrPrefix, ExcludedCidr, ExcludedId, ExcludedPorts, INBOUND, Listed, MAPPED_BITS, OUTBOUND,
        PortPrefix, port_prefixes,
    },
    maps::{EXCLUSION_CIDRS, EXCLUSION_IDS, EXCLUSION_PORTS},
};
use aya::{
    Pod,
    maps::{HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key},
};
use tracing::{info, warn};
use zerocopy::FromBytes;

use crate::{
    Kernel, KernelError,
    batch::TrieKey,
    maps::{find, find_mut, missing_is_fine},
};

/// The entries of one list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExclusionList {
    /// In the map `exclusion_ports`.
    pub ports: BTreeMap<PortPrefix, Listed>,
    /// In the map `exclusion_cidrs`.
    pub cidrs: BTreeMap<CidrPrefix, Listed>,
    /// In the map `exclusion_ids`: kinds and numbers.
    pub ids: BTreeSet<(u32, u32)>,
}

impl ExclusionList {
    /// Excludes a range of ports.
    #[must_use]
    pub fn with_ports(mut self, direction: u16, ports: RangeInclusive<u16>) -> Self {
        self.list_ports(direction, ports, Listed::EXCLUDED);
        self
    }

    /// Excludes a range of addresses, as of [`Self::list_cidr`].
    #[must_use]
    pub fn with_cidr(mut self, first: Address, length: u32) -> Self {
        self.list_cidr(first, length, Listed::EXCLUDED);
        self
    }

    /// Adds a range of ports. It must not overlap another one that says otherwise, unless that has all
    /// ports: the narrowest prefix that has a port counts.
    pub fn list_ports(&mut self, direction: u16, ports: RangeInclusive<u16>, listed: Listed) {
        self.ports.extend(port_prefixes(direction, ports).map(|prefix| (prefix, listed)));
    }

    /// Adds a range of addresses. `length` counts in the mapped form: 96 more for an IPv4 range,
    /// 128 at most. A range that is longer than the whole mapped space is one of IPv6. The narrowest
    /// range that has an address counts.
    pub fn list_cidr(&mut self, first: Address, length: u32, listed: Listed) {
        let is_v4 = length >= MAPPED_BITS && is_v4(&first);
        self.cidrs.insert(CidrPrefix { is_v4, first, length }, listed);
    }

    /// How many entries it takes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ports.len() + self.cidrs.len() + self.ids.len()
    }

    /// Whether it excludes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its entries that `other` does not have, or that say something else there.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self {
            ports: differing(&self.ports, &other.ports),
            cidrs: differing(&self.cidrs, &other.cidrs),
            ids: &self.ids - &other.ids,
        }
    }

    /// Its entries for ports and ranges that `other` says nothing of.
    #[must_use]
    pub fn beyond(&self, other: &Self) -> Self {
        Self {
            ports: missing(&self.ports, &other.ports),
            cidrs: missing(&self.cidrs, &other.cidrs),
            ids: &self.ids - &other.ids,
        }
    }
}

impl Kernel {
    /// Adds entries to the list `exclusion_id`: all of them, or none if one cannot be added.
    ///
    /// # Errors
    /// A map is full, or cannot be written.
    pub fn add_exclusions(&mut self, exclusion_id: u32, list: &ExclusionList) -> Result<(), KernelError> {
        let mut added = ExclusionList::default();
        let result = self.try_add(exclusion_id, list, &mut added);
        if result.is_err()
            && let Err(error) = self.remove_exclusions(exclusion_id, &added)
        {
            warn!(exclusion_id, entries = added.len(), %error, "cannot remove the half of a list that was written");
        }
        result
    }

    fn try_add(
        &mut self,
        exclusion_id: u32,
        list: &ExclusionList,
        added: &mut ExclusionList,
    ) -> Result<(), KernelError> {
        let mut ports = trie_mut::<ExcludedPorts>(self, EXCLUSION_PORTS.name)?;
        for (prefix, listed) in &list.ports {
            let (bits, key) = prefix.key(exclusion_id);
            ports
                .insert(&Key::new(bits, key), listed.value(), 0)
                .map_err(KernelError::map("write", EXCLUSION_PORTS.name))?;
            added.ports.insert(*prefix, *listed);
        }
        let mut cidrs = trie_mut::<ExcludedCidr>(self, EXCLUSION_CIDRS.name)?;
        for (prefix, listed) in &list.cidrs {
            let (bits, key) = prefix.key(exclusion_id);
            cidrs
                .insert(&Key::new(bits, key), listed.value(), 0)
                .map_err(KernelError::map("write", EXCLUSION_CIDRS.name))?;
            added.cidrs.insert(*prefix, *listed);
        }
        for (kind, id) in &list.ids {
            self.insert(EXCLUSION_IDS.name, ExcludedId { exclusion_id, kind: *kind, id: *id }, &1u8)?;
            added.ids.insert((*kind, *id));
        }
        Ok(())
    }

    /// Removes entries from the list `exclusion_id`; missing ones are fine.
    ///
    /// # Errors
    /// A map cannot be written.
    pub fn remove_exclusions(&mut self, exclusion_id: u32, list: &ExclusionList) -> Result<(), KernelError> {
        let mut ports = trie_mut::<ExcludedPorts>(self, EXCLUSION_PORTS.name)?;
        for prefix in list.ports.keys() {
            let (bits, key) = prefix.key(exclusion_id);
            missing_is_fine(ports.remove(&Key::new(bits, key)))
                .map_err(KernelError::map("write", EXCLUSION_PORTS.name))?;
        }
        let mut cidrs = trie_mut::<ExcludedCidr>(self, EXCLUSION_CIDRS.name)?;
        for prefix in list.cidrs.keys() {
            let (bits, key) = prefix.key(exclusion_id);
            missing_is_fine(cidrs.remove(&Key::new(bits, key)))
                .map_err(KernelError::map("write", EXCLUSION_CIDRS.name))?;
        }
        for (kind, id) in &list.ids {
            let key = ExcludedId { exclusion_id, kind: *kind, id: *id };
            self.take::<ExcludedId, u8>(EXCLUSION_IDS.name, &key)?;
        }
        Ok(())
    }

    /// All lists, by id.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn exclusions(&self) -> Result<BTreeMap<u32, ExclusionList>, KernelError> {
        let mut lists = BTreeMap::<u32, ExclusionList>::new();
        for (bits, data, listed) in entries::<ExcludedPorts>(self, EXCLUSION_PORTS.name)? {
            let list = lists.entry(data.exclusion_id()).or_default();
            list.ports.insert(PortPrefix::of_key(bits, &data), listed);
        }
        for (bits, data, listed) in entries::<ExcludedCidr>(self, EXCLUSION_CIDRS.name)? {
            let list = lists.entry(data.exclusion_id()).or_default();
            list.cidrs.insert(CidrPrefix::of_key(bits, &data), listed);
        }
        for (key, _) in self.list::<ExcludedId, u8>(EXCLUSION_IDS.name)? {
            lists.entry(key.exclusion_id).or_default().ids.insert((key.kind, key.id));
        }
        Ok(lists)
    }

    /// Whether a list leaves this user, group or interface alone.
    pub(crate) fn has_excluded_id(&self, key: ExcludedId) -> Result<bool, KernelError> {
        Ok(self.get::<ExcludedId, u8>(EXCLUSION_IDS.name, &key)?.is_some())
    }

    /// What a list says of `port`, as the map has it; 0: nothing.
    pub(crate) fn port_listed(
        &self,
        exclusion_id: u32,
        port: u16,
        direction: u16,
    ) -> Result<u8, KernelError> {
        let key = ExcludedPorts::new(exclusion_id, direction, port);
        value(self, EXCLUSION_PORTS.name, Key::new(ExcludedPorts::BITS, key))
    }

    /// What a list says of `address`, as the map has it; 0: nothing.
    pub(crate) fn address_listed(&self, exclusion_id: u32, address: &Address) -> Result<u8, KernelError> {
        let key = ExcludedCidr::new(exclusion_id, address);
        value(self, EXCLUSION_CIDRS.name, Key::new(ExcludedCidr::BITS, key))
    }
}

fn differing<K: Ord + Copy>(
    these: &BTreeMap<K, Listed>,
    others: &BTreeMap<K, Listed>,
) -> BTreeMap<K, Listed> {
    let differs = |(key, listed): &(&K, &Listed)| others.get(key) != Some(listed);
    these.iter().filter(differs).map(|(key, listed)| (*key, *listed)).collect()
}

fn missing<K: Ord + Copy>(these: &BTreeMap<K, Listed>, others: &BTreeMap<K, Listed>) -> BTreeMap<K, Listed> {
    these.iter().filter(|(key, _)| !others.contains_key(key)).map(|(key, listed)| (*key, *listed)).collect()
}

/// The entries of a trie: how many bits of the key count, the key, the value.
fn entries<K: Pod + FromBytes>(
    kernel: &Kernel,
    name: &'static str,
) -> Result<Vec<(u32, K, Listed)>, KernelError> {
    if let Some(entries) = kernel.list_at_once::<TrieKey<K>, u8>(name)? {
        let parts = |(key, value): (TrieKey<K>, u8)| (key.prefix_len, key.data, Listed::of_value(value));
        return Ok(entries.into_iter().map(parts).collect());
    }
    let failed = |error| KernelError::map("read", name)(error);
    let entry = |entry: Result<(Key<K>, u8), MapError>| {
        let (key, value) = entry.map_err(failed)?;
        let (bits, data) = parts(key);
        Ok((bits, data, Listed::of_value(value)))
    };
    trie::<K>(kernel, name)?.iter().map(entry).collect()
}

fn trie<'a, K: Pod>(
    kernel: &'a Kernel,
    name: &'static str,
) -> Result<LpmTrie<&'a MapData, K, u8>, KernelError> {
    LpmTrie::try_from(find(&kernel.object, name)).map_err(KernelError::map("read", name))
}

fn trie_mut<'a, K: Pod>(
    kernel: &'a mut Kernel,
    name: &'static str,
) -> Result<LpmTrie<&'a mut MapData, K, u8>, KernelError> {
    LpmTrie::try_from(find_mut(&mut kernel.object, name)).map_err(KernelError::map("write", name))
}

/// The value of the longest entry that matches `key`; 0: there is none.
fn value<K: Pod>(kernel: &Kernel, name: &'static str, key: Key<K>) -> Result<u8, KernelError> {
    match trie::<K>(kernel, name)?.get(&key, 0) {
        Ok(value) => Ok(value),
        Err(MapError::KeyNotFound) => Ok(0),
        Err(error) => Err(KernelError::map("read", name)(error)),
    }
}

fn parts<K: Pod>(key: Key<K>) -> (u32, K) {
    (key.prefix_len(), key.data())
}

/// The maps in which earlier builds kept the lists: one entry for each port, and the ranges of both
/// families in one trie.
const EARLIER: [&str; 2] = ["excluded_ports", "excluded_cidrs"];

/// Copies the lists that an earlier build left below `folder`. To be called before links get new
/// programs: those know the new maps only. What cannot be copied is carried by the mesh until its
/// pod's source is read.
pub(crate) fn take_over(kernel: &mut Kernel, folder: &Path) {
    let [ports, cidrs] = EARLIER.map(|name| folder.join(name));
    let mut lists = BTreeMap::<u32, ExclusionList>::new();
    if ports.exists()
        && let Err(error) = read_earlier_ports(&ports, &mut lists)
    {
        warn!(path = %ports.display(), %error, "cannot read the excluded ports of an earlier build");
    }
    if cidrs.exists()
        && let Err(error) = read_earlier_cidrs(&cidrs, &mut lists)
    {
        warn!(path = %cidrs.display(), %error, "cannot read the excluded ranges of an earlier build");
    }
    for (id, list) in lists {
        match kernel.add_exclusions(id, &list) {
            Ok(()) => info!(exclusion_id = id, entries = list.len(), "took over an exclusion list"),
            Err(error) => {
                warn!(exclusion_id = id, entries = list.len(), %error, "cannot take over an exclusion list");
            }
        }
    }
}

fn read_earlier_ports(path: &Path, lists: &mut BTreeMap<u32, ExclusionList>) -> Result<(), MapError> {
    let map = HashMap::<_, [u8; 8], u8>::try_from(Map::from_map_data(MapData::from_pin(path)?)?)?;
    let mut found = BTreeSet::<(u32, u16, u16)>::new();
    for key in map.keys() {
        // An id, a port and a direction, in the order of this machine.
        let key = key?;
        let [id @ .., _, _, _, _] = key;
        let [_, _, _, _, port @ .., _, _] = key;
        let [_, _, _, _, _, _, direction @ ..] = key;
        let direction = if u16::from_ne_bytes(direction) == 0 { OUTBOUND } else { INBOUND };
        found.insert((u32::from_ne_bytes(id), direction, u16::from_ne_bytes(port)));
    }
    // Neighbours become ranges: single entries would not fit where ranges do.
    let mut run: Option<(u32, u16, u16, u16)> = None;
    let mut add = |(id, direction, first, last): (u32, u16, u16, u16)| {
        lists.entry(id).or_default().list_ports(direction, first..=last, Listed::EXCLUDED);
    };
    for (id, direction, port) in found {
        run = match run {
            Some((of, to, first, last))
                if (of, to) == (id, direction) && last.checked_add(1) == Some(port) =>
            {
                Some((id, direction, first, port))
            }
            other => {
                other.into_iter().for_each(&mut add);
                Some((id, direction, port, port))
            }
        };
    }
    run.into_iter().for_each(add);
    Ok(())
}

fn read_earlier_cidrs(path: &Path, lists: &mut BTreeMap<u32, ExclusionList>) -> Result<(), MapError> {
    let map = LpmTrie::<_, [u8; 20], u8>::try_from(Map::from_map_data(MapData::from_pin(path)?)?)?;
    for key in map.keys() {
        let (bits, [a, b, c, d, address @ ..]) = parts(key?);
        let list = lists.entry(u32::from_be_bytes([a, b, c, d])).or_default();
        list.list_cidr(address, bits.saturating_sub(32), Listed::EXCLUDED);
    }
    Ok(())
}
