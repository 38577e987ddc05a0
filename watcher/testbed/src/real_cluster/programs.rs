//! The programs of a node that are not of Kubernetes.

use std::path::{Path, PathBuf};

use crate::program::foreign;

/// As `go.mod` in `.ci/tools/containerd` has it.
const CONTAINERD: &str = "2.4.2";

/// A program of containerd: from `CONTAINERD_BIN`, else what `.ci/setup/containerd` builds. Those on
/// `PATH` may be of a generation whose configuration is another.
pub(super) fn containerd(name: &str) -> PathBuf {
    foreign(name, "CONTAINERD_BIN", false, &format!("containerd-{CONTAINERD}"))
}

/// From `RUNC_BIN`, a folder, else `PATH`.
pub(super) fn runc() -> PathBuf {
    foreign("runc", "RUNC_BIN", true, "runc")
}

/// The folder of the CNI plugins: `CNI_BIN`, else that of Debian's package, else the usual one.
pub(super) fn cni() -> PathBuf {
    let plugin = ["/usr/lib/cni", "/opt/cni/bin"].map(|dir| Path::new(dir).join("bridge"));
    let found = plugin.into_iter().find(|path| path.is_file());
    let found = found.unwrap_or_else(|| foreign("bridge", "CNI_BIN", false, "cni"));
    found.parent().expect("a folder").to_owned()
}
