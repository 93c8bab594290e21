//! The exit codes, which are an interface.

use std::process::ExitCode;

/// The outcome of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The command succeeded; for needs-renewal: the certificate is due.
    Ok,
    /// The command failed; for needs-renewal: the certificate is not due.
    Problem,
    /// The command line or configuration is invalid, or the object does not exist.
    Usage,
    /// For needs-renewal, where 1 has another meaning: the answer is unknown.
    Unknown,
}

/// Shown in `pintle --help`.
pub(super) const TABLE: &str = "Exit codes:
  0    success (needs-renewal: the certificate is due)
  1    failure; see the error (needs-renewal: the certificate is not due)
  2    invalid usage or configuration, or not found (needs-renewal: there is no certificate)
  255  needs-renewal only: the answer is unknown";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Ok => Self::SUCCESS,
            Exit::Problem => Self::from(1),
            Exit::Usage => Self::from(2),
            Exit::Unknown => Self::from(255),
        }
    }
}
