//! Istio's own programs and charts, as `.ci/setup/istio` has them from its sources.

use std::path::PathBuf;

use crate::program::{cache, foreign};

/// As `go.mod` in `.ci/tools/istio` has it.
const VERSION: &str = "0.0.0-20260827124520-eed52ebb66ad";

/// A program of Istio: from `ISTIO_BIN`, a folder, else `PATH`, else what `.ci/setup/istio` builds.
///
/// # Panics
/// When it is nowhere.
pub fn program(name: &str) -> PathBuf {
    foreign(name, "ISTIO_BIN", true, &format!("istio-{VERSION}/bin"))
}

/// The folder of one of Istio's charts: `base`, `istio-control/istio-discovery`, `istio-cni`,
/// `ztunnel`.
///
/// # Panics
/// When it is not there.
pub fn chart(name: &str) -> PathBuf {
    let folder = cache().join(format!("istio-{VERSION}/charts")).join(name);
    assert!(folder.is_dir(), "no {}: run make setup", folder.display());
    folder
}
