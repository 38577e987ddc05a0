//! Revoked certificates, by their serial numbers, and the list that tunnels read of them (RFC 5280
//! §5). Pure.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    str::FromStr,
    time::Duration,
};

use k8s_openapi::jiff::Timestamp;
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use time::OffsetDateTime;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use super::{Authority, AuthorityError};

/// A certificate's serial number, written in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Serial(Vec<u8>);

/// A text that is no serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected up to 20 bytes in hexadecimal digits, such as 4a:3f:00 or 4A3F00")]
pub struct InvalidSerial;

impl FromStr for Serial {
    type Err = InvalidSerial;

    /// As OpenSSL and tunnels show it, with or without colons.
    fn from_str(text: &str) -> Result<Self, InvalidSerial> {
        let digits: String = text.chars().filter(|c| *c != ':').collect();
        let digits = digits.strip_prefix("0x").unwrap_or(&digits);
        let digits = if digits.len().is_multiple_of(2) { digits.to_owned() } else { format!("0{digits}") };
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(InvalidSerial);
        }
        let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| InvalidSerial);
        let bytes = (0..digits.len()).step_by(2).map(byte).collect::<Result<Vec<_>, _>>()?;
        match bytes.iter().position(|byte| *byte != 0) {
            Some(first) if bytes.len() - first <= 20 => Ok(Self(bytes[first..].to_vec())),
            _ => Err(InvalidSerial),
        }
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Serial numbers, and when each was revoked.
pub type Revoked = BTreeMap<Serial, Timestamp>;

/// As the Secret has it: a line for each. Lines that cannot be read are none.
pub(super) fn parse(text: &str) -> Revoked {
    let line = |line: &str| {
        let (serial, time) = line.split_once(' ')?;
        Some((serial.parse().ok()?, time.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

pub(super) fn written(revoked: &Revoked) -> String {
    let mut text = String::new();
    for (serial, time) in revoked {
        let _ = writeln!(text, "{serial} {time}");
    }
    text
}

/// The lists that tunnels are to read, if `published` are not those. One of another issuer stays for as
/// long as it says: before a rotation, that was ours. `life`: of the list, half of which it is good for.
///
/// # Errors
/// The certificate that signs may not sign lists.
pub(super) fn lists(
    authority: &Authority,
    revoked: &Revoked,
    published: &str,
    life: Duration,
) -> Result<Option<String>, AuthorityError> {
    let now = OffsetDateTime::now_utc();
    let (_, signer) = X509Certificate::from_der(authority.signer())
        .map_err(|error| AuthorityError::Unreadable { what: "the certificate", reason: error.to_string() })?;
    let wanted: Vec<&[u8]> = revoked.keys().map(|serial| &*serial.0).collect();
    let (mut others, mut is_current) = (String::new(), false);
    for list in pem::parse_many(published).unwrap_or_default() {
        let Ok((_, read)) = CertificateRevocationList::from_der(list.contents()) else { continue };
        let ends = read.next_update().map_or(now, |time| time.to_datetime());
        if read.issuer() == signer.subject() {
            let mut serials: Vec<&[u8]> =
                read.iter_revoked_certificates().map(|one| without_sign(one.raw_serial())).collect();
            serials.sort_unstable();
            is_current = serials == wanted && ends - now > life / 2;
        } else if ends > now {
            others.push_str(&pem::encode(&list));
        }
    }
    if is_current {
        return Ok(None);
    }
    let number = now.unix_timestamp_nanos().unsigned_abs().to_be_bytes();
    let list = CertificateRevocationListParams {
        this_update: now - Duration::from_mins(1),
        next_update: now + life,
        crl_number: SerialNumber::from_slice(without_sign(&number)),
        issuing_distribution_point: None,
        revoked_certs: revoked.iter().map(|(serial, time)| entry(serial, *time)).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    Ok(Some(list.signed_by(&authority.issuer)?.pem()? + &others))
}

fn entry(serial: &Serial, time: Timestamp) -> RevokedCertParams {
    RevokedCertParams {
        serial_number: SerialNumber::from_slice(&serial.0),
        revocation_time: OffsetDateTime::from_unix_timestamp(time.as_second())
            .unwrap_or(OffsetDateTime::UNIX_EPOCH),
        reason_code: None,
        invalidity_date: None,
    }
}

/// Of a positive number as ASN.1 has it.
fn without_sign(bytes: &[u8]) -> &[u8] {
    let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
    &bytes[first..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::new_root;

    const DAY: Duration = Duration::from_hours(24);

    fn revoked(serials: &[&str]) -> Revoked {
        serials.iter().map(|serial| (serial.parse().unwrap(), Timestamp::UNIX_EPOCH)).collect()
    }

    fn authority() -> Authority {
        let (certificate, key) = new_root("cluster.local").unwrap();
        Authority::from_pem(&certificate, &key, None).unwrap()
    }

    #[test]
    fn a_serial_number_is_read_as_others_write_it() {
        let serial = |text: &str| text.parse::<Serial>().map(|serial| serial.to_string());
        for text in ["4a3f00", "4A:3F:00", "0x4a3f00", "00:4a:3f:00"] {
            assert_eq!(serial(text).as_deref(), Ok("4a3f00"), "{text}");
        }
        assert_eq!(serial("7").as_deref(), Ok("07"));
        for text in ["", "0", "xyz", "4a 3f", "é", &"7".repeat(42)] {
            assert_eq!(serial(text), Err(InvalidSerial), "{text}");
        }
        let some = revoked(&["4a3f00", "ff"]);
        assert_eq!(parse(&format!("{}nonsense\nff\n", written(&some))), some);
    }

    #[test]
    fn a_list_is_made_anew_when_it_is_not_what_it_should_be() {
        let (ours, other) = (authority(), authority());
        let some = revoked(&["4a3f00", "ff00"]);
        let first = lists(&ours, &some, "", DAY).unwrap().unwrap();
        assert_eq!(lists(&ours, &some, &first, DAY).unwrap(), None, "it is that of any replica");
        assert!(lists(&ours, &some, &first, DAY * 3).unwrap().is_some(), "half of its life is over");
        assert!(lists(&ours, &revoked(&["4a3f00"]), &first, DAY).unwrap().is_some());
        assert!(lists(&ours, &Revoked::new(), "", DAY).unwrap().is_some(), "one about nobody is one, too");
        // After a rotation both are there.
        let both = lists(&other, &some, &first, DAY).unwrap().unwrap();
        assert_eq!(pem::parse_many(&both).unwrap().len(), 2);
        assert_eq!(lists(&other, &some, &both, DAY).unwrap(), None);
    }
}
