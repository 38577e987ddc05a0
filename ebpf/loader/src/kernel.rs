//! Everything that one node has in the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use adit_ebpf_common::maps::TRACE;
use aya::{Ebpf, EbpfLoader, maps::RingBuf};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::{
    KernelError, Trace, VerdictCounts, btf::CgroupOffsets, exclusions, links, maps,
    netns_program::NetnsProgram, object, pins, pins::Found,
};

/// The loaded programs, their links and their maps.
///
/// Dropping it changes nothing in the kernel: links and maps are pinned, and links hold the
/// programs.
#[derive(Debug)]
pub struct Kernel {
    pub(crate) object: Ebpf,
    netns_program: NetnsProgram,
    /// The ids of the programs that this process attached to netns, by the netns's cookie.
    steering: BTreeMap<u64, u32>,
    pub(crate) pins: PathBuf,
    found: Found,
    /// The lifecycle links that this process made.
    pub(crate) lifecycle_links: BTreeSet<String>,
    pub(crate) offsets: CgroupOffsets,
    verdicts: Arc<VerdictCounts>,
    /// See [`Self::closes_late`].
    pub(crate) closes_late: Option<String>,
}

impl Kernel {
    /// Loads the programs, creates maps pinned under `pins` (such as `/sys/fs/bpf/adit/<node>`), or
    /// adopts those pinned there already, with their contents. Attaches nothing; links that a
    /// predecessor left run its programs until [`Self::attach_pods`] and its like replace them.
    ///
    /// # Errors
    /// `pins` is not on a bpffs, a pin cannot be changed, the kernel refuses a map or a program, or
    /// another version left what this one can neither adopt nor replace; then nothing has changed.
    pub fn open(pins: &Path) -> Result<Self, KernelError> {
        let (links_dir, maps_dir) = (links::folder(pins), maps::folder(pins));
        check_bpffs(pins)?;
        for dir in [&links_dir, &maps_dir] {
            fs::create_dir_all(dir).map_err(KernelError::pin("create", dir))?;
        }
        pins::adopt(&maps_dir)?;
        let mut loader = EbpfLoader::new();
        for map in maps::pinned() {
            loader.map_pin_path(map.name, maps::pin(&maps_dir, map));
        }
        let mut object =
            loader.load(object::BYTES).map_err(|source| KernelError::Object { source: Box::new(source) })?;
        object::load_programs(&mut object)?;
        let netns_program = NetnsProgram::new(&object)?;
        let found = pins::found(&object, &links_dir, &maps_dir)?;
        let verdicts = Arc::new(VerdictCounts::open(&maps_dir)?);
        let mut kernel = Self {
            object,
            verdicts,
            netns_program,
            steering: BTreeMap::new(),
            pins: pins.to_owned(),
            found,
            lifecycle_links: BTreeSet::new(),
            offsets: CgroupOffsets::default(),
            closes_late: None,
        };
        exclusions::take_over(&mut kernel, &maps_dir);
        Ok(kernel)
    }

    /// Whether links run the programs of another version with maps of its own. They go on deciding,
    /// by what their maps hold, until [`Self::attach_pods`]: the caller fills this version's maps
    /// before that.
    #[must_use]
    pub fn must_be_filled(&self) -> bool {
        self.found == Found::OtherMaps
    }

    /// Whether no program was attached: nobody has closed any pod since the boot.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.found == Found::Nothing
    }

    /// Attaches the pods' programs (connect, getpeername, getsockopt, sock_ops) to the cgroup that
    /// all pods are below, and detaches them from where they were before. Idempotent; whether anything
    /// was missing or another's. From here on the maps must hold what the programs are to do; what
    /// other versions pinned goes.
    ///
    /// # Errors
    /// The directory is not a cgroup, somebody else's program forbids ours, or a link cannot be
    /// made.
    pub fn attach_pods(&mut self, cgroup_dir: &Path) -> Result<bool, KernelError> {
        let changed = links::attach_pods(&self.object, &links::folder(&self.pins), cgroup_dir)?;
        if self.found == Found::OtherMaps {
            self.found = Found::OwnMaps;
        }
        pins::remove_unknown(&maps::folder(&self.pins))?;
        Ok(changed)
    }

    /// Drops what arrives for pods below `cgroup_dir` whose entry knows no netns and is closed. It
    /// costs a program for every packet of every pod, so it is for when there may be such pods.
    /// Idempotent.
    ///
    /// # Errors
    /// As of [`Self::attach_pods`], or a pin cannot be removed.
    pub fn drop_unknown_arrivals(&mut self, cgroup_dir: &Path, drop: bool) -> Result<(), KernelError> {
        links::set_ingress(&self.object, &links::folder(&self.pins), cgroup_dir, drop)
    }

    /// Attaches the tunnel's programs (sock_create, sock_ops, getsockopt) to a tunnel's cgroup. To
    /// be called before it opens its listeners: only sockets created after this count. Idempotent.
    ///
    /// # Errors
    /// As of [`Self::attach_pods`].
    pub fn attach_tunnel(&mut self, cgroup_dir: &Path) -> Result<(), KernelError> {
        links::attach_tunnel(&self.object, &links::folder(&self.pins), cgroup_dir)
    }

    /// Detaches the programs of the tunnel whose cgroup was at `cgroup_dir` and had this `id`. Fine
    /// if they are not attached, or if the cgroup is gone.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn detach_tunnel(&mut self, cgroup_dir: &Path, id: u64) -> Result<(), KernelError> {
        links::detach_tunnel(&links::folder(&self.pins), cgroup_dir, id)
    }

    /// Lets the connections that are opened in the kubelet's cgroup pass to the pods' applications.
    /// From `None`: from no cgroup any more. Idempotent.
    ///
    /// # Errors
    /// As of [`Self::attach_pods`], or a pin cannot be removed.
    pub fn attach_kubelet(&mut self, cgroup_dir: Option<&Path>) -> Result<(), KernelError> {
        let folder = links::folder(&self.pins);
        match cgroup_dir {
            Some(cgroup) => links::attach_kubelet(&self.object, &folder, cgroup),
            None => links::detach_kubelet(&folder),
        }
    }

    /// Steers what arrives in pods' netns, by what [`Self::set_netns`] says of them; without that
    /// it is refused. Idempotent. For each netns, in their order, whether the program for it could
    /// be loaded and its link made.
    pub fn steer(&mut self, netns: &[(u64, BorrowedFd<'_>)]) -> Vec<Result<(), KernelError>> {
        let folder = links::folder(&self.pins);
        let is_current = |cookie: &u64| {
            let known = self.steering.get(cookie);
            known.is_some_and(|id| links::steered_by(&folder, *cookie) == Some(*id))
        };
        let cookies: Vec<u64> = netns.iter().map(|(cookie, _)| *cookie).collect();
        let due: Vec<u64> = cookies.into_iter().filter(|cookie| !is_current(cookie)).collect();
        let mut copies = self.netns_program.load_each(&due).into_iter();
        let steering = &mut self.steering;
        let mut steer = |(cookie, netns): &(u64, BorrowedFd<'_>)| {
            if !due.contains(cookie) {
                return Ok(());
            }
            let Some(copy) = copies.next() else { unreachable!("there is a copy for each") };
            let id = links::steer(copy, &folder, *cookie, *netns)?;
            steering.insert(*cookie, id);
            Ok(())
        };
        netns.iter().map(&mut steer).collect()
    }

    /// Whether this process steers what arrives in that netns.
    #[must_use]
    pub fn is_steering(&self, netns_cookie: u64) -> bool {
        self.steering.contains_key(&netns_cookie)
    }

    /// Ends the steering of what arrives there, and forgets who listens there. Idempotent.
    ///
    /// # Errors
    /// A pin cannot be removed, or a map cannot be written.
    pub fn unsteer(&mut self, netns_cookies: &BTreeSet<u64>) -> Result<(), KernelError> {
        links::unsteer(&links::folder(&self.pins), netns_cookies)?;
        self.steering.retain(|cookie, _| !netns_cookies.contains(cookie));
        self.forget_app_listeners(netns_cookies)
    }

    /// The cookies of the netns that are steered, in no order. A netns that has ended stays listed
    /// until [`Self::unsteer`].
    ///
    /// # Errors
    /// The folder of pins cannot be read.
    pub fn steered(&self) -> Result<Vec<u64>, KernelError> {
        links::steered(&links::folder(&self.pins))
    }

    /// How often each rule decided.
    #[must_use]
    pub fn verdicts(&self) -> &Arc<VerdictCounts> {
        &self.verdicts
    }

    /// A reader of the verdicts, which [`adit_ebpf_common::settings::Settings::debug`] switches on.
    ///
    /// # Errors
    /// The ring buffer cannot be opened.
    pub fn trace(&self) -> Result<Trace, KernelError> {
        let map = maps::trace(&maps::folder(&self.pins))?;
        RingBuf::try_from(map).map(Trace).map_err(KernelError::map("open", TRACE.name))
    }
}

/// Whether `pins`, or what there is of the way to it, lies on a bpffs.
fn check_bpffs(pins: &Path) -> Result<(), KernelError> {
    let not_there = |path: &Path| KernelError::NoBpffs { path: path.to_owned() };
    let existing = pins.ancestors().find(|dir| dir.exists()).ok_or_else(|| not_there(pins))?;
    match statfs(existing) {
        Ok(stat) if stat.filesystem_type() == BPF_FS_MAGIC => Ok(()),
        Ok(_) => Err(not_there(pins)),
        Err(error) => Err(KernelError::pin("look at", existing)(io::Error::from(error))),
    }
}
