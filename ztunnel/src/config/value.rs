//! One variable → one typed value.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use serde::Serializer;

/// Why the configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{key}={value:?}: expected {expected}")]
    Invalid { key: &'static str, value: String, expected: String },
    #[error("{key} is not set: expected {expected}")]
    Missing { key: &'static str, expected: &'static str },
    #[error("{key}={value:?}: {reason}")]
    NotSupported { key: &'static str, value: String, reason: &'static str },
}

impl ConfigError {
    pub(super) fn invalid(key: &'static str, value: &str, expected: impl Into<String>) -> Self {
        Self::Invalid { key, value: value.to_owned(), expected: expected.into() }
    }
}

/// The variables, empty ones left out: Helm templates often set what they do not fill.
#[derive(Debug)]
pub(super) struct Vars(BTreeMap<String, String>);

impl Vars {
    pub fn new(vars: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(vars.into_iter().filter(|(_, value)| !value.is_empty()).collect())
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    pub fn text(&self, key: &str, default: &str) -> Arc<str> {
        self.get(key).unwrap_or(default).into()
    }

    pub fn path(&self, key: &str, default: &str) -> PathBuf {
        self.get(key).unwrap_or(default).into()
    }

    /// What follows `prefix` in the keys that have it, with the values.
    pub fn with_prefix(&self, prefix: &str) -> BTreeMap<String, String> {
        self.0
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?.to_owned(), value.clone())))
            .collect()
    }

    pub fn optional_bool(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some("true" | "1") => Ok(Some(true)),
            Some("false" | "0") => Ok(Some(false)),
            Some(other) => Err(ConfigError::invalid(key, other, "true or false")),
        }
    }

    pub fn bool(&self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        Ok(self.optional_bool(key)?.unwrap_or(default))
    }

    /// The first choice is the default.
    pub fn one_of<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Result<T, ConfigError> {
        let Some(text) = self.get(key) else { return Ok(choices[0].1) };
        let choice = choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        choice.map(|(_, value)| *value).ok_or_else(|| {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            ConfigError::invalid(key, text, names.join(" or "))
        })
    }

    pub fn number(&self, key: &'static str) -> Result<Option<u32>, ConfigError> {
        let Some(text) = self.get(key) else { return Ok(None) };
        let number = match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => text.parse(),
        };
        number.map(Some).map_err(|_| ConfigError::invalid(key, text, "a number of 32 bits"))
    }

    /// 1 to `max`.
    pub fn positive(&self, key: &'static str, default: u32, max: u32) -> Result<u32, ConfigError> {
        match self.number(key)? {
            None => Ok(default),
            Some(number) if (1..=max).contains(&number) => Ok(number),
            Some(_) => {
                let text = self.get(key).unwrap_or_default();
                Err(ConfigError::invalid(key, text, format!("a number from 1 to {max}")))
            }
        }
    }

    pub fn duration(&self, key: &'static str, default: Duration) -> Result<Duration, ConfigError> {
        let Some(text) = self.get(key) else { return Ok(default) };
        parse_duration(text)
            .ok_or_else(|| ConfigError::invalid(key, text, "a duration such as 500ms, 30s, 5m or 1h30m"))
    }

    /// A bare number counts seconds.
    pub fn duration_or_seconds(&self, key: &'static str) -> Result<Option<Duration>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(text) => match text.parse() {
                Ok(seconds) => Ok(Some(Duration::from_secs(seconds))),
                Err(_) => self.duration(key, Duration::ZERO).map(Some),
            },
        }
    }

    /// `IP:port`, or `localhost:port`.
    pub fn address(&self, key: &'static str, default: SocketAddr) -> Result<SocketAddr, ConfigError> {
        let Some(text) = self.get(key) else { return Ok(default) };
        let address = match text.strip_prefix("localhost:") {
            Some(port) => port.parse().ok().map(|port| (Ipv4Addr::LOCALHOST, port).into()),
            None => text.parse().ok(),
        };
        address.ok_or_else(|| ConfigError::invalid(key, text, "an address and port such as 127.0.0.1:15000"))
    }
}

/// As Go writes them: `1h30m`, `250ms`. A unit is mandatory, except for 0.
fn parse_duration(text: &str) -> Option<Duration> {
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

/// Shows a duration as `30s` would be read.
pub(super) fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{}s", duration.as_secs_f64()))
}
