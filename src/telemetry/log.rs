//! The log: sentences on a terminal, JSON lines elsewhere.

use std::io::{IsTerminal, Write};

use pintle_agent_core::text::printable;
use serde::Serialize;

use super::{Event, Level, Record};

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Sentences if standard error is a terminal, JSON otherwise.
    #[default]
    Auto,
    /// A time and a sentence.
    Human,
    /// One JSON object a line.
    Json,
}

/// Writes events to standard error.
pub struct Log {
    json: bool,
    /// Whether journald reads the lines: it understands a priority in front (sd-daemon(3)).
    journal: bool,
    silent: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    level: Level,
    message: String,
    /// The identity that the event is about; none if it is about the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<&'a str>,
    #[serde(flatten)]
    event: &'a Event,
}

impl Log {
    /// A log on standard error in this format.
    pub fn new(format: Format) -> Self {
        let json = match format {
            Format::Auto => !std::io::stderr().is_terminal(),
            Format::Human => false,
            Format::Json => true,
        };
        Self { json, journal: std::env::var_os("JOURNAL_STREAM").is_some(), silent: false }
    }

    /// A log that writes nothing, for the demo, which has its own way of showing events.
    pub fn silent() -> Self {
        Self { json: false, journal: false, silent: true }
    }

    /// Writes a line for this event; a sentence names its identity if there are several.
    pub fn write(&self, record: &Record, several: bool) {
        let Record { identity, event } = record;
        if self.silent {
            return;
        }
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
            // What others said must not look like a line of ours.
            let identity = identity.as_ref().filter(|_| several);
            let identity = identity.map(|identity| format!("{identity}: ")).unwrap_or_default();
            format!("{time} {mark}{identity}{}", printable(&message))
        };
        // A log that cannot be written is no reason to let a certificate end.
        let _ = writeln!(std::io::stderr().lock(), "{priority}{line}");
    }
}
