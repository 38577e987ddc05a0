//! Events of cgroups and processes below the pods' cgroup, as the kernel reports them.

use std::{
    ffi::{OsStr, OsString},
    fmt, fs,
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use adit_ebpf_common::{
    enrolment::CgroupInfo,
    lifecycle::{Kind, Name, PREFIX_BYTES, PathEvent, ProcessEvent, Scope},
    maps,
    sealed::Sealed,
};
use aya::{
    Ebpf,
    maps::{Array, CgroupArray, Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{Program, ProgramError, ProgramFd, RawTracePoint},
};
use tracing::warn;
use zerocopy::FromBytes as _;

use crate::{
    Kernel, KernelError,
    btf::CgroupOffsets,
    links,
    maps::{broken_cgroup, opened},
};

/// The programs, and the tracepoints that they are attached to.
const PROGRAMS: [(&str, &str); 5] = [
    ("adit_cgroup_made", "cgroup_mkdir"),
    ("adit_cgroup_removed", "cgroup_rmdir"),
    ("adit_cgroup_attach", "cgroup_attach_task"),
    ("adit_cgroup_populated", "cgroup_notify_populated"),
    ("adit_exec", "sched_process_exec"),
];
const RING: &str = maps::LIFECYCLE.name;
const SCOPE: &str = maps::LIFECYCLE_SCOPE.name;
const BASE: &str = maps::LIFECYCLE_BASE.name;
const LOST: &str = maps::LIFECYCLE_LOST.name;
const EXPECTED: &str = maps::EXPECTED_PODS.name;
/// An event of our own making is there at once, or will never be.
const PROOF_WITHIN: Duration = Duration::from_secs(1);

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LifecycleEvent {
    /// To a cgroup.
    Cgroup {
        /// Where it is, or was.
        path: PathBuf,
        /// What happened.
        kind: Kind,
        /// Its id, if the programs closed it as it was made, or as its last process went.
        closed: Option<u64>,
    },
    /// To a process in the cgroup of this id.
    Process {
        /// Of the cgroup.
        cgroup_id: u64,
        /// What happened.
        kind: Kind,
    },
}

/// The reader of events. The programs go on without it: they close what is expected.
pub struct Lifecycle {
    ring: RingBuf<MapData>,
    lost: PerCpuArray<MapData, u64>,
    base: PathBuf,
    /// The path of `base` in the kernel's events; inside a cgroup namespace it is longer than the
    /// mount shows.
    base_in_kernel: Vec<u8>,
}

impl Kernel {
    /// Attaches the lifecycle programs, for what is below the cgroup `base`, beside those of a
    /// predecessor: see [`Self::end_earlier_lifecycle`]. Waits for an event of our own: a kernel
    /// that accepts the programs and reports nothing is an error here, not a silence later. Their
    /// links are pinned, so they close what is expected while nobody reads what they report.
    ///
    /// # Errors
    /// `base` is not a cgroup, the kernel refuses a program, or reports nothing within a second;
    /// then none of our own is attached.
    pub fn lifecycle(&mut self, base: &Path) -> Result<Lifecycle, KernelError> {
        let result = self.try_lifecycle(base);
        if result.is_err() {
            let made = std::mem::take(&mut self.lifecycle_links);
            links::remove_lifecycle(&links::folder(&self.pins), |name| made.contains(name))?;
        }
        result
    }

    /// Ends the lifecycle programs that other processes attached. To be called when those of this
    /// one are attached, and the maps hold what they read.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn end_earlier_lifecycle(&self) -> Result<(), KernelError> {
        links::remove_lifecycle(&links::folder(&self.pins), |name| !self.lifecycle_links.contains(name))
    }

    /// Why the lifecycle programs cannot close a cgroup before it holds a process; `None`: they can,
    /// or there are none.
    #[must_use]
    pub fn closes_late(&self) -> Option<&str> {
        self.closes_late.as_deref()
    }

    fn try_lifecycle(&mut self, base: &Path) -> Result<Lifecycle, KernelError> {
        (self.offsets, self.closes_late) = match CgroupOffsets::of_kernel() {
            Ok(offsets) => (offsets, None),
            Err(error) => (CgroupOffsets::default(), Some(error.to_string())),
        };
        if let Some(why) = &self.closes_late {
            warn!(why, "new pods are closed a moment after their cgroups were made, not before");
        }
        // Before anything is attached nothing is of interest.
        self.set_scope(&[0xff; PREFIX_BYTES])?;
        let dir = File::open(base).map_err(|source| KernelError::Cgroup { path: base.to_owned(), source })?;
        let mut bases =
            CgroupArray::try_from(self.map_mut(BASE)?).map_err(KernelError::map("write", BASE))?;
        bases.set(0, dir, 0).map_err(KernelError::map("write", BASE))?;
        for (name, tracepoint) in PROGRAMS {
            let (program, id) = load(&mut self.object, name)?;
            let link = links::attach_lifecycle(program.as_fd(), id, &links::folder(&self.pins), tracepoint)?;
            self.lifecycle_links.insert(link);
        }
        let ring = RingBuf::try_from(self.take_map(RING)?).map_err(KernelError::map("open", RING))?;
        let lost = PerCpuArray::try_from(self.take_map(LOST)?).map_err(KernelError::map("open", LOST))?;
        let mut lifecycle = Lifecycle { ring, lost, base: base.to_owned(), base_in_kernel: Vec::new() };
        lifecycle.base_in_kernel = self.prove(&mut lifecycle)?;
        let mut prefix = lifecycle.base_in_kernel.clone();
        prefix.push(b'/');
        self.set_scope(&prefix)?;
        Ok(lifecycle)
    }

    /// Closes every cgroup of this name below the scope as it is made, with `info`.
    ///
    /// # Errors
    /// The map cannot be written, or is full.
    pub fn expect_pod(&mut self, name: &Name, info: &CgroupInfo) -> Result<(), KernelError> {
        self.insert(EXPECTED, *name, &Sealed::new(name, *info))
    }

    /// Expects no cgroup of this name any more. Fine if there is no entry.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn expect_pod_no_more(&mut self, name: &Name) -> Result<(), KernelError> {
        self.take::<Name, Sealed<CgroupInfo>>(EXPECTED, name)
    }

    /// The names that are expected, with their entries, in no order. One whose seal is broken has
    /// [`BROKEN`](adit_ebpf_common::enrolment::flag::BROKEN).
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn expected_pods(&self) -> Result<Vec<(Name, CgroupInfo)>, KernelError> {
        self.list(EXPECTED).map(|all| opened(all, broken_cgroup()))
    }

    fn map_mut(&mut self, name: &'static str) -> Result<&mut Map, KernelError> {
        self.object.map_mut(name).ok_or_else(|| missing(name))
    }

    fn take_map(&mut self, name: &'static str) -> Result<Map, KernelError> {
        self.object.take_map(name).ok_or_else(|| missing(name))
    }

    fn set_scope(&mut self, prefix: &[u8]) -> Result<(), KernelError> {
        let CgroupOffsets { kn: kn_offset, id: id_offset, name: name_offset } = self.offsets;
        let mut scope = Scope {
            prefix: [0; PREFIX_BYTES],
            prefix_len: u32::try_from(prefix.len()).unwrap_or(u32::MAX),
            kn_offset,
            id_offset,
            name_offset,
        };
        let length = prefix.len().min(PREFIX_BYTES);
        scope.prefix[..length].copy_from_slice(&prefix[..length]);
        let mut map =
            Array::<_, Scope>::try_from(self.map_mut(SCOPE)?).map_err(KernelError::map("write", SCOPE))?;
        map.set(0, scope, 0).map_err(KernelError::map("write", SCOPE))
    }

    /// Makes a cgroup below the base and waits for the event: it shows how the kernel names the
    /// base.
    fn prove(&mut self, lifecycle: &mut Lifecycle) -> Result<Vec<u8>, KernelError> {
        let name = format!("adit-{}", std::process::id());
        let failed = |source| KernelError::Cgroup { path: lifecycle.base.join(&name), source };
        self.set_scope(b"/")?;
        fs::create_dir(lifecycle.base.join(&name)).map_err(failed)?;
        fs::remove_dir(lifecycle.base.join(&name)).map_err(failed)?;
        let own = format!("/{name}");
        let deadline = Instant::now() + PROOF_WITHIN;
        while Instant::now() < deadline {
            while let Some(event) = lifecycle.ring.next() {
                if let Some((Kind::Removed, path, _)) = parse_path(&event)
                    && let Some(base) = path.as_bytes().strip_suffix(own.as_bytes())
                {
                    return Ok(base.to_owned());
                }
            }
        }
        Err(KernelError::Silent { path: lifecycle.base.clone() })
    }
}

impl Lifecycle {
    /// The next event, `None` if there is none now. The file descriptor becomes readable with the
    /// next.
    #[expect(clippy::should_implement_trait, reason = "an iterator that ends would not go on")]
    pub fn next(&mut self) -> Option<LifecycleEvent> {
        loop {
            let event = self.ring.next()?;
            if let Some((kind, path, closed)) = parse_path(&event) {
                let below = path.as_bytes().strip_prefix(self.base_in_kernel.as_slice());
                if let Some(below) = below.and_then(|below| below.strip_prefix(b"/")) {
                    let path = self.base.join(OsStr::from_bytes(below));
                    return Some(LifecycleEvent::Cgroup { path, kind, closed });
                }
            } else if let Some((kind, cgroup_id)) = parse_process(&event) {
                return Some(LifecycleEvent::Process { cgroup_id, kind });
            }
        }
    }

    /// How many events found no room, since the start.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn lost(&self) -> Result<u64, KernelError> {
        let lost = self.lost.get(&0, 0).map_err(KernelError::map("read", LOST))?;
        Ok(lost.iter().sum())
    }
}

impl AsFd for Lifecycle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle").field("base", &self.base).finish_non_exhaustive()
    }
}

/// The map is not in the object, or was taken from it: the programs are attached once only.
fn missing(name: &'static str) -> KernelError {
    KernelError::map("open", name)(MapError::InvalidName { name: name.to_owned() })
}

/// Gives the lifecycle programs to the verifier and attaches none; how many there are.
///
/// # Errors
/// The first that is refused.
pub(crate) fn try_load(object: &mut Ebpf) -> Result<usize, (&'static str, ProgramError)> {
    for (name, _) in PROGRAMS {
        let Some(Program::RawTracePoint(program)) = object.program_mut(name) else {
            unreachable!("program {name} is part of the object that this crate was built with");
        };
        program.load().map_err(|error| (name, error))?;
    }
    Ok(PROGRAMS.len())
}

/// The descriptor and the id of a program that the verifier accepts.
fn load(object: &mut Ebpf, name: &'static str) -> Result<(ProgramFd, u32), KernelError> {
    let Some(Program::RawTracePoint(program)) = object.program_mut(name) else {
        unreachable!("program {name} is part of the object that this crate was built with");
    };
    let loaded = (|program: &mut RawTracePoint| {
        program.load()?;
        Ok((program.fd()?.try_clone()?, program.info()?.id()))
    })(program);
    loaded.map_err(|source: ProgramError| KernelError::Load { program: name, source: Box::new(source) })
}

/// Kind, path and, if the programs changed its entry, id of a cgroup.
fn parse_path(event: &[u8]) -> Option<(Kind, OsString, Option<u64>)> {
    // The two kinds of events differ in size.
    let event = PathEvent::read_from_bytes(event).ok()?;
    let end = event.path.iter().position(|byte| *byte == 0)?;
    let path = OsString::from_vec(event.path[..end].to_vec());
    Some((Kind::from_number(event.kind)?, path, (event.closed != 0).then_some(event.cgroup_id)))
}

fn parse_process(event: &[u8]) -> Option<(Kind, u64)> {
    let event = ProcessEvent::read_from_bytes(event).ok()?;
    Some((Kind::from_number(event.kind)?, event.cgroup_id))
}
