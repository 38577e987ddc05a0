//! Parsers for values that the document contains as text.

use std::{collections::BTreeMap, fmt::Display, str::FromStr};

use super::{LocalFileError, invalid};

pub(super) fn from_text<T: FromStr<Err: Display>>(
    object: &str,
    key: &'static str,
    text: &str,
) -> Result<T, LocalFileError> {
    text.parse().map_err(|error| invalid(object, key, format!("{text:?}: {error}")))
}

pub(super) fn keys<K: FromStr<Err: Display> + Ord, V>(
    object: &str,
    key: &'static str,
    map: BTreeMap<String, V>,
) -> Result<BTreeMap<K, V>, LocalFileError> {
    map.into_iter().map(|(name, value)| Ok((from_text(object, key, &name)?, value))).collect()
}

pub(super) fn or(text: String, default: impl FnOnce() -> String) -> String {
    if text.is_empty() { default() } else { text }
}
