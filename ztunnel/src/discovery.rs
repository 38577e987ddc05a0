//! What there is, from a control plane: Envoy's delta discovery with Istio's resources (xDS).
//!
//! * [`client`]: calls the control plane, again and again
//! * [`delta`]: what is asked and answered on one stream, and what is held over several
//! * [`demand`]: what is asked for only when a connection needs it
//! * [`convert`]: one resource, checked as a whole

pub mod client;
mod convert;
pub mod delta;
pub mod demand;

use std::{
    borrow::Borrow,
    collections::HashSet,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use prost::Message as _;
use prost_types::Any;
use ztunnel_api::{
    security::Authorization,
    workload::{Address, address},
};

use crate::mesh::{Change, local_file::Defaults, workloads::Common};

/// Workloads and services.
pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Policies.
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// What is known of the sender, and what its resources have in common.
#[derive(Debug)]
pub struct Sender {
    /// What resources may leave out.
    defaults: Defaults,
    texts: Pool<str>,
    commons: Pool<Common>,
}

impl Sender {
    pub fn new(defaults: Defaults) -> Self {
        Self { defaults, texts: Pool::default(), commons: Pool::default() }
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

/// What many resources have in common, such as a namespace's name, each held once.
#[derive(Debug)]
struct Pool<T: ?Sized>(Mutex<Known<T>>);

#[derive(Debug)]
struct Known<T: ?Sized> {
    all: HashSet<Arc<T>>,
    /// How many there may be before those that nobody uses any more are looked for.
    sweep_at: usize,
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::new(Known { all: HashSet::new(), sweep_at: SMALL_POOL }))
    }
}

/// What is not worth sweeping.
const SMALL_POOL: usize = 1024;

impl<T: ?Sized + Hash + Eq> Pool<T> {
    fn shared(&self, one: impl Borrow<T> + Into<Arc<T>>) -> Arc<T> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.all.get(one.borrow()) {
            return Arc::clone(known);
        }
        if known.all.len() >= known.sweep_at {
            known.all.retain(|one| Arc::strong_count(one) > 1);
            // Doubled, so that each addition pays for a constant share of the sweeps.
            known.sweep_at = SMALL_POOL.max(known.all.len() * 2);
        }
        let one = one.into();
        known.all.insert(Arc::clone(&one));
        one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_ones_are_one_and_what_nobody_uses_is_forgotten() {
        let pool = Pool::<str>::default();
        let kept = pool.shared("kept".to_owned());
        assert!(Arc::ptr_eq(&kept, &pool.shared("kept".to_owned())));
        for number in 0..5 * SMALL_POOL {
            pool.shared(number.to_string());
        }
        assert!(pool.0.lock().unwrap().all.len() <= SMALL_POOL);
        assert!(Arc::ptr_eq(&kept, &pool.shared("kept".to_owned())));
    }
}
