//! The log: its format, and its filter, which can change at run time.

pub(crate) mod line;

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    layer::SubscriberExt,
    reload::{self, Handle},
    util::{SubscriberInitExt, TryInitError},
};

use self::line::BoundedLines;
use crate::{config::LogFormat, metrics::log::LostLogLines};

/// Reads and changes the filter of the log.
#[derive(Clone, Debug)]
pub struct Logging {
    filter: Handle<EnvFilter, Registry>,
    initial: Arc<str>,
}

/// Lines that may wait to be written: some megabytes, and 64 MiB if each is as long as it may be.
const MAX_QUEUED_LINES: usize = 16 << 10;

/// Lines are written no more often than this, together. Waking the writing thread and writing costs
/// about as much as all else that a line costs.
const COLLECT: Duration = Duration::from_millis(5);

/// Writes early when so many bytes are there.
const BATCH: usize = 64 << 10;

/// Writes what comes within a moment at once. For a thread that does nothing else: it sleeps.
struct Batches<W> {
    sink: W,
    lines: Vec<u8>,
    written: Option<Instant>,
}

impl<W: io::Write> Batches<W> {
    fn new(sink: W) -> Self {
        Self { sink, lines: Vec::with_capacity(BATCH), written: None }
    }

    fn write_out(&mut self) -> io::Result<()> {
        let written = self.sink.write_all(&self.lines).and_then(|()| self.sink.flush());
        // What a sink did not take is not tried again: it may have taken a part.
        self.lines.clear();
        self.written = Some(Instant::now());
        written
    }
}

impl<W: io::Write> io::Write for Batches<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.lines.extend_from_slice(line);
        if self.lines.len() >= BATCH {
            self.write_out()?;
        }
        Ok(line.len())
    }

    /// Called when no line waits. A lone one is written at once; while more come, they find this thread
    /// awake.
    fn flush(&mut self) -> io::Result<()> {
        if self.lines.is_empty() {
            return Ok(());
        }
        if let Some(written) = self.written {
            thread::sleep(COLLECT.saturating_sub(written.elapsed()));
        }
        self.write_out()
    }
}

/// Owns the thread that writes the log: dropping it writes what is queued and ends the thread.
#[derive(Debug)]
pub struct LogWriter {
    /// For the metrics.
    pub lost: LostLogLines,
    _guard: WorkerGuard,
}

/// A writer to `sink` that never blocks.
fn non_blocking(sink: impl io::Write + Send + 'static) -> (NonBlocking, LogWriter) {
    let (writer, guard) = NonBlockingBuilder::default().buffered_lines_limit(MAX_QUEUED_LINES).finish(sink);
    let lost = LostLogLines(writer.error_counter());
    (writer, LogWriter { lost, _guard: guard })
}

/// Why the log cannot be set up, or a filter cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// A directive that cannot be parsed.
    #[error("invalid log filter {filter:?}")]
    Filter {
        /// The directives.
        filter: String,
        /// The cause.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The process has a subscriber already.
    #[error("cannot set up the log")]
    Init(#[from] TryInitError),
    /// The subscriber is gone.
    #[error("the log has ended")]
    Ended(#[from] reload::Error),
}

impl Logging {
    /// Writes the records of this process to standard output, from a thread of its own, so that
    /// logging never blocks on the disk or pipe behind it. When more than 16,384 lines are queued,
    /// further lines are dropped and counted. A line has 4,096 bytes at most.
    ///
    /// # Errors
    /// [`LoggingError::Filter`] for a filter that cannot be parsed, [`LoggingError::Init`] when
    /// called twice.
    pub fn init(format: LogFormat, filter: &str) -> Result<(Self, LogWriter), LoggingError> {
        let (layer, logging) = Self::filtered(filter)?;
        let (writer, log_writer) = non_blocking(Batches::new(io::stdout()));
        let registry = tracing_subscriber::registry().with(layer);
        let bounded = move || BoundedLines { writer: writer.clone(), format };
        let writer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(bounded);
        match format {
            LogFormat::Text => registry.with(writer).try_init()?,
            LogFormat::Json => registry.with(writer.json().flatten_event(true)).try_init()?,
        }
        Ok((logging, log_writer))
    }

    fn filtered(filter: &str) -> Result<(impl Layer<Registry>, Self), LoggingError> {
        let (layer, handle) = reload::Layer::new(parse(filter)?);
        Ok((layer, Self { filter: handle, initial: filter.into() }))
    }

    /// Not connected to a subscriber.
    #[cfg(test)]
    pub(crate) fn for_tests(filter: &str) -> Self {
        let (layer, logging) = Self::filtered(filter).unwrap();
        std::mem::forget(layer); // its handle is weak
        logging
    }

    /// Adds directives to the filter; they replace earlier ones for the same target. `debug` alone
    /// sets the level of all targets that have no directive. An empty string changes nothing.
    ///
    /// # Errors
    /// [`LoggingError::Filter`] if a directive cannot be parsed; the filter is then unchanged.
    pub fn add(&self, directives: &str) -> Result<(), LoggingError> {
        if directives.is_empty() {
            return Ok(());
        }
        // Parsed by itself first, so that the error names the new directives.
        parse(directives)?;
        self.set(&format!("{},{directives}", self.current()?))
    }

    /// Replaces the filter, such as `info` or `debug,h2=warn`.
    ///
    /// # Errors
    /// [`LoggingError::Filter`] if it cannot be parsed; the filter is then unchanged.
    pub fn set(&self, filter: &str) -> Result<(), LoggingError> {
        Ok(self.filter.reload(parse(filter)?)?)
    }

    /// Restores the filter of the start.
    ///
    /// # Errors
    /// [`LoggingError::Ended`] after the subscriber is gone.
    pub fn reset(&self) -> Result<(), LoggingError> {
        self.set(&self.initial)
    }

    /// The filter in force.
    ///
    /// # Errors
    /// [`LoggingError::Ended`] after the subscriber is gone.
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
    fn a_filter_can_be_changed_and_reset_and_an_invalid_one_is_refused() {
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

    #[test]
    fn lines_of_a_moment_are_written_together_and_none_stays() {
        #[derive(Clone, Default)]
        struct Writes(Arc<std::sync::Mutex<Vec<String>>>);
        impl io::Write for Writes {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().push(String::from_utf8(bytes.to_vec()).unwrap());
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = Writes::default();
        let (mut writer, log_writer) = non_blocking(Batches::new(sink.clone()));
        for line in 0..10_000 {
            io::Write::write_all(&mut writer, format!("{line}\n").as_bytes()).unwrap();
        }
        drop(log_writer);
        let calls = sink.0.lock().unwrap();
        assert!(calls.len() < 100, "{} writes", calls.len());
        let all: Vec<_> = calls.iter().flat_map(|text| text.lines()).collect();
        assert!(all.iter().enumerate().all(|(n, line)| *line == n.to_string()) && all.len() == 10_000);
    }

    /// Like a pipe without a reader.
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
    fn a_blocked_sink_blocks_no_writer_and_lost_lines_are_counted() {
        let (unstick, stuck) = std::sync::mpsc::channel();
        let (mut writer, log_writer) = non_blocking(Stuck(stuck));
        for _ in 0..MAX_QUEUED_LINES + 100 {
            io::Write::write_all(&mut writer, b"line\n").unwrap();
        }
        let lost = log_writer.lost.0.dropped_lines();
        // The writing thread may have taken one from the queue.
        assert!((99..=100).contains(&lost), "{lost}");
        drop(unstick);
    }
}
