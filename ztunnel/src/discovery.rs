//! What there is, from a control plane: Envoy's delta discovery with Istio's resources (xDS).
//!
//! * [`client`]: calls the control plane, again and again
//! * [`delta`]: what is asked and answered on one stream, and what is held over several
//! * [`convert`]: one resource, checked as a whole

pub mod client;
mod convert;
mod delta;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use prost::Message as _;
use prost_types::Any;
use ztunnel_api::{
    security::Authorization,
    workload::{Address, address},
};

use crate::mesh::{Change, local_file::Defaults};

/// Workloads and services.
pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Policies.
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// What is known of the sender, and what its resources have in common.
#[derive(Debug)]
pub struct Sender {
    /// What resources may leave out.
    defaults: Defaults,
    texts: Texts,
}

impl Sender {
    pub fn new(defaults: Defaults) -> Self {
        Self { defaults, texts: Texts::default() }
    }

    /// Reads a resource. The error tells the sender what is wrong with it.
    pub fn read(&self, resource: &Any) -> Result<Change, String> {
        let undecodable = |error: prost::DecodeError| error.to_string();
        match resource.type_url.as_str() {
            ADDRESS => match Address::decode(&*resource.value).map_err(undecodable)?.r#type {
                Some(address::Type::Workload(sent)) => self.workload(sent).map(Change::Workload),
                Some(address::Type::Service(sent)) => self.service(sent).map(Change::Service),
                None => return Err("neither a workload nor a service".to_owned()),
            },
            AUTHORIZATION => {
                let sent = Authorization::decode(&*resource.value).map_err(undecodable)?;
                convert::policy(sent).map(Change::Policy)
            }
            other => return Err(format!("{other} was not asked for")),
        }
        .map_err(|refused| refused.to_string())
    }
}

/// Texts that many resources have in common, such as a namespace, each held once.
#[derive(Debug, Default)]
struct Texts(Mutex<HashSet<Arc<str>>>);

impl Texts {
    fn intern(&self, text: String) -> Arc<str> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get(text.as_str()) {
            return Arc::clone(known);
        }
        let text: Arc<str> = text.into();
        known.insert(Arc::clone(&text));
        text
    }

    /// Forgets what nobody uses any more.
    fn sweep(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|text| Arc::strong_count(text) > 1);
    }
}
