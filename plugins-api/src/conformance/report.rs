//! What came of the checks, as rows and as a table.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// What came of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The backend does what it must.
    Passed,
    /// It does not, and this is what it did instead: one line.
    Failed(String),
    /// It was not checked, for this reason: one line.
    Skipped(String),
}

/// One check.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was checked, in words.
    pub name: String,
    /// What came of it.
    pub outcome: Outcome,
    /// How long the whole check took; in JSON, seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
    /// How long the one call that the check is about took (the median of several where it was repeated), for checks
    /// that are about one call; in JSON, seconds.
    #[serde(serialize_with = "optional_seconds")]
    pub latency: Option<Duration>,
}

/// All checks of one run, in the order in which they were made.
///
/// Its `Display` is the table that `pintle backend check` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// One row per check.
    pub rows: Vec<Row>,
}

impl Report {
    /// Whether no check failed. Skipped ones do not count.
    pub fn passed(&self) -> bool {
        self.failures().next().is_none()
    }

    /// The checks that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| matches!(row.outcome, Outcome::Failed(_)))
    }

    /// For tests: panics with the whole table if a check failed.
    #[track_caller]
    pub fn assert_passed(&self) {
        assert!(self.passed(), "the backend does not conform\n{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).max(5);
        writeln!(formatter, "{:width$}  RESULT   LATENCY      TIME  DETAIL", "CHECK")?;
        for row in &self.rows {
            let (result, detail) = match &row.outcome {
                Outcome::Passed => ("passed", ""),
                Outcome::Failed(detail) => ("FAILED", detail.as_str()),
                Outcome::Skipped(reason) => ("skipped", reason.as_str()),
            };
            let latency = row.latency.map(brief).unwrap_or_else(|| "-".to_owned());
            let line = format!("{:width$}  {result:7}  {latency:>7}  {:>8}  {detail}", row.name, brief(row.duration));
            writeln!(formatter, "{}", line.trim_end())?;
        }
        let count = |wanted: fn(&Outcome) -> bool| self.rows.iter().filter(|row| wanted(&row.outcome)).count();
        write!(
            formatter,
            "{} passed, {} failed, {} skipped",
            count(|outcome| matches!(outcome, Outcome::Passed)),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
            count(|outcome| matches!(outcome, Outcome::Skipped(_))),
        )
    }
}

/// A duration in at most seven characters.
fn brief(duration: Duration) -> String {
    let microseconds = duration.as_secs_f64() * 1e6;
    if microseconds < 1_000.0 {
        format!("{microseconds:.0} µs")
    } else if microseconds < 1_000_000.0 {
        format!("{:.1} ms", microseconds / 1e3)
    } else {
        format!("{:.1} s", microseconds / 1e6)
    }
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

fn optional_seconds<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    duration.map(|duration| duration.as_secs_f64()).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let row = |name: &str, outcome, latency| Row {
            name: name.to_owned(),
            outcome,
            duration: Duration::from_millis(1500),
            latency,
        };
        Report {
            rows: vec![
                row("signs", Outcome::Passed, Some(Duration::from_micros(420))),
                row("deletes", Outcome::Failed("the key is still there".to_owned()), None),
                row("wrong PIN", Outcome::Skipped("no PIN".to_owned()), None),
            ],
        }
    }

    #[test]
    fn table_has_a_line_per_check_and_a_sum() {
        let table = report().to_string();
        assert_eq!(
            table,
            "CHECK      RESULT   LATENCY      TIME  DETAIL\n\
             signs      passed    420 µs     1.5 s\n\
             deletes    FAILED         -     1.5 s  the key is still there\n\
             wrong PIN  skipped        -     1.5 s  no PIN\n\
             1 passed, 1 failed, 1 skipped"
        );
    }

    #[test]
    #[should_panic(expected = "the key is still there")]
    fn assert_passed_shows_what_failed() {
        report().assert_passed();
    }
}
