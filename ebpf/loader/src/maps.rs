//! The maps: adopted by their pins, and typed access for their one writer.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use adit_ebpf_common::{
    address::Address,
    pods::{CgroupInfo, ExcludedCidr, ExcludedPort, ListenerKey, PodRecord},
    settings::Settings,
};
use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, MapInfo, lpm_trie::Key},
};
use tracing::warn;

use crate::{
    Kernel, KernelError,
    object::{MAPS, MapLayout},
};

/// The folder of maps in `pins`.
pub fn folder(pins: &Path) -> PathBuf {
    pins.join("maps")
}

/// Unpins maps that a build with other layouts left. Programs that still run keep theirs until their
/// links are given new programs; the watcher fills the new ones from what it observes.
pub fn unpin_incompatible(folder: &Path) -> Result<(), KernelError> {
    for MapLayout { name, key_size, value_size } in MAPS {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        let info = MapInfo::from_pin(&path).map_err(KernelError::map("open pinned", name))?;
        if info.key_size() as usize != key_size || info.value_size() as usize != value_size {
            warn!(map = name, path = %path.display(), "replacing a map of another version");
            fs::remove_file(&path).map_err(KernelError::pin("unpin", path))?;
        }
    }
    Ok(())
}

/// Removes every map in `folder`; how many there were.
pub fn remove_all(folder: &Path) -> Result<usize, KernelError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(KernelError::pin("list", folder)(error)),
    };
    let mut count = 0;
    for entry in entries {
        let path = entry.map_err(KernelError::pin("list", folder))?.path();
        fs::remove_file(&path).map_err(KernelError::pin("unpin", path))?;
        count += 1;
    }
    Ok(count)
}

const CGROUPS: &str = "cgroup_info_map";
const PODS: &str = "pod_by_addr";
const SETTINGS: &str = "settings";
const PORTS: &str = "excluded_ports";
const CIDRS: &str = "excluded_cidrs";
const LISTENED: &str = "listened";
const DELIVERIES: &str = "deliveries";

/// The maps that the watcher writes.
impl Kernel {
    pub fn settings(&self) -> Result<Settings, KernelError> {
        let failed = |error| KernelError::map("read", SETTINGS)(error);
        let map = Array::<_, Settings>::try_from(find(&self.object, SETTINGS)).map_err(failed)?;
        map.get(&0, 0).map_err(failed)
    }

    pub fn set_settings(&mut self, settings: &Settings) -> Result<(), KernelError> {
        let failed = |error| KernelError::map("write", SETTINGS)(error);
        let mut map = Array::<_, Settings>::try_from(find_mut(&mut self.object, SETTINGS)).map_err(failed)?;
        map.set(0, settings, 0).map_err(failed)
    }

    pub fn set_cgroup(&mut self, cgroup_id: u64, info: &CgroupInfo) -> Result<(), KernelError> {
        self.insert(CGROUPS, cgroup_id, info)
    }

    /// A missing entry is fine.
    pub fn remove_cgroup(&mut self, cgroup_id: u64) -> Result<(), KernelError> {
        self.take::<u64, CgroupInfo>(CGROUPS, &cgroup_id)
    }

    pub fn cgroups(&self) -> Result<Vec<(u64, CgroupInfo)>, KernelError> {
        self.list(CGROUPS)
    }

    pub fn set_pod(&mut self, address: Address, record: &PodRecord) -> Result<(), KernelError> {
        self.insert(PODS, address, record)
    }

    /// A missing entry is fine.
    pub fn remove_pod(&mut self, address: Address) -> Result<(), KernelError> {
        self.take::<Address, PodRecord>(PODS, &address)
    }

    pub fn pods(&self) -> Result<Vec<(Address, PodRecord)>, KernelError> {
        self.list(PODS)
    }

    /// How many connections of tunnels in that netns need it prepared: those that speak from an address that is not its
    /// pod's, and those to the pod, for which they are going to speak so.
    pub fn deliveries(&self, netns_cookie: u64) -> Result<u64, KernelError> {
        let failed = |error| KernelError::map("read", DELIVERIES)(error);
        let map = HashMap::<_, u64, u64>::try_from(find(&self.object, DELIVERIES)).map_err(failed)?;
        match map.get(&netns_cookie, 0) {
            Ok(count) => Ok(count),
            Err(MapError::KeyNotFound) => Ok(0),
            Err(error) => Err(failed(error)),
        }
    }

    /// For a netns that no tunnel serves any more.
    pub fn forget_deliveries(&mut self, netns_cookie: u64) -> Result<(), KernelError> {
        self.take::<u64, u64>(DELIVERIES, &netns_cookie)
    }

    pub fn exclude_port(&mut self, key: &ExcludedPort) -> Result<(), KernelError> {
        self.insert(PORTS, *key, &1u8)
    }

    /// `prefix_len` counts in the mapped form: 96 more for an IPv4 range, 128 at most.
    pub fn exclude_cidr(
        &mut self,
        policy_id: u32,
        prefix_len: u32,
        address: Address,
    ) -> Result<(), KernelError> {
        let failed = |error| KernelError::map("write", CIDRS)(error);
        let data = ExcludedCidr { policy_id_be: policy_id.to_be_bytes(), address };
        let mut map =
            LpmTrie::<_, ExcludedCidr, u8>::try_from(find_mut(&mut self.object, CIDRS)).map_err(failed)?;
        map.insert(&Key::new(32 + prefix_len, data), 1, 0).map_err(failed)
    }

    /// Removes all exclusions of `policy_id`.
    pub fn clear_policy(&mut self, policy_id: u32) -> Result<(), KernelError> {
        let ports: Vec<(ExcludedPort, u8)> = self.list(PORTS)?;
        for (key, _) in ports.iter().filter(|(key, _)| key.policy_id == policy_id) {
            self.take::<ExcludedPort, u8>(PORTS, key)?;
        }
        let failed = |error| KernelError::map("write", CIDRS)(error);
        let mut map =
            LpmTrie::<_, ExcludedCidr, u8>::try_from(find_mut(&mut self.object, CIDRS)).map_err(failed)?;
        let keys = map.keys().collect::<Result<Vec<_>, _>>().map_err(failed)?;
        for key in keys.iter().filter(|key| key.data().policy_id_be == policy_id.to_be_bytes()) {
            missing_is_fine(map.remove(key)).map_err(failed)?;
        }
        Ok(())
    }

    /// Notes that somebody listens at `key`, or something [about](ListenerKey::about) its netns.
    pub fn set_listened(&mut self, key: &ListenerKey, value: u32) -> Result<(), KernelError> {
        self.insert(LISTENED, *key, &value)
    }

    /// A missing entry is fine.
    pub fn remove_listened(&mut self, key: &ListenerKey) -> Result<(), KernelError> {
        self.take::<ListenerKey, u32>(LISTENED, key)
    }

    /// Forgets who listens in these netns. One pass over the map, however many they are.
    pub(crate) fn forget_listened(&mut self, netns_cookies: &BTreeSet<u64>) -> Result<(), KernelError> {
        // First of all, that programs note no more.
        for cookie in netns_cookies {
            self.remove_listened(&ListenerKey::about(*cookie, ListenerKey::COUNT))?;
        }
        for key in self.listened()?.iter().filter(|key| netns_cookies.contains(&key.netns_cookie)) {
            self.remove_listened(key)?;
        }
        Ok(())
    }

    pub fn listened(&self) -> Result<Vec<ListenerKey>, KernelError> {
        self.list::<ListenerKey, u32>(LISTENED).map(|all| all.into_iter().map(|(key, _)| key).collect())
    }

    pub(crate) fn insert<K: Pod, V: Pod>(
        &mut self,
        name: &'static str,
        key: K,
        value: &V,
    ) -> Result<(), KernelError> {
        let failed = |error| KernelError::map("write", name)(error);
        let mut map = HashMap::<_, K, V>::try_from(find_mut(&mut self.object, name)).map_err(failed)?;
        map.insert(key, value, 0).map_err(failed)
    }

    pub(crate) fn take<K: Pod, V: Pod>(&mut self, name: &'static str, key: &K) -> Result<(), KernelError> {
        let failed = |error| KernelError::map("write", name)(error);
        let mut map = HashMap::<_, K, V>::try_from(find_mut(&mut self.object, name)).map_err(failed)?;
        missing_is_fine(map.remove(key)).map_err(failed)
    }

    fn list<K: Pod, V: Pod>(&self, name: &'static str) -> Result<Vec<(K, V)>, KernelError> {
        let failed = |error| KernelError::map("read", name)(error);
        let map = HashMap::<_, K, V>::try_from(find(&self.object, name)).map_err(failed)?;
        map.iter().collect::<Result<_, _>>().map_err(failed)
    }
}

/// A second handle on the ring buffer pinned in `folder`.
pub fn trace(folder: &Path) -> Result<Map, KernelError> {
    let failed = |error| KernelError::map("open", "trace")(error);
    MapData::from_pin(folder.join("trace")).and_then(Map::from_map_data).map_err(failed)
}

fn find<'a>(object: &'a Ebpf, name: &'static str) -> &'a Map {
    object
        .map(name)
        .unwrap_or_else(|| unreachable!("map {name} is part of the object that this crate was built with"))
}

fn find_mut<'a>(object: &'a mut Ebpf, name: &'static str) -> &'a mut Map {
    object
        .map_mut(name)
        .unwrap_or_else(|| unreachable!("map {name} is part of the object that this crate was built with"))
}

fn missing_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
