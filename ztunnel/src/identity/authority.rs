//! What both certificate authorities have in common.

use std::pin::Pin;

use super::{Credentials, Identity, IdentityError};

pub(super) type Issuing = Pin<Box<dyn Future<Output = Result<Credentials, IdentityError>> + Send>>;

/// Signs certificates.
pub(super) trait Authority: Send + Sync {
    fn issue(&self, identity: &Identity) -> Issuing;
}
