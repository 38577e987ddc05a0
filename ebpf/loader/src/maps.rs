//! The maps: adopted by their pins, and typed access for their one writer.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use adit_ebpf_common::{
    address::{Address, mapped},
    enrolment::{CgroupInfo, NetnsInfo, PodRecord, flag},
    flows::{Flow, TunnelFlow},
    maps::{
        self, CGROUP_INFO, KUBELET_FLOWS, MapSpec, PINNED_CONNECTIONS, POD_BY_ADDR, POD_BY_NETNS, SETTINGS,
        TRACE,
    },
    sealed::{Sealed, Sum},
    settings::Settings,
};
use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};

use zerocopy::FromBytes;

use crate::{Kernel, KernelError, batch};

/// The folder of maps in `pins`.
pub(crate) fn folder(pins: &Path) -> PathBuf {
    pins.join("maps")
}

/// The maps that are pinned.
pub(crate) fn pinned() -> impl Iterator<Item = &'static MapSpec> {
    maps::ALL.iter().filter(|map| map.keeps.is_pinned())
}

/// The name of the pin of `map`. The first ABI number is not in the name.
#[must_use]
pub fn pin_name(map: &MapSpec) -> String {
    match map.abi {
        1 => map.name.to_owned(),
        abi => format!("{}-{abi}", map.name),
    }
}

/// Where `map` is pinned in the folder of maps.
pub(crate) fn pin(folder: &Path, map: &MapSpec) -> PathBuf {
    folder.join(pin_name(map))
}

/// Removes every map in `folder`; how many there were.
///
/// # Errors
/// A pin cannot be listed or removed.
pub(crate) fn remove_all(folder: &Path) -> Result<usize, KernelError> {
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

/// The maps that the watcher reads and writes. All return [`KernelError::Map`] if the kernel
/// refuses.
impl Kernel {
    /// What applies to the whole node.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn settings(&self) -> Result<Settings, KernelError> {
        let failed = |error| KernelError::map("read", SETTINGS.name)(error);
        let map = Array::<_, Settings>::try_from(find(&self.object, SETTINGS.name)).map_err(failed)?;
        map.get(&0, 0).map_err(failed)
    }

    /// Switches the settings of the whole node, at once.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_settings(&mut self, settings: &Settings) -> Result<(), KernelError> {
        let failed = |error| KernelError::map("write", SETTINGS.name)(error);
        let mut map =
            Array::<_, Settings>::try_from(find_mut(&mut self.object, SETTINGS.name)).map_err(failed)?;
        map.set(0, settings, 0).map_err(failed)
    }

    /// Writes what a cgroup stands for.
    ///
    /// # Errors
    /// The map cannot be written, or is full.
    pub fn set_cgroup(&mut self, cgroup_id: u64, info: &CgroupInfo) -> Result<(), KernelError> {
        self.insert(CGROUP_INFO.name, cgroup_id, &Sealed::new(&cgroup_id, *info))
    }

    /// Removes a cgroup's entry, if there is one.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn remove_cgroup(&mut self, cgroup_id: u64) -> Result<(), KernelError> {
        self.take::<u64, Sealed<CgroupInfo>>(CGROUP_INFO.name, &cgroup_id)
    }

    /// The entry of a cgroup; `None`: it has none. One whose seal is broken has [`flag::BROKEN`].
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn cgroup(&self, cgroup_id: u64) -> Result<Option<CgroupInfo>, KernelError> {
        self.get_sealed(CGROUP_INFO.name, &cgroup_id, broken_cgroup())
    }

    /// All cgroups with their entries, in no order. One whose seal is broken has [`flag::BROKEN`].
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn cgroups(&self) -> Result<Vec<(u64, CgroupInfo)>, KernelError> {
        self.list(CGROUP_INFO.name).map(|all| opened(all, broken_cgroup()))
    }

    /// Writes which pod has an address.
    ///
    /// # Errors
    /// The map cannot be written, or is full.
    pub fn set_pod(&mut self, address: Address, record: &PodRecord) -> Result<(), KernelError> {
        self.insert(POD_BY_ADDR.name, address, &Sealed::new(&address, *record))
    }

    /// Removes an address, if it is there.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn remove_pod(&mut self, address: Address) -> Result<(), KernelError> {
        self.take::<Address, Sealed<PodRecord>>(POD_BY_ADDR.name, &address)
    }

    /// All addresses of pods with their records, in no order. One whose seal is broken has
    /// [`flag::BROKEN`].
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn pods(&self) -> Result<Vec<(Address, PodRecord)>, KernelError> {
        let broken = PodRecord { flags: flag::BROKEN, ..PodRecord::NOBODY };
        self.list(POD_BY_ADDR.name).map(|all| opened(all, broken))
    }

    /// Writes whose a netns is, and what happens to what arrives there. To be called before
    /// [`Self::steer`], which closes a netns that nothing is known of.
    ///
    /// # Errors
    /// The map cannot be written, or is full.
    pub fn set_netns(&mut self, netns_cookie: u64, info: &NetnsInfo) -> Result<(), KernelError> {
        self.insert(POD_BY_NETNS.name, netns_cookie, &Sealed::new(&netns_cookie, *info))
    }

    /// Removes what is known of a netns, if anything is. To be called after [`Self::unsteer`].
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn remove_netns(&mut self, netns_cookie: u64) -> Result<(), KernelError> {
        self.take::<u64, Sealed<NetnsInfo>>(POD_BY_NETNS.name, &netns_cookie)
    }

    /// What is known of all netns, in no order. What has a broken seal has [`flag::BROKEN`].
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn netns(&self) -> Result<Vec<(u64, NetnsInfo)>, KernelError> {
        let broken = NetnsInfo { flags: flag::BROKEN, ..NetnsInfo::CLOSED };
        self.list(POD_BY_NETNS.name).map(|all| opened(all, broken))
    }

    /// How many connections of tunnels in that netns need it prepared: those that use an address
    /// which is not its pod's, and those to the pod, for which the tunnel is going to use one.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn pinned_connections(&self, netns_cookie: u64) -> Result<u64, KernelError> {
        Ok(self.get::<u64, u64>(PINNED_CONNECTIONS.name, &netns_cookie)?.unwrap_or(0))
    }

    /// The cookies of all netns that such connections were ever counted for, until
    /// [`Self::forget_pinned_connections`].
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn netns_with_pinned_connections(&self) -> Result<BTreeSet<u64>, KernelError> {
        let all = self.list::<u64, u64>(PINNED_CONNECTIONS.name)?;
        Ok(all.into_iter().map(|(cookie, _)| cookie).collect())
    }

    /// Removes the count of a netns that no tunnel serves any more.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn forget_pinned_connections(&mut self, netns_cookie: u64) -> Result<(), KernelError> {
        self.take::<u64, u64>(PINNED_CONNECTIONS.name, &netns_cookie)
    }

    /// Whether the kubelet opened the connection between these ends, its own first, as far as that is
    /// recorded: of the latest thousands.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn is_of_kubelet(&self, kubelet: SocketAddr, pod: SocketAddr) -> Result<bool, KernelError> {
        let flow = Flow {
            local: address(kubelet),
            remote: address(pod),
            local_port: kubelet.port(),
            remote_port: pod.port(),
        };
        Ok(self.get::<Flow, Sealed<TunnelFlow>>(KUBELET_FLOWS.name, &flow)?.is_some())
    }

    /// The value of `key` in a hash map of sealed values, as the programs take it: one with a broken
    /// seal is `closed`. `None`: there is none.
    pub(crate) fn get_sealed<K, V>(
        &self,
        name: &'static str,
        key: &K,
        closed: V,
    ) -> Result<Option<V>, KernelError>
    where
        K: Pod + Sum,
        V: Copy + Sum,
        Sealed<V>: Pod,
    {
        let found = self.get::<K, Sealed<V>>(name, key)?;
        Ok(found.map(|sealed| sealed.open(key).copied().unwrap_or(closed)))
    }

    /// The value of `key` in a hash map; `None`: it has none.
    pub(crate) fn get<K: Pod, V: Pod>(&self, name: &'static str, key: &K) -> Result<Option<V>, KernelError> {
        let failed = |error| KernelError::map("read", name)(error);
        let map = HashMap::<_, K, V>::try_from(find(&self.object, name)).map_err(failed)?;
        match map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(failed(error)),
        }
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

    /// The same in batches; `None`: this map, or this kernel, has none.
    pub(crate) fn list_at_once<K: FromBytes, V: FromBytes>(
        &self,
        name: &'static str,
    ) -> Result<Option<Vec<(K, V)>>, KernelError> {
        let Some(data) = batch::data(find(&self.object, name)) else { return Ok(None) };
        batch::entries(data.fd().as_fd())
            .map_err(|source| KernelError::pin("read the map", Path::new(name))(source))
    }

    pub(crate) fn list<K: Pod + FromBytes, V: Pod + FromBytes>(
        &self,
        name: &'static str,
    ) -> Result<Vec<(K, V)>, KernelError> {
        let failed = |error| KernelError::map("read", name)(error);
        if let Some(entries) = self.list_at_once(name)? {
            return Ok(entries);
        }
        let map = HashMap::<_, K, V>::try_from(find(&self.object, name)).map_err(failed)?;
        map.iter().collect::<Result<_, _>>().map_err(failed)
    }
}

/// The address of `end`, in the form of the maps.
fn address(end: SocketAddr) -> Address {
    match end.ip().to_canonical() {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// What an entry of a cgroup is shown as whose seal is broken.
pub(crate) const fn broken_cgroup() -> CgroupInfo {
    CgroupInfo { flags: flag::BROKEN, ..CgroupInfo::CLOSED }
}

/// The values without their seals; `broken` stands for those whose seal is broken.
pub(crate) fn opened<K: Sum, V: Sum + Copy>(all: Vec<(K, Sealed<V>)>, broken: V) -> Vec<(K, V)> {
    let open = |(key, sealed): (K, Sealed<V>)| {
        let value = sealed.open(&key).copied().unwrap_or(broken);
        (key, value)
    };
    all.into_iter().map(open).collect()
}

/// A second handle on the ring buffer pinned in `folder`.
pub(crate) fn trace(folder: &Path) -> Result<Map, KernelError> {
    let failed = |error| KernelError::map("open", TRACE.name)(error);
    MapData::from_pin(pin(folder, &TRACE)).and_then(Map::from_map_data).map_err(failed)
}

pub(crate) fn find<'a>(object: &'a Ebpf, name: &'static str) -> &'a Map {
    object
        .map(name)
        .unwrap_or_else(|| unreachable!("map {name} is part of the object that this crate was built with"))
}

pub(crate) fn find_mut<'a>(object: &'a mut Ebpf, name: &'static str) -> &'a mut Map {
    object
        .map_mut(name)
        .unwrap_or_else(|| unreachable!("map {name} is part of the object that this crate was built with"))
}

pub(crate) fn missing_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
