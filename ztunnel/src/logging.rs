//! The log: its format, and its filter, which can be changed while running.

use std::{io, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter},
};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
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

/// Lines that may wait to be written: some megabytes.
const WAITING_LINES: usize = 16 << 10;

/// The thread that writes the log, as long as this lives.
#[derive(Debug)]
pub struct Written {
    /// For the metrics.
    pub lost: Lost,
    _guard: WorkerGuard,
}

/// A way to `sink` that never waits.
fn aside(sink: impl io::Write + Send + 'static) -> (NonBlocking, Written) {
    let (writer, guard) = NonBlockingBuilder::default().buffered_lines_limit(WAITING_LINES).finish(sink);
    let lost = Lost(writer.error_counter());
    (writer, Written { lost, _guard: guard })
}

/// Lines that found no place to wait: `ztunnel_log_lines_lost_total`.
#[derive(Clone, Debug)]
pub struct Lost(ErrorCounter);

impl Collector for Lost {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let counter = ConstCounter::new(u64::try_from(self.0.dropped_lines()).unwrap_or(u64::MAX));
        let help = "Log lines lost since writing them could not keep up";
        counter.encode(encoder.encode_descriptor(
            "ztunnel_log_lines_lost",
            help,
            None,
            MetricType::Counter,
        )?)
    }
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
    /// Writes the records of this process to standard output, from a thread of its own: whoever logs never waits for
    /// the disk or the pipe behind it. Past [`WAITING_LINES`] records are lost, and counted. What waits is written when
    /// the guard is dropped.
    pub fn init(format: LogFormat, filter: &str) -> Result<(Self, Written), LoggingError> {
        let (layer, logging) = Self::filtered(filter)?;
        let (writer, written) = aside(io::stdout());
        let registry = tracing_subscriber::registry().with(layer);
        let writer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(writer);
        match format {
            LogFormat::Text => registry.with(writer).try_init()?,
            LogFormat::Json => registry.with(writer.json().flatten_event(true)).try_init()?,
        }
        Ok((logging, written))
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

    /// Adds to the filter; what it says of the same part before no longer counts. `debug` alone is for all parts that
    /// are not named. Nothing changes nothing.
    pub fn add(&self, directives: &str) -> Result<(), LoggingError> {
        if directives.is_empty() {
            return Ok(());
        }
        // By itself first, so that the error names what was asked for.
        parse(directives)?;
        self.set(&format!("{},{directives}", self.current()?))
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
        logging.add("h2=error").unwrap();
        logging.add("debug").unwrap();
        assert_eq!(logging.current().unwrap(), "h2=error,debug");
    }

    /// Like a pipe that nobody reads.
    struct Stuck(std::sync::mpsc::Receiver<()>);

    impl io::Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_that_nobody_takes_holds_nobody_up_and_what_is_lost_is_counted() {
        let (unstick, stuck) = std::sync::mpsc::channel();
        let (mut writer, written) = aside(Stuck(stuck));
        for _ in 0..WAITING_LINES + 100 {
            io::Write::write_all(&mut writer, b"line\n").unwrap();
        }
        let lost = written.lost.0.dropped_lines();
        // One may be in the hands of the thread that writes.
        assert!((99..=100).contains(&lost), "{lost}");
        drop(unstick);
    }
}
