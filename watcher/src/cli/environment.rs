//! The environment variables that are no options. Nothing else reads the environment.

#![expect(clippy::disallowed_methods, reason = "the one place where the watcher reads it")]

use std::env;

/// Whether this process runs in a pod of a cluster: the kubelet sets `KUBERNETES_SERVICE_HOST`
/// there.
pub(super) fn is_in_cluster() -> bool {
    env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}

/// Whether `KUBECONFIG` says where the API server is.
pub(super) fn has_kubeconfig() -> bool {
    env::var_os("KUBECONFIG").is_some_and(|path| !path.is_empty())
}

/// Which log records are written (`RUST_LOG`).
pub(super) fn log_filter() -> Option<String> {
    env::var("RUST_LOG").ok()
}
