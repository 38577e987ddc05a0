//! The Helm chart, rendered by the real Helm.
//!
//! Helm comes from `HELM_BIN`, else from `PATH`, else from the cache, where `.ci/setup/helm` builds
//! it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

use crate::{command, program::cache};

/// What `.ci/setup/helm` builds.
const VERSION: &str = "3.22.0";

/// The folder of the chart.
///
/// # Panics
/// When it is not where the repository has it.
pub fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/adit");
    fs::canonicalize(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

/// Runs Helm with these arguments.
///
/// # Panics
/// When there is no Helm.
pub fn helm(arguments: &[&str]) -> Output {
    helm_as(Path::new("/dev/null"), arguments)
}

/// The same, in the cluster and with the rights of a kubeconfig.
///
/// # Panics
/// When there is no Helm.
pub fn helm_as(kubeconfig: &Path, arguments: &[&str]) -> Output {
    // Nothing of the user's settings, nor of the cluster that they may name.
    let home = tempfile::tempdir().expect("folder");
    let mut command = Command::new(program());
    for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(name, home.path());
    }
    command.env("KUBECONFIG", kubeconfig).args(arguments).output().expect("helm starts")
}

/// Where Helm is.
///
/// # Panics
/// When there is none.
pub fn program() -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|folder| folder.join("helm"));
    env::var_os("HELM_BIN")
        .map(PathBuf::from)
        .into_iter()
        .chain(in_path)
        .chain([cache().join(format!("helm-{VERSION}/helm"))])
        .find(|path| path.is_file())
        .expect("no helm: run make setup, or set HELM_BIN")
}

/// What `helm template` prints for a release `adit` in `namespace`.
///
/// # Errors
/// What Helm says when it refuses `more`, which are further arguments such as `--set`.
pub fn try_render(namespace: &str, more: &[&str]) -> Result<String, String> {
    let folder = folder();
    let arguments = ["template", "adit", folder.to_str().expect("a readable path"), "--namespace", namespace];
    let output = helm(&[&arguments, more].concat());
    if !output.status.success() {
        return Err(command::text(&output));
    }
    Ok(String::from_utf8(output.stdout).expect("UTF-8"))
}

/// The same where it must work.
///
/// # Panics
/// When Helm refuses it.
pub fn render(namespace: &str, more: &[&str]) -> String {
    try_render(namespace, more).unwrap_or_else(|said| panic!("helm template {more:?}: {said}"))
}

/// The objects of a manifest.
///
/// # Panics
/// When it is not YAML.
pub fn objects(manifest: &str) -> Vec<Value> {
    manifest
        .split("\n---\n")
        .map(|document| {
            serde_saphyr::from_str(document).unwrap_or_else(|error| panic!("{error}\n{document}"))
        })
        .filter(|object: &Value| !object.is_null())
        .collect()
}

/// One template of the chart as a manifest, for the namespace `adit-system`. The watcher's account
/// there is `adit-watcher` with profile `redirect-only`, else `ztunnel`.
pub fn template(profile: &str, name: &str, more: &[&str]) -> String {
    let (profile, path) = (format!("profile={profile}"), format!("templates/{name}"));
    render("adit-system", &[&["--set", &profile, "--show-only", &path], more].concat())
}
