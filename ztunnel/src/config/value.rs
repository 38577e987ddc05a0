//! Text → one typed value.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use serde::Serializer;

use super::keys::ValueKind;

/// Whether `text` is a valid value of `kind`.
pub(super) fn fits(kind: ValueKind, text: &str) -> bool {
    match kind {
        ValueKind::Text | ValueKind::Path | ValueKind::Secret | ValueKind::Map => true,
        ValueKind::Bool => bool(text).is_some(),
        ValueKind::Choice(names) => names.iter().any(|name| name.eq_ignore_ascii_case(text)),
        ValueKind::Number { min, max } => number(text).is_some_and(|number| (min..=max).contains(&number)),
        ValueKind::Duration { min } => duration(text).is_some_and(|duration| duration >= min),
        ValueKind::DurationOrSeconds => duration_or_seconds(text).is_some(),
        ValueKind::Address => address(text).is_some(),
        ValueKind::Workers => workers(text, 1).is_some(),
    }
}

pub(super) fn bool(text: &str) -> Option<bool> {
    match text {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
}

pub(super) fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// `IP:port`, or `localhost:port`.
pub(super) fn address(text: &str) -> Option<SocketAddr> {
    match text.strip_prefix("localhost:") {
        Some(port) => Some((Ipv4Addr::LOCALHOST, port.parse().ok()?).into()),
        None => text.parse().ok(),
    }
}

/// A number, `N%` of the cores, or 0 for all of them.
pub(super) fn workers(text: &str, cores: usize) -> Option<usize> {
    let count = match text.strip_suffix('%') {
        Some(percent) => {
            let percent: usize = percent.parse().ok().filter(|percent| (1..=100).contains(percent))?;
            (cores * percent).div_ceil(100)
        }
        None => text.parse().ok()?,
    };
    match count {
        0 => Some(cores),
        1..=1024 => Some(count),
        _ => None,
    }
}

pub(super) fn duration_or_seconds(text: &str) -> Option<Duration> {
    text.parse().map(Duration::from_secs).ok().or_else(|| duration(text))
}

/// As Go writes them: `1h30m`, `250ms`. A unit is mandatory, except for 0.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = &rest[..rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len())];
        rest = &rest[unit.len()..];
        let millis = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 60 * 60 * 1000,
            _ => return None,
        };
        total = total.checked_add(Duration::from_millis(number.checked_mul(millis)?))?;
    }
    (!text.is_empty()).then_some(total)
}

/// Serializes a duration in the form in which it is read, such as `30s`.
pub(super) fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{}s", duration.as_secs_f64()))
}
