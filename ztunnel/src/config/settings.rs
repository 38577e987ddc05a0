//! What was set, and where: the file's keys, and the environment, which overrides them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;

use super::{
    keys::{ConfigKey, DefaultValue, KEYS, ValueKind, row},
    value,
};

/// Why the configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value that its key does not accept.
    #[error("{key}={value:?}: expected {expected}")]
    Invalid {
        /// The key, as the user wrote it.
        key: String,
        /// Its value; `(hidden)` for a secret.
        value: String,
        /// What it must be.
        expected: String,
    },
    /// A key that is required and not set.
    #[error("{key} is not set: expected {expected}")]
    Missing {
        /// The key, as the user wrote it.
        key: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A setting of Istio's tunnel that this one does not support and must not ignore.
    #[error("{key}={value:?}: {reason}")]
    NotSupported {
        /// The key, as the user wrote it.
        key: &'static str,
        /// Its value; `(hidden)` for a secret.
        value: String,
        /// Why.
        reason: &'static str,
    },
    /// A key in the file that is not in the table.
    #[error("{file}: unknown key {key}{}", nearest.map(|name| format!(", did you mean {name}?")).unwrap_or_default())]
    UnknownKey {
        /// The file.
        file: String,
        /// The key, as the user wrote it.
        key: String,
        /// A known key with a similar name.
        nearest: Option<&'static str>,
    },
    /// The file cannot be read.
    #[error("cannot read {file}")]
    Unreadable {
        /// The file.
        file: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not a YAML mapping.
    #[error("{file} is not a YAML mapping: {reason}")]
    NoMapping {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// More than one of the above, one per line.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Several(Vec<Self>),
}

/// Where the value of a key comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Not set.
    Default,
    /// Set in the file.
    File,
    /// Set by an environment variable.
    Environment,
}

/// One key with its effective value.
#[derive(Clone, Debug, Serialize)]
pub struct Effective {
    /// Name in the file.
    pub key: &'static str,
    /// Its environment variable: the one that has set it, if any has.
    pub variable: &'static str,
    /// `None`: not set, and no fixed default. Secrets show as `(hidden)`.
    pub value: Option<String>,
    /// Whether `value` hides a secret.
    #[serde(skip)]
    pub hidden: bool,
    /// Where the value comes from.
    pub origin: Origin,
}

const HIDDEN: &str = "(hidden)";

/// The values that were set. Empty ones count as not set, since Helm templates often set variables
/// without a value.
#[derive(Debug)]
pub(super) struct RawSettings {
    file: Option<String>,
    set: BTreeMap<&'static str, (Origin, Value)>,
    /// Which variable has set a key that has two.
    by: BTreeMap<&'static str, &'static str>,
}

#[derive(Debug)]
enum Value {
    Text(String),
    Map(BTreeMap<String, String>),
}

impl RawSettings {
    /// Reads `file`, if given, then `variables` over it. Reports all errors at once.
    pub(super) fn read(
        file: Option<&Path>,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut errors = Vec::new();
        let file_name = file.map(|path| path.display().to_string());
        let mut settings = Self { file: file_name, set: BTreeMap::new(), by: BTreeMap::new() };
        if let Some(path) = file {
            settings.read_file(path, &mut errors)?;
        }
        settings.read_variables(variables);
        settings.check(&mut errors);
        match errors.len() {
            0 => Ok(settings),
            1 => Err(errors.swap_remove(0)),
            _ => Err(ConfigError::Several(errors)),
        }
    }

    fn read_file(&mut self, path: &Path, errors: &mut Vec<ConfigError>) -> Result<(), ConfigError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { file: file.clone(), source })?;
        // `y`, `n` and `on` are names that a node may have, not booleans (as they are in YAML 1.1).
        let options = serde_saphyr::options! { strict_booleans: true };
        let document: Option<serde_json::Value> = serde_saphyr::from_str_with_options(&text, options)
            .map_err(|error| ConfigError::NoMapping { file: file.clone(), reason: error.to_string() })?;
        match document.unwrap_or_default() {
            serde_json::Value::Null => Ok(()),
            serde_json::Value::Object(section) => {
                self.read_section(&file, "", section, errors);
                Ok(())
            }
            other => Err(ConfigError::NoMapping { file, reason: format!("it holds {other}") }),
        }
    }

    fn read_section(
        &mut self,
        file: &str,
        prefix: &str,
        section: serde_json::Map<String, serde_json::Value>,
        errors: &mut Vec<ConfigError>,
    ) {
        for (name, value) in section {
            let name = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            let row = KEYS.iter().find(|key| key.name == name);
            let is_section = || KEYS.iter().any(|key| starts_section(key.name, &name));
            match (row, value) {
                (_, serde_json::Value::Null) if row.is_some() || is_section() => {}
                (Some(ConfigKey { kind: ValueKind::Map, name, .. }), serde_json::Value::Object(map)) => {
                    let text = |(name, value)| scalar(&value).map(|value| (name, value));
                    match map.into_iter().map(text).collect::<Option<_>>() {
                        Some(map) => drop(self.set.insert(name, (Origin::File, Value::Map(map)))),
                        None => errors.push(in_file(file, name, HIDDEN, ValueKind::Map)),
                    }
                }
                (Some(key), value) => match scalar(&value) {
                    Some(text) if key.kind != ValueKind::Map => {
                        if !text.is_empty() {
                            self.set.insert(key.name, (Origin::File, Value::Text(text)));
                        }
                    }
                    _ if key.kind == ValueKind::Map || key.kind == ValueKind::Secret => {
                        errors.push(in_file(file, key.name, HIDDEN, key.kind));
                    }
                    _ => errors.push(in_file(file, key.name, &value.to_string(), key.kind)),
                },
                (None, serde_json::Value::Object(section)) if is_section() => {
                    self.read_section(file, &name, section, errors);
                }
                (None, value) if is_section() => errors.push(ConfigError::Invalid {
                    key: format!("{file}: {name}"),
                    value: value.to_string(),
                    expected: "a section with keys".to_owned(),
                }),
                (None, _) => {
                    let nearest = nearest(&name);
                    errors.push(ConfigError::UnknownKey { file: file.to_owned(), key: name, nearest });
                }
            }
        }
    }

    fn read_variables(&mut self, variables: impl IntoIterator<Item = (String, String)>) {
        let is_map = |key: &&ConfigKey| key.kind == ValueKind::Map;
        let variables: BTreeMap<_, _> = variables.into_iter().filter(|(_, text)| !text.is_empty()).collect();
        for key in KEYS.iter().filter(|key| !is_map(key)) {
            let found = key.variables().find_map(|name| Some((name, variables.get(name)?)));
            if let Some((name, text)) = found {
                self.set.insert(key.name, (Origin::Environment, Value::Text(text.clone())));
                self.by.insert(key.name, name);
            }
        }
        // Also those that set a key of their own: Istio's control plane expects every `ISTIO_META_*`
        // in the metadata.
        for (variable, text) in variables {
            let of = |key: &'static ConfigKey| Some((key, variable.strip_prefix(key.variable)?.to_owned()));
            if let Some((key, name)) = KEYS.iter().filter(is_map).find_map(of) {
                let entry = self.set.entry(key.name).or_insert((Origin::File, Value::Map(BTreeMap::new())));
                entry.0 = Origin::Environment;
                if let Value::Map(map) = &mut entry.1 {
                    map.insert(name, text);
                }
            }
        }
    }

    fn check(&self, errors: &mut Vec<ConfigError>) {
        for (name, (_, value)) in &self.set {
            let key = row(name);
            if let Value::Text(text) = value
                && !value::fits(key.kind, text)
            {
                errors.push(self.invalid(name, key.kind.expectation()));
            }
        }
    }

    /// The key as the user wrote it: the variable's name, or file and key.
    pub(super) fn written_as(&self, name: &str) -> String {
        match (self.set.get(name), &self.file) {
            (Some((Origin::File, _)), Some(file)) => format!("{file}: {name}"),
            _ => self.by.get(name).copied().unwrap_or_else(|| row(name).variable).to_owned(),
        }
    }

    /// The error for a value of `name` that is not as expected.
    pub(super) fn invalid(&self, name: &str, expected: impl Into<String>) -> ConfigError {
        let value =
            if row(name).kind == ValueKind::Secret { HIDDEN } else { self.get(name).unwrap_or_default() };
        ConfigError::Invalid {
            key: self.written_as(name),
            value: value.to_owned(),
            expected: expected.into(),
        }
    }

    /// The value that was set, without the default.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        match self.set.get(row(name).name) {
            Some((_, Value::Text(text))) => Some(text),
            _ => None,
        }
    }

    /// The value that was set, or the default.
    fn or_default(&self, name: &str) -> Option<&str> {
        self.get(name).or_else(|| match row(name).default {
            DefaultValue::Is(text) => Some(text),
            DefaultValue::Depends(_) | DefaultValue::Nothing => None,
        })
    }

    /// Parses a value that [`check`](Self::check) has accepted.
    fn checked<T>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Result<Option<T>, ConfigError> {
        let Some(text) = self.or_default(name) else { return Ok(None) };
        let parsed = parse(text).ok_or_else(|| self.invalid(name, row(name).kind.expectation()))?;
        Ok(Some(parsed))
    }

    fn required<T>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T, ConfigError> {
        let missing = || ConfigError::Missing { key: self.written_as(name), expected: row(name).about };
        self.checked(name, parse)?.ok_or_else(missing)
    }

    pub(super) fn text(&self, name: &str) -> Arc<str> {
        self.or_default(name).unwrap_or_default().into()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.or_default(name).unwrap_or_default().into()
    }

    pub(super) fn bool(&self, name: &str) -> Result<bool, ConfigError> {
        self.required(name, value::bool)
    }

    pub(super) fn optional_bool(&self, name: &str) -> Result<Option<bool>, ConfigError> {
        self.checked(name, value::bool)
    }

    /// One of the row's choices, in its spelling.
    pub(super) fn choice(&self, name: &str) -> Result<&'static str, ConfigError> {
        let ValueKind::Choice(names) = row(name).kind else { return Ok("") };
        self.required(name, |text| names.iter().find(|choice| choice.eq_ignore_ascii_case(text)).copied())
    }

    pub(super) fn number(&self, name: &str) -> Result<u32, ConfigError> {
        self.required(name, value::number)
    }

    pub(super) fn optional_number(&self, name: &str) -> Result<Option<u32>, ConfigError> {
        self.checked(name, value::number)
    }

    pub(super) fn duration(&self, name: &str) -> Result<Duration, ConfigError> {
        self.required(name, value::duration)
    }

    pub(super) fn optional_duration(&self, name: &str) -> Result<Option<Duration>, ConfigError> {
        let seconds_too = row(name).kind == ValueKind::DurationOrSeconds;
        self.checked(name, if seconds_too { value::duration_or_seconds } else { value::duration })
    }

    pub(super) fn address(&self, name: &str) -> Result<Option<SocketAddr>, ConfigError> {
        self.checked(name, value::address)
    }

    pub(super) fn map(&self, name: &str) -> BTreeMap<String, String> {
        match self.set.get(name) {
            Some((_, Value::Map(map))) => map.clone(),
            _ => BTreeMap::new(),
        }
    }

    /// Every key with its effective value.
    pub(super) fn effective(&self) -> Vec<Effective> {
        KEYS.iter().map(|key| self.effective_key(key)).collect()
    }

    fn effective_key(&self, key: &'static ConfigKey) -> Effective {
        let (origin, value) = match self.set.get(key.name) {
            Some((origin, Value::Map(map))) => {
                let names: Vec<_> = map.keys().map(String::as_str).collect();
                (*origin, Some(names.join(" ")))
            }
            Some((origin, Value::Text(text))) => (*origin, Some(text.clone())),
            None => (Origin::Default, self.or_default(key.name).map(str::to_owned)),
        };
        // The path of a secret is not secret.
        let hidden = match &value {
            Some(value) => {
                key.kind == ValueKind::Map || key.kind == ValueKind::Secret && !value.contains('/')
            }
            None => false,
        };
        let value = value.map(|value| match hidden {
            true if key.kind == ValueKind::Map => format!("{value} {HIDDEN}"),
            true => HIDDEN.to_owned(),
            false => value,
        });
        let variable = self.by.get(key.name).copied().unwrap_or(key.variable);
        Effective { key: key.name, variable, value, hidden, origin }
    }
}

fn starts_section(name: &str, section: &str) -> bool {
    name.strip_prefix(section).is_some_and(|rest| rest.starts_with('.'))
}

fn scalar(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Bool(_) | serde_json::Value::Number(_) => Some(value.to_string()),
        _ => None,
    }
}

fn in_file(file: &str, name: &str, value: &str, kind: ValueKind) -> ConfigError {
    let key = format!("{file}: {name}");
    ConfigError::Invalid { key, value: value.to_owned(), expected: kind.expectation() }
}

/// The most similar known key, if one is similar enough. Compares with the names of the variables
/// too.
fn nearest(name: &str) -> Option<&'static str> {
    let likeness = |key: &ConfigKey| {
        let last = key.name.rsplit('.').next().unwrap_or(key.name);
        strsim::jaro_winkler(key.name, name)
            .max(key.variables().map(|variable| strsim::jaro_winkler(variable, name)).fold(0.0, f64::max))
            .max(strsim::jaro_winkler(last, name) * 0.95)
    };
    let best = KEYS.iter().map(|key| (likeness(key), key)).max_by(|a, b| a.0.total_cmp(&b.0));
    best.filter(|(likeness, _)| *likeness > 0.8).map(|(_, key)| key.name)
}
