//! The exit codes, which are an interface.

use std::process::ExitCode;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It did what was asked; for needs-renewal: the certificate is due.
    Ok,
    /// It did not; for needs-renewal: the certificate is not due.
    Problem,
    /// It was asked in a way that makes no sense, or what it is about does not exist.
    Usage,
    /// For needs-renewal, whose 1 has a meaning: it did not find out.
    Unknown,
}

/// The table, as `pintle --help` shows it.
pub(super) const TABLE: &str = "Exit codes:
  0    done (needs-renewal: the certificate is due)
  1    not done, for the reason said (needs-renewal: the certificate is not due)
  2    wrong usage or configuration, or nothing there (needs-renewal: there is no certificate)
  255  needs-renewal only: it could not be found out";

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
