//! Links: attached once, pinned, replaced in place by a later build.
//!
//! A pin's name says what it is attached to, by ids that are never used twice before a reboot:
//! `pods-<cgroup id>-<program>`, `tunnel-<hash of path>-<cgroup id>-<program>`,
//! `kubelet-<cgroup id>`, `netns-<cookie>`, `lifecycle-<tracepoint>-<program id>`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};
use aya_obj::generated::bpf_attach_type;

use crate::{
    KernelError,
    object::{Attachment, INGRESS, KUBELET, NETNS, PODS, TUNNEL},
    sys,
};

/// The folder of links in `pins`.
pub(crate) fn folder(pins: &Path) -> PathBuf {
    pins.join("links")
}

/// Attaches the pods' programs to `cgroup`, and to no other any more.
pub(crate) fn attach_pods(object: &Ebpf, folder: &Path, cgroup: &Path) -> Result<bool, KernelError> {
    let (dir, id) = open_cgroup(cgroup)?;
    let prefix = format!("pods-{id}-");
    let mut changed = false;
    for attachment in PODS {
        let name = format!("{prefix}{}", attachment.program);
        changed |= ensure(object, attachment, folder, &name, dir.as_fd(), cgroup)?;
    }
    // Only now: a pod below both is never without programs.
    remove_if(folder, |name| name.starts_with("pods-") && !name.starts_with(&prefix))?;
    Ok(changed)
}

/// Attaches the program that sees packets to `cgroup`, or detaches it.
pub(crate) fn set_ingress(
    object: &Ebpf,
    folder: &Path,
    cgroup: &Path,
    attached: bool,
) -> Result<(), KernelError> {
    let (dir, id) = open_cgroup(cgroup)?;
    let name = format!("pods-{id}-{}", INGRESS.program);
    if attached {
        ensure(object, INGRESS, folder, &name, dir.as_fd(), cgroup).map(drop)
    } else {
        remove_link(&folder.join(name))
    }
}

/// The ids of the pods' programs that links run, by the name of the program. Where programs are
/// about to move from one cgroup to another, those of either.
pub(crate) fn pods_programs(folder: &Path) -> Result<BTreeMap<String, u32>, KernelError> {
    let mut found = BTreeMap::new();
    for name in names(folder)? {
        let Some((_, program)) = name.strip_prefix("pods-").and_then(|rest| rest.split_once('-')) else {
            continue;
        };
        let path = folder.join(&name);
        let id = program_of(&path).map_err(KernelError::pin("read the link", &path))?;
        found.insert(program.to_owned(), id);
    }
    Ok(found)
}

pub(crate) fn attach_tunnel(object: &Ebpf, folder: &Path, cgroup: &Path) -> Result<(), KernelError> {
    let (dir, id) = open_cgroup(cgroup)?;
    let of_path = tunnel_prefix(cgroup);
    let prefix = format!("{of_path}{id}-");
    for attachment in TUNNEL {
        ensure(object, attachment, folder, &format!("{prefix}{}", attachment.program), dir.as_fd(), cgroup)?;
    }
    // What was attached to an earlier cgroup at this path died with it.
    remove_if(folder, |name| name.starts_with(&of_path) && !name.starts_with(&prefix))
}

/// The cgroup may be gone already, and another at its path: its links are found by path and id.
pub(crate) fn detach_tunnel(folder: &Path, cgroup: &Path, id: u64) -> Result<(), KernelError> {
    let prefix = format!("{}{id}-", tunnel_prefix(cgroup));
    remove_if(folder, |name| name.starts_with(&prefix))
}

/// Attaches the kubelet's program to `cgroup`, and to no other any more.
pub(crate) fn attach_kubelet(object: &Ebpf, folder: &Path, cgroup: &Path) -> Result<(), KernelError> {
    let (dir, id) = open_cgroup(cgroup)?;
    let name = format!("kubelet-{id}");
    ensure(object, KUBELET, folder, &name, dir.as_fd(), cgroup)?;
    remove_if(folder, |other| other.starts_with("kubelet-") && other != name)
}

/// Detaches it from wherever it is attached.
pub(crate) fn detach_kubelet(folder: &Path) -> Result<(), KernelError> {
    remove_if(folder, |name| name.starts_with("kubelet-"))
}

/// Attaches a program to a tracepoint; the name of the link. That of an earlier program, which
/// cannot be replaced in place, stays beside it until [`remove_lifecycle`].
pub(crate) fn attach_lifecycle(
    program: BorrowedFd<'_>,
    program_id: u32,
    folder: &Path,
    tracepoint: &str,
) -> Result<String, KernelError> {
    let name = format!("lifecycle-{tracepoint}-{program_id}");
    let target = PathBuf::from(format!("tracepoint {tracepoint}"));
    let link = sys::raw_tracepoint_open(program, tracepoint)
        .map_err(|source| KernelError::Tracepoint { target, source })?;
    let path = folder.join(&name);
    sys::pin(link.as_fd(), &path).map_err(KernelError::pin("pin the link", path))?;
    Ok(name)
}

/// Ends the lifecycle links that `matches` names.
pub(crate) fn remove_lifecycle(folder: &Path, matches: impl Fn(&str) -> bool) -> Result<(), KernelError> {
    remove_if(folder, |name| name.starts_with("lifecycle-") && matches(name))
}

/// Leaves a link that runs `copy` in the netns `cookie`; the id of the copy.
pub(crate) fn steer(
    copy: io::Result<OwnedFd>,
    folder: &Path,
    cookie: u64,
    netns: BorrowedFd<'_>,
) -> Result<u32, KernelError> {
    let path = netns_link(folder, cookie);
    let target = PathBuf::from(format!("netns {cookie}"));
    let failed = |source| KernelError::Attach { program: NETNS.program, target: target.clone(), source };
    replace_or_create(NETNS, copy.map_err(&failed)?.as_fd(), &path, netns, &target)?;
    program_of(&path).map_err(failed)
}

/// The id of the program that the link of the netns `cookie` runs; `None`: there is no link.
pub(crate) fn steered_by(folder: &Path, cookie: u64) -> Option<u32> {
    let path = netns_link(folder, cookie);
    path.exists().then(|| program_of(&path).ok()).flatten()
}

fn netns_link(folder: &Path, cookie: u64) -> PathBuf {
    folder.join(format!("netns-{cookie}"))
}

pub(crate) fn unsteer(folder: &Path, cookies: &BTreeSet<u64>) -> Result<(), KernelError> {
    remove_if(folder, |name| netns_of(name).is_some_and(|cookie| cookies.contains(&cookie)))
}

/// The cookies of the netns that have a link.
pub(crate) fn steered(folder: &Path) -> Result<Vec<u64>, KernelError> {
    let names = names(folder)?;
    Ok(names.iter().filter_map(|name| netns_of(name)).collect())
}

/// The netns of the link that is pinned as `name`.
fn netns_of(name: &str) -> Option<u64> {
    name.strip_prefix("netns-")?.parse().ok()
}

/// Removes every link in `folder`; how many there were.
pub(crate) fn remove_all(folder: &Path) -> Result<usize, KernelError> {
    let count = names(folder)?.len();
    remove_if(folder, |_| true)?;
    Ok(count)
}

/// Leaves a link pinned as `name` that runs our `attachment` at `target`.
fn ensure(
    object: &Ebpf,
    attachment: Attachment,
    folder: &Path,
    name: &str,
    target: BorrowedFd<'_>,
    target_path: &Path,
) -> Result<bool, KernelError> {
    let path = folder.join(name);
    let failed =
        |source| KernelError::Attach { program: attachment.program, target: target_path.to_owned(), source };
    let program = object.program(attachment.program);
    let (Some(Ok(id)), Some(Ok(fd))) =
        (program.map(|program| program.info().map(|info| info.id())), program.map(|program| program.fd()))
    else {
        return Err(failed(io::Error::other("the program is not loaded")));
    };
    if path.exists() && program_of(&path).map_err(failed)? == id {
        return Ok(false);
    }
    replace_or_create(attachment, fd.as_fd(), &path, target, target_path)?;
    Ok(true)
}

/// Leaves a link pinned at `path` that runs `program` at `target`.
fn replace_or_create(
    attachment: Attachment,
    program: BorrowedFd<'_>,
    path: &Path,
    target: BorrowedFd<'_>,
    target_path: &Path,
) -> Result<(), KernelError> {
    let failed =
        |source| KernelError::Attach { program: attachment.program, target: target_path.to_owned(), source };
    match sys::pinned(path) {
        Ok(link) => match sys::link_update(link.as_fd(), program) {
            Ok(()) => return Ok(()),
            // What it was attached to is gone, and with it the link's effect.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => remove_link(path)?,
            Err(error) => return Err(failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => (),
        Err(error) => return Err(KernelError::pin("open", path)(error)),
    }
    let link = sys::link_create(program, target, attachment.attach_type).map_err(|source| {
        match culprit(target_path, attachment.attach_type) {
            Some(culprit) if source.raw_os_error() == Some(libc::EPERM) => KernelError::Forbidden {
                program: attachment.program,
                target: target_path.to_owned(),
                culprit,
                source,
            },
            _ => failed(source),
        }
    })?;
    sys::pin(link.as_fd(), path).map_err(KernelError::pin("pin the link", path))
}

/// The id of the program that the link pinned at `path` runs.
fn program_of(path: &Path) -> io::Result<u32> {
    let info = PinnedLink::from_pin(path).map(FdLink::from).and_then(|link| link.info());
    info.map(|info| info.program_id()).map_err(io::Error::other)
}

/// The program at `cgroup` or above it which was attached so that no other may be below, in words.
pub(crate) fn culprit(cgroup: &Path, attach_type: bpf_attach_type) -> Option<String> {
    for dir in cgroup.ancestors() {
        // Above the mount of cgroup v2 the query fails.
        let (programs, flags) = File::open(dir).and_then(|dir| sys::attached(&dir, attach_type)).ok()?;
        if let Some(id) = programs.first()
            && flags & sys::ALLOW_MULTI == 0
        {
            let name = loaded_programs()
                .filter_map(Result::ok)
                .find(|program| program.id() == *id)
                .and_then(|program| program.name_as_str().map(str::to_owned))
                .unwrap_or_default();
            return Some(format!(
                "program {id} ({name}), attached to {} without BPF_F_ALLOW_MULTI; detach it, or have its owner attach it with that flag or by a link",
                dir.display()
            ));
        }
    }
    None
}

fn open_cgroup(path: &Path) -> Result<(File, u64), KernelError> {
    let opened = File::open(path).and_then(|dir| dir.metadata().map(|meta| (dir, meta)));
    let (dir, meta) = opened.map_err(|source| KernelError::Cgroup { path: path.to_owned(), source })?;
    if !meta.is_dir() {
        let source = io::Error::from(io::ErrorKind::NotADirectory);
        return Err(KernelError::Cgroup { path: path.to_owned(), source });
    }
    Ok((dir, meta.ino()))
}

/// A path is too long for a file's name, and bpffs takes no dots. Two that collide would share
/// their fate on detaching only, and `DefaultHasher` has 64 bits and fixed keys.
fn tunnel_prefix(cgroup: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    cgroup.hash(&mut hasher);
    format!("tunnel-{:016x}-", hasher.finish())
}

fn names(folder: &Path) -> Result<Vec<String>, KernelError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(KernelError::pin("list", folder)(error)),
    };
    // Sorted by kind, so that removing everything ends redirection before what answers it:
    // connect and sendmsg first of the pods' programs.
    let mut sorted = BTreeMap::new();
    for entry in entries {
        let name = entry.map_err(KernelError::pin("list", folder))?.file_name();
        let name = name.to_string_lossy().into_owned();
        let redirects = name.contains("connect") || name.contains("sendmsg");
        sorted.insert((!redirects, name.clone()), name);
    }
    Ok(sorted.into_values().collect())
}

fn remove_if(folder: &Path, matches: impl Fn(&str) -> bool) -> Result<(), KernelError> {
    for name in names(folder)?.iter().filter(|name| matches(name)) {
        remove_link(&folder.join(name))?;
    }
    Ok(())
}

/// Detaches and unpins. Already gone is fine.
fn remove_link(path: &Path) -> Result<(), KernelError> {
    match sys::pinned(path) {
        // Unpinning alone would leave it attached as long as anybody holds it. A link whose target
        // is gone has nothing to detach.
        Ok(link) => drop(sys::link_detach(link.as_fd())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(KernelError::pin("open", path)(error)),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(KernelError::pin("unpin", path)(error)),
        _ => Ok(()),
    }
}
