//! The log: its format, and its filter, which can be changed while running.

use std::sync::Arc;

use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    layer::SubscriberExt,
    reload::{self, Handle},
    util::{SubscriberInitExt, TryInitError},
};

use crate::config::LogFormat;

/// To see and change which records are written.
#[derive(Clone, Debug)]
pub struct Logging {
    filter: Handle<EnvFilter, Registry>,
    initial: Arc<str>,
}

/// Why a filter was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("{filter:?} is no filter")]
    Filter { filter: String, source: tracing_subscriber::filter::ParseError },
    #[error("cannot set the log up")]
    Init(#[from] TryInitError),
    #[error("the log has ended")]
    Ended(#[from] reload::Error),
}

impl Logging {
    /// Writes the records of this process to standard output.
    pub fn init(format: LogFormat, filter: &str) -> Result<Self, LoggingError> {
        let (layer, logging) = Self::filtered(filter)?;
        let registry = tracing_subscriber::registry().with(layer);
        let writer = tracing_subscriber::fmt::layer().with_ansi(false);
        match format {
            LogFormat::Text => registry.with(writer).try_init()?,
            LogFormat::Json => registry.with(writer.json().flatten_event(true)).try_init()?,
        }
        Ok(logging)
    }

    fn filtered(filter: &str) -> Result<(impl Layer<Registry>, Self), LoggingError> {
        let (layer, handle) = reload::Layer::new(parse(filter)?);
        Ok((layer, Self { filter: handle, initial: filter.into() }))
    }

    /// Filters nothing, but answers like one that does.
    #[cfg(test)]
    pub(crate) fn for_tests(filter: &str) -> Self {
        let (layer, logging) = Self::filtered(filter).unwrap();
        std::mem::forget(layer); // its handle is weak
        logging
    }

    /// Replaces the filter, such as `info` or `debug,h2=warn`.
    pub fn set(&self, filter: &str) -> Result<(), LoggingError> {
        Ok(self.filter.reload(parse(filter)?)?)
    }

    /// Back to what the process started with.
    pub fn reset(&self) -> Result<(), LoggingError> {
        self.set(&self.initial)
    }

    pub fn current(&self) -> Result<String, LoggingError> {
        Ok(self.filter.with_current(ToString::to_string)?)
    }
}

fn parse(filter: &str) -> Result<EnvFilter, LoggingError> {
    EnvFilter::try_new(filter).map_err(|source| LoggingError::Filter { filter: filter.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_can_be_changed_and_reset_and_nonsense_is_refused() {
        let (_layer, logging) = Logging::filtered("info,h2=warn").unwrap();
        logging.set("debug").unwrap();
        assert_eq!(logging.current().unwrap(), "debug");
        assert!(matches!(logging.set("h2=loud"), Err(LoggingError::Filter { .. })));
        assert_eq!(logging.current().unwrap(), "debug");
        logging.reset().unwrap();
        assert!(logging.current().unwrap().contains("h2=warn"));
    }
}
