//! When what was proved in a handshake is over. A connection may live much longer than the
//! certificates with which it began.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The wall clock is looked at so often: it jumps, and goes on while the node is suspended.
const LOOK_AGAIN: Duration = Duration::from_mins(1);

/// When the first of a peer's certificates expires. `None`: none of them can be read.
#[must_use]
pub fn first_expiry(certificates: Option<&[CertificateDer<'_>]>) -> Option<SystemTime> {
    let end = |der: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    };
    certificates.unwrap_or_default().iter().filter_map(end).min()
}

/// Resolves at `end`.
pub async fn until(end: SystemTime) {
    while let Ok(left) = end.duration_since(SystemTime::now())
        && !left.is_zero()
    {
        tokio::time::sleep(left.min(LOOK_AGAIN)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_time_that_has_passed_is_over_at_once() {
        until(SystemTime::now() - Duration::from_hours(1)).await;
        let later = SystemTime::now() + Duration::from_millis(20);
        until(later).await;
        assert!(SystemTime::now() >= later);
    }

    #[test]
    fn the_certificate_that_ends_first_counts() {
        let certificate = |year| {
            let mut params = rcgen::CertificateParams::new(["x".to_owned()]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            let key = rcgen::KeyPair::generate().unwrap();
            params.self_signed(&key).unwrap().der().clone()
        };
        let found = first_expiry(Some(&[certificate(2040), certificate(2039)])).unwrap();
        let since = found.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(since.as_secs(), 2_177_452_800, "the first of January 2039");
        assert_eq!(first_expiry(None), None);
    }
}
