//! Which cryptography libraries of others use, such as those that speak to an API server.

use rustls::crypto::aws_lc_rs;

/// Chooses one. In a build of the whole workspace rustls has two, and asks for a choice.
pub fn choose() {
    // An earlier choice is the same.
    let _ = aws_lc_rs::default_provider().install_default();
}
