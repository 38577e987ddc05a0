//! Finds the programs that the tests run.

use std::{
    env,
    path::{Path, PathBuf},
};

/// The binary `name` of this workspace: the file that `NAME_BIN` (`WATCHER_BIN`, `ZTUNNEL_BIN`)
/// names, else the one that Cargo built beside this executable.
///
/// # Panics
/// When it is not built. Cargo builds the binaries of a package before its integration tests, but
/// not those of other packages: `cargo build --workspace --bins` does.
pub fn binary(name: &str) -> PathBuf {
    if let Some(path) = env::var_os(format!("{}_BIN", name.to_uppercase())) {
        return path.into();
    }
    let own = env::current_exe().expect("the path of this executable");
    // target/<profile>/{deps,examples}/<this>, or target/<profile>/<this>
    let folders = own.ancestors().skip(1).take(2);
    let found = folders.map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("no program {name} beside {}: cargo build --workspace --bins", own.display())
    })
}

/// A program that is not ours: `name` in the folder that the variable names, else on `PATH` if that
/// counts, else in `folder` of the cache, where `.ci/setup` builds it.
///
/// # Panics
/// When it is nowhere.
pub fn foreign(name: &str, variable: &str, uses_path: bool, folder: &str) -> PathBuf {
    let path = env::var_os("PATH").filter(|_| uses_path).unwrap_or_default();
    env::var_os(variable)
        .map(PathBuf::from)
        .into_iter()
        .chain(env::split_paths(&path))
        .chain([cache().join(folder)])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("no {name}: run make setup, or set {variable} to its folder"))
}

/// A program of Kubernetes, or its store: from `KUBEBUILDER_ASSETS`, else `PATH`, else what
/// `.ci/setup/kube-tools` builds.
///
/// # Panics
/// When it is nowhere.
pub fn kubernetes(name: &str) -> PathBuf {
    /// As `go.mod` in `.ci/tools/kubernetes` has it.
    const VERSION: &str = "1.36.3";
    foreign(name, "KUBEBUILDER_ASSETS", true, &format!("kubernetes-{VERSION}/bin"))
}

/// The folder in which `.ci/setup` keeps what it fetched or built: `ADIT_CACHE`, else
/// `~/.cache/adit`.
///
/// # Panics
/// When neither `ADIT_CACHE` nor `HOME` is set.
pub fn cache() -> PathBuf {
    env::var_os("ADIT_CACHE").map_or_else(
        || Path::new(&env::var_os("HOME").expect("HOME or ADIT_CACHE")).join(".cache/adit"),
        PathBuf::from,
    )
}

/// How large the tests are that can be small or large: the value of `ADIT_TEST_SIZE`, which is
/// `small` (the default: seconds each) or `full` (minutes each: 2,000 pods come and go).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TestSize {
    /// Some seconds each.
    Small,
    /// Some minutes each.
    Full,
}

impl TestSize {
    /// Reads `ADIT_TEST_SIZE`.
    ///
    /// # Panics
    /// When it is neither `small` nor `full`.
    pub fn get() -> Self {
        match env::var("ADIT_TEST_SIZE").as_deref() {
            Err(_) | Ok("" | "small") => Self::Small,
            Ok("full") => Self::Full,
            Ok(other) => panic!("ADIT_TEST_SIZE={other}: expected small or full"),
        }
    }

    /// `small` or `full`, whichever this is.
    pub fn pick<T>(self, small: T, full: T) -> T {
        match self {
            Self::Small => small,
            Self::Full => full,
        }
    }
}
