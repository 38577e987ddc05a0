//! What should be: the pods of this node and how each is to be treated.
//!
//! * [`pods_file`]: reads the pods from a file
//! * [`exclusions`]: ports and ranges of addresses that are left alone
//! * [`selection`]: whether a pod is enrolled

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use self::exclusions::Exclusions;

pub mod exclusions;
pub mod pods_file;
pub mod selection;

/// What happens to an enrolled pod's traffic while no tunnel serves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// It is refused.
    #[default]
    Closed,
    /// It passes in clear.
    Open,
}

/// A pod, by whatever source it became known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// The pod's directory in the cgroup2 tree; its containers' are below.
    pub cgroup: PathBuf,
    pub labels: BTreeMap<String, String>,
    /// `None`: the node's default.
    pub fail_mode: Option<FailMode>,
    /// Addresses that the pod's netns must hold; empty: whatever it holds.
    pub addresses: BTreeSet<IpAddr>,
    pub exclusions: Exclusions,
    /// What was wrong with an exclusion and is therefore ignored.
    pub notes: Vec<String>,
}
