//! An error with its causes on one line, for the log, the access log and the admin page.

use std::{error::Error, iter::successors};

/// `error: its cause: the cause of that`.
///
/// By hand, since the crates for it (`display-error-chain`) write several lines, and a record of
/// the log is one.
pub(crate) fn error_chain(error: &dyn Error) -> String {
    let causes = successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read the token")]
    struct Unreadable(#[source] std::io::Error);

    #[test]
    fn every_cause_follows_its_effect() {
        let error = Unreadable(std::io::Error::other("disk"));
        assert_eq!(error_chain(&error), "cannot read the token: disk");
    }
}
