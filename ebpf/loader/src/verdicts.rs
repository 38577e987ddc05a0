//! How often each rule decided, counted by the kernel programs.

use std::{
    fmt,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use adit_ebpf_common::{
    maps::VERDICTS,
    verdicts::{ELSEWHERE, GONE, Verdicts},
};
use aya::{
    maps::{Map, MapData, MapError, PerCpuHashMap, PerCpuValues},
    util::nr_cpus,
};

use crate::{
    KernelError,
    maps::{missing_is_fine, pin},
};

/// `BPF_ANY`
const ALWAYS: u64 = 0;
/// `BPF_NOEXIST`
const IF_MISSING: u64 = 1;

/// The counts of every pod, for whoever shows them: any number of threads may.
pub struct VerdictCounts(Mutex<Counts>);

impl fmt::Debug for VerdictCounts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("VerdictCounts").finish_non_exhaustive()
    }
}

struct Counts {
    map: PerCpuHashMap<MapData, u64, Verdicts>,
}

impl VerdictCounts {
    /// A second handle on the map that is pinned in `folder`.
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let failed = |error| KernelError::map("open", VERDICTS.name)(error);
        let data = MapData::from_pin(pin(folder, &VERDICTS)).map_err(failed)?;
        let map = Map::from_map_data(data).and_then(PerCpuHashMap::try_from).map_err(failed)?;
        let counts = Self(Mutex::new(Counts { map }));
        counts.begin(ELSEWHERE)?;
        counts.begin(GONE)?;
        Ok(counts)
    }

    /// Counts apart what is decided in that netns, from now on. Fine if it is already.
    ///
    /// # Errors
    /// There is no room: it is counted with all others.
    pub fn begin(&self, netns_cookie: u64) -> Result<(), KernelError> {
        match self.counts().write(netns_cookie, Verdicts::NONE, IF_MISSING) {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => {
                Ok(())
            }
            result => result.map_err(KernelError::map("write", VERDICTS.name)),
        }
    }

    /// Counts no more apart what is decided in that netns. The counts stay in [`Self::total`].
    ///
    /// # Errors
    /// The map cannot be read or written.
    pub fn end(&self, netns_cookie: u64) -> Result<(), KernelError> {
        let mut counts = self.counts();
        let Some(last) = counts.of(netns_cookie)? else { return Ok(()) };
        let failed = KernelError::map("write", VERDICTS.name);
        missing_is_fine(counts.map.remove(&netns_cookie)).map_err(failed)?;
        // In the map, so that what is shown of the whole node does not shrink when a watcher ends.
        let mut gone = counts.of(GONE)?.unwrap_or(Verdicts::NONE);
        gone.add(&last);
        counts.write(GONE, gone, ALWAYS).map_err(KernelError::map("write", VERDICTS.name))
    }

    /// What was decided in that netns; `None`: it is not counted apart.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn of(&self, netns_cookie: u64) -> Result<Option<Verdicts>, KernelError> {
        self.counts().of(netns_cookie)
    }

    /// The netns whose verdicts are counted apart, in no order.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn netns(&self) -> Result<Vec<u64>, KernelError> {
        let mut netns = self.counts().keys()?;
        netns.retain(|cookie| ![ELSEWHERE, GONE].contains(cookie));
        Ok(netns)
    }

    /// What was decided on this node, of pods that are gone too.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn total(&self) -> Result<Verdicts, KernelError> {
        let counts = self.counts();
        let mut total = Verdicts::NONE;
        for cookie in counts.keys()? {
            if let Some(more) = counts.of(cookie)? {
                total.add(&more);
            }
        }
        Ok(total)
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Counts are whole after every step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    /// Writes what a netns has counted, as if one processor had.
    fn write(&mut self, netns_cookie: u64, counts: Verdicts, flags: u64) -> Result<(), MapError> {
        let cpus = nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        let mut by_cpu = vec![Verdicts::NONE; cpus.max(1)];
        by_cpu[0] = counts;
        self.map.insert(netns_cookie, PerCpuValues::try_from(by_cpu)?, flags)
    }

    fn of(&self, netns_cookie: u64) -> Result<Option<Verdicts>, KernelError> {
        match self.map.get(&netns_cookie, 0) {
            Ok(by_cpu) => {
                let mut sum = Verdicts::NONE;
                by_cpu.iter().for_each(|counts| sum.add(counts));
                Ok(Some(sum))
            }
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(KernelError::map("read", VERDICTS.name)(error)),
        }
    }

    fn keys(&self) -> Result<Vec<u64>, KernelError> {
        self.map.keys().collect::<Result<_, _>>().map_err(KernelError::map("read", VERDICTS.name))
    }
}
