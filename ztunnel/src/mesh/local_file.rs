//! Reads the mesh from a document in the format of Istio's `LOCAL_XDS_PATH`: `workloads`,
//! `services` and `policies`.
//!
//! An unknown key is an error, because a misspelt policy protects nothing.

mod check;
mod entries;
mod policies;
mod services;

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Mesh, Store, Workload};
use crate::{
    config::{Config, LocalState},
    file_version::FileVersion,
};
use entries::Document;
use policies::PolicyEntry;
use services::ServiceEntry;

/// The interval at which the file is checked for edits. Polling also works if the file is replaced
/// by rename, or if it is a ConfigMap's symbolic link to another folder.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Why a document is rejected.
#[derive(Debug, thiserror::Error)]
pub enum LocalFileError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is not YAML of the right shape.
    #[error("not a valid document: {0}")]
    Yaml(#[from] Box<serde_saphyr::Error>),
    /// A value that cannot be used.
    #[error("{object}: {key}: {reason}")]
    Invalid {
        /// The workload, service or policy.
        object: String,
        /// Its key.
        key: &'static str,
        /// Why.
        reason: String,
    },
}

/// Values for fields that a document leaves out.
#[derive(Clone, Debug)]
pub struct ResourceDefaults {
    /// Trust domain of workloads without one.
    pub trust_domain: Arc<str>,
    /// Cluster of workloads without one.
    pub cluster_id: Arc<str>,
}

impl From<&Config> for ResourceDefaults {
    fn from(config: &Config) -> Self {
        Self { trust_domain: Arc::clone(&config.trust_domain), cluster_id: Arc::clone(&config.cluster_id) }
    }
}

/// The mesh from the configured file or text; empty if none is configured.
///
/// # Errors
/// The file cannot be read, or those of [`parse`].
pub fn load(config: &Config) -> Result<Mesh, LocalFileError> {
    match &config.local_state {
        None => Ok(Mesh::default()),
        Some(LocalState::Inline(document)) => parse(document, &config.into()),
        Some(LocalState::Path(path)) => parse(&read(path)?, &config.into()),
    }
}

/// Applies edits of the file to `store` until `stop`. An invalid edit is rejected as a whole, and
/// the last valid state stays active.
pub async fn watch(path: PathBuf, defaults: ResourceDefaults, store: Arc<Store>, stop: CancellationToken) {
    let mut seen = None;
    let mut text = String::new();
    while stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await.is_some() {
        let version = FileVersion::of(&path);
        if version == seen {
            continue;
        }
        match read(&path) {
            Ok(now) if now == text => {}
            Ok(now) => {
                text = now;
                apply(&path, &text, &defaults, &store);
            }
            Err(error) => {
                warn!(path = %path.display(), %error, "cannot read the mesh file; keeping the last one");
            }
        }
        // Taken before reading, so that a write in between shows as another version next time.
        seen = version;
    }
}

fn apply(path: &Path, text: &str, defaults: &ResourceDefaults, store: &Store) {
    match parse(text, defaults) {
        Ok(mesh) => {
            info!(
                path = %path.display(), workloads = mesh.workloads.len(), services = mesh.services.len(),
                policies = mesh.policies().count(), "mesh file applied"
            );
            store.replace(mesh);
        }
        Err(error) => warn!(path = %path.display(), %error, "mesh file refused; keeping the last valid one"),
    }
}

fn read(path: &Path) -> Result<String, LocalFileError> {
    std::fs::read_to_string(path).map_err(|source| LocalFileError::Read { path: path.to_owned(), source })
}

/// Parses a complete document.
///
/// # Errors
/// It is no YAML, has unknown keys, or an entry contradicts itself or another.
pub fn parse(document: &str, defaults: &ResourceDefaults) -> Result<Mesh, LocalFileError> {
    // An empty file is an empty mesh; serde would report a missing value.
    // A workload may be named `y`, `n` or `on`, which are booleans in YAML 1.1.
    let options = serde_saphyr::options! { strict_booleans: true };
    let document: Option<Document> =
        serde_saphyr::from_str_with_options(document, options).map_err(Box::new)?;
    let Document { workloads, services, policies } = document.unwrap_or_default();
    let policies = policies.into_iter().map(PolicyEntry::check).collect::<Result<Vec<_>, _>>()?;
    let services = services.into_iter().map(ServiceEntry::check).collect::<Result<Vec<_>, _>>()?;
    let workloads =
        workloads.into_iter().map(|workload| workload.check(defaults)).collect::<Result<Vec<_>, _>>()?;
    unique("workload", workloads.iter().map(|workload| workload.uid.to_string()))?;
    unique("service", services.iter().map(|service| service.key().to_string()))?;
    unique("policy", policies.iter().map(|policy| policy.key.to_string()))?;
    unique_addresses(&workloads)?;
    Ok(Mesh::new(workloads, services, policies))
}

fn unique(kind: &str, keys: impl Iterator<Item = String>) -> Result<(), LocalFileError> {
    let mut seen = HashSet::new();
    for key in keys {
        if !seen.insert(key.clone()) {
            return Err(invalid(format!("{kind} {key}"), "uid or name", "is given twice"));
        }
    }
    Ok(())
}

/// If two workloads had the same address, the identity would depend on their order.
fn unique_addresses(workloads: &[Workload]) -> Result<(), LocalFileError> {
    let mut owners = HashMap::new();
    for workload in workloads.iter().filter(|workload| !workload.host_network) {
        for ip in &workload.addresses {
            if let Some(other) = owners.insert((&workload.network, ip.to_canonical()), &workload.name) {
                let reason = format!("{ip} is also that of workload {other}");
                return Err(invalid(format!("workload {}", workload.name), "workloadIps", reason));
            }
        }
    }
    Ok(())
}

fn invalid(object: impl Into<String>, key: &'static str, reason: impl Into<String>) -> LocalFileError {
    LocalFileError::Invalid { object: object.into(), key, reason: reason.into() }
}

#[cfg(test)]
mod tests;
