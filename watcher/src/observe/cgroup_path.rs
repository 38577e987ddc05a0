//! Which pod and container a cgroup's path names. Pure: reads no file system.
//!
//! | who makes it | pod | container below it |
//! |---|---|---|
//! | cgroupfs driver | `kubepods/burstable/pod<uid>` | `<id>` (containerd, cri-dockerd), `crio-<id>` |
//! | systemd driver | `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice`, `_` for `-` | `cri-containerd-<id>.scope`, `crio-<id>.scope`, `docker-<id>.scope` |
//! | Kind, k3s, minikube | the same below whatever the node is: `kubelet.slice/kubelet-kubepods….slice`, `docker/<id>/kubelet/kubepods`, … | the same |
//!
//! Guaranteed pods have no directory of a class; static pods' uids are hashes without dashes. Only uids of
//! these two forms count, so that no other directory is mistaken for a pod.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

/// A path at or below a pod's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodPath {
    /// The pod's own directory.
    pub pod_dir: PathBuf,
    /// As Kubernetes has it, with dashes.
    pub uid: String,
    pub below: Below,
}

/// What a path is, relative to its pod's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    /// It is the pod's directory itself.
    Pod,
    /// In this container, or deeper.
    Container(String),
    /// CRI-O's `conmon`, which monitors a container from the node's own netns.
    Conmon,
    /// Somewhere else.
    Other,
}

/// The pod that `path` belongs to. Only components below `base` count, and of these the *first*
/// that names a pod: what a container makes inside its own cgroup, be it another cluster's pods,
/// belongs to it.
pub(crate) fn resolve(path: &Path, base: &Path) -> Option<PodPath> {
    let mut pod_dir = base.to_owned();
    let mut components = path.strip_prefix(base).ok()?.iter();
    loop {
        let name = components.next()?;
        pod_dir.push(name);
        if let Some(uid) = pod_uid(name) {
            let below = components.next().map_or(Below::Pod, below);
            return Some(PodPath { pod_dir, uid, below });
        }
    }
}

/// The uid in the name of a pod's directory.
pub(crate) fn pod_uid(name: &OsStr) -> Option<String> {
    let name = name.to_str()?;
    let given = match name.strip_suffix(".slice") {
        Some(stem) => {
            let (class, uid) = stem.rsplit_once("-pod")?;
            class.contains("kubepods").then_some(uid)?.replace('_', "-")
        }
        None => name.strip_prefix("pod")?.to_owned(),
    };
    is_uid(&given).then_some(given)
}

/// What the directory of the pod `uid` may be called below `base`: by the systemd driver where that
/// is a slice, whose name its slices carry on; by the cgroupfs driver where it is that driver's; and
/// by either where it is neither, as the root of all cgroups.
pub(crate) fn names(uid: &str, base: &Path) -> Vec<String> {
    let base = base.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let slices = |stem: &str| {
        let uid = uid.replace('-', "_");
        ["", "-burstable", "-besteffort"].map(|class| format!("{stem}{class}-pod{uid}.slice"))
    };
    match base.strip_suffix(".slice") {
        Some(stem) => slices(stem).to_vec(),
        None if base == "kubepods" => vec![format!("pod{uid}")],
        None => [format!("pod{uid}")].into_iter().chain(slices("kubepods")).collect(),
    }
}

/// A UUID in lower case, or the 32 digits of a static pod's hash.
fn is_uid(text: &str) -> bool {
    let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    match text.len() {
        32 => text.bytes().all(hex),
        36 => text.bytes().enumerate().all(|(i, byte)| match i {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => hex(byte),
        }),
        _ => false,
    }
}

/// What the directory called `name`, right below a pod's, is.
pub(crate) fn below(name: &OsStr) -> Below {
    let Some(name) = name.to_str() else { return Below::Other };
    let stem = name.strip_suffix(".scope").unwrap_or(name);
    if stem.starts_with("crio-conmon-") {
        return Below::Conmon;
    }
    let id = ["cri-containerd-", "crio-", "docker-", "libpod-"]
        .into_iter()
        .find_map(|prefix| stem.strip_prefix(prefix))
        .unwrap_or(stem);
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_id { Below::Container(id.to_owned()) } else { Below::Other }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "8a4b0c1e-0000-4000-8000-0123456789ab";
    const UID_: &str = "8a4b0c1e_0000_4000_8000_0123456789ab";
    const HASH: &str = "0123456789abcdef0123456789abcdef";
    const ID: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    #[test]
    fn every_driver_runtime_and_class_is_read() {
        let container = || Below::Container(ID.to_owned());
        let table = [
            // containerd and cri-dockerd, cgroupfs driver, the three classes
            (format!("kubepods/pod{UID}"), UID, Below::Pod),
            (format!("kubepods/burstable/pod{UID}/{ID}"), UID, container()),
            (format!("kubepods/besteffort/pod{UID}/{ID}/nested/deeper"), UID, container()),
            // CRI-O, cgroupfs driver
            (format!("kubepods/pod{UID}/crio-{ID}"), UID, container()),
            (format!("kubepods/pod{UID}/crio-conmon-{ID}"), UID, Below::Conmon),
            // systemd driver
            (format!("kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope"), UID, container()),
            (
                format!(
                    "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/crio-{ID}.scope"
                ),
                UID,
                container(),
            ),
            (
                format!(
                    "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice/crio-conmon-{ID}.scope"
                ),
                UID,
                Below::Conmon,
            ),
            (
                format!("kubepods.slice/kubepods-pod{UID_}.slice/docker-{ID}.scope/init.scope"),
                UID,
                container(),
            ),
            // Kind: kubelet below a root of its own, in a container of the outer machine
            (
                format!(
                    "system.slice/docker-{ID}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
                container(),
            ),
            (format!("docker/{ID}/kubelet/kubepods/burstable/pod{UID}/{ID}"), UID, container()),
            // k3s and minikube in a container
            (format!("docker/{ID}/kubepods/besteffort/pod{UID}/{ID}"), UID, container()),
            (
                format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{HASH}.slice"),
                HASH,
                Below::Pod,
            ),
            // in a cgroup namespace at the pods' cgroup
            (format!("pod{HASH}/something"), HASH, Below::Other),
        ];
        for (path, uid, below) in table {
            let found = resolve(&Path::new("/c").join(&path), Path::new("/c"));
            let found = found.unwrap_or_else(|| panic!("{path}"));
            assert_eq!((found.uid.as_str(), found.below), (uid, below), "{path}");
            assert!(pod_uid(found.pod_dir.file_name().unwrap()).is_some(), "{path}: {:?}", found.pod_dir);
        }
    }

    #[test]
    fn the_names_of_a_pod_name_it() {
        for base in ["/c/kubepods", "/c/kubepods.slice", "/c/kubelet.slice/kubelet-kubepods.slice", "/c"] {
            for name in names(UID, Path::new(base)) {
                assert_eq!(pod_uid(OsStr::new(&name)).as_deref(), Some(UID), "{base}: {name}");
            }
        }
        assert_eq!(names(UID, Path::new("/c/kubepods.slice")).len(), 3);
        assert_eq!(names(UID, Path::new("/c/kubepods")).len(), 1);
        assert_eq!(names(UID, Path::new("/c")).len(), 4, "nobody knows the driver");
    }

    #[test]
    fn what_is_no_pod_is_none() {
        for path in [
            "kubepods".to_owned(),
            "kubepods.slice/kubepods-burstable.slice".to_owned(),
            format!("system.slice/{ID}"),
            "kubepods/podinfo".to_owned(),
            format!("kubepods/pod{}", &UID[1..]),
            format!("kubepods/pod{}", UID.to_uppercase()),
            format!("kubepods/pod{UID_}"),
            format!("machine.slice/libpod-pod{UID_}.slice"),
        ] {
            assert_eq!(resolve(&Path::new("/c").join(&path), Path::new("/c")), None, "{path}");
        }
        assert_eq!(resolve(Path::new("/c/kubepods"), Path::new("/elsewhere")), None);
    }

    #[test]
    fn a_cluster_inside_a_pod_belongs_to_the_pod_and_its_own_watcher_sees_its_own() {
        let other = UID.replace('8', "9");
        let path = PathBuf::from(format!("/c/kubepods/pod{UID}/{ID}/kubelet/kubepods/pod{other}/{ID}"));
        assert_eq!(resolve(&path, Path::new("/c")).unwrap().uid, UID);
        let inner = PathBuf::from(format!("/c/kubepods/pod{UID}/{ID}/kubelet/kubepods"));
        assert_eq!(resolve(&path, &inner).unwrap().uid, other);
    }

    proptest! {
        #[test]
        fn whatever_the_path_the_pods_directory_is_on_it_and_names_the_uid(
            parts in proptest::collection::vec("[a-z0-9_.-]{1,20}|pod[0-9a-f]{32}|kubepods-pod[0-9a-f]{32}\\.slice", 0..8)
        ) {
            let path = parts.iter().fold(PathBuf::from("/c"), |path, part| path.join(part));
            if let Some(found) = resolve(&path, Path::new("/c")) {
                prop_assert!(path.starts_with(&found.pod_dir));
                prop_assert_eq!(pod_uid(found.pod_dir.file_name().unwrap()), Some(found.uid));
                // None above it does: the first one holds.
                let above = found.pod_dir.parent().unwrap();
                prop_assert_eq!(resolve(above, Path::new("/c")), None);
            }
        }

        #[test]
        fn what_lies_below_a_pod_never_changes_whose_it_is(
            uid in "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
            systemd: bool,
            below in proptest::collection::vec("[a-zA-Z0-9_.:-]{1,30}", 0..5),
        ) {
            let name = if systemd {
                format!("kubepods-burstable-pod{}.slice", uid.replace('-', "_"))
            } else {
                format!("pod{uid}")
            };
            let pod_dir = Path::new("/c/kubepods").join(name);
            let path = below.iter().fold(pod_dir.clone(), |path, part| path.join(part));
            let found = resolve(&path, Path::new("/c")).unwrap();
            prop_assert_eq!((found.uid, found.pod_dir), (uid, pod_dir));
        }
    }
}
