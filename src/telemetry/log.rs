//! The log: sentences on a terminal, JSON lines otherwise.

use std::io::IsTerminal;
use std::time::Duration;

use pintle_agent_core::text::printable;
use serde::Serialize;

use super::lines::LineWriter;
use super::{Event, Level, Record};

/// The log's format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Sentences if standard error is a terminal, JSON otherwise.
    #[default]
    Auto,
    /// A time and a sentence.
    Human,
    /// One JSON object per line.
    Json,
}

/// How long the process waits at exit for the log to be written.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Writes events to standard error without blocking; see `LineWriter`.
pub struct Log {
    format: LineFormat,
    /// `None` if the log is disabled.
    writer: Option<LineWriter>,
}

#[derive(Clone, Copy)]
struct LineFormat {
    json: bool,
    /// Whether journald reads the lines and expects a priority prefix (sd-daemon(3)).
    journal: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    level: Level,
    message: String,
    /// The identity that the event is about; `None` if it is about the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<&'a str>,
    #[serde(flatten)]
    event: &'a Event,
}

impl Log {
    /// A log on standard error in this format.
    ///
    /// # Errors
    /// If its thread cannot be created.
    pub fn new(format: Format) -> std::io::Result<Self> {
        let json = match format {
            Format::Auto => !std::io::stderr().is_terminal(),
            Format::Human => false,
            Format::Json => true,
        };
        let format = LineFormat { json, journal: std::env::var_os("JOURNAL_STREAM").is_some() };
        let dropped = move |lines| {
            let event = Event::LogLinesDropped { lines };
            format.line(&Record { identity: None, event }, false)
        };
        Ok(Self { format, writer: Some(LineWriter::start(std::io::stderr(), dropped)?) })
    }

    /// A disabled log, for the demo, which prints events itself.
    pub fn silent() -> Self {
        Self { format: LineFormat { json: false, journal: false }, writer: None }
    }

    /// Queues a line for this event. A sentence starts with its identity if there are several.
    pub fn write(&self, record: &Record, several: bool) {
        if let Some(writer) = &self.writer {
            writer.write(self.format.line(record, several));
        }
    }

    /// Waits until every line is written, but at most a second. Call before the process exits.
    pub fn flush(&self) {
        if let Some(writer) = &self.writer {
            writer.flush(FLUSH_LIMIT);
        }
    }
}

impl LineFormat {
    fn line(self, record: &Record, several: bool) -> String {
        let Record { identity, event } = record;
        let time = crate::world::clock::now().to_string();
        let (level, message) = (event.level(), event.sentence());
        let priority = match (self.journal, level) {
            (false, _) => "",
            (true, Level::Error) => "<3>",
            (true, Level::Warning) => "<4>",
            (true, Level::Info) => "<6>",
        };
        let line = if self.json {
            serde_json::to_string(&Line { time, level, message, identity: identity.as_deref(), event })
                .unwrap_or_default()
        } else {
            let mark = match level {
                Level::Error => "error: ",
                Level::Warning => "warning: ",
                Level::Info => "",
            };
            // Text from outside must not be able to forge a log line.
            let identity = identity.as_ref().filter(|_| several);
            let identity = identity.map(|identity| format!("{identity}: ")).unwrap_or_default();
            format!("{time} {mark}{identity}{}", printable(&message))
        };
        format!("{priority}{line}")
    }
}
