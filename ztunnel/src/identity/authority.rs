//! Whoever signs certificates, as those who want one see it.

use std::pin::Pin;

use super::{Credentials, Identity, IdentityError};

pub(super) type Issuing = Pin<Box<dyn Future<Output = Result<Credentials, IdentityError>> + Send>>;

/// Whoever signs certificates.
pub(super) trait Authority: Send + Sync {
    fn issue(&self, identity: &Identity) -> Issuing;
}
