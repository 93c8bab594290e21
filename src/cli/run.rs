//! `pintle run`: the agent.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use super::{CliError, Exit};
use crate::config::{Config, Flags};
use crate::node::{self, Until};
use crate::proxy::ActivatedSockets;
use crate::telemetry::{Format, Log, Telemetry};
use crate::world::LockFile;

/// The arguments of `pintle run`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Exit once everything in the configuration is installed, and no old key is left
    #[arg(long)]
    once: bool,
    /// With --once: exit after this time at the latest, such as 90s or 10m, and report what is missing
    #[arg(long, value_name = "DURATION", requires = "once", value_parser = duration)]
    timeout: Option<Duration>,
    /// Log format
    #[arg(long, value_enum, default_value = "auto")]
    log_format: Format,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let config = Config::load(&self.flags)?;
        keep_secrets_in_memory();
        let _lock = lock_state_directory(&config.node.state_dir)?;
        let until = if self.once { Until::Installed { timeout: self.timeout } } else { Until::Stopped };
        // Before there are threads, and the log is one: it changes the environment.
        let activated = ActivatedSockets::from_environment().map_err(|error| {
            CliError::new(
                Exit::Problem,
                format!("a socket of the service manager cannot be used: {error}"),
                "only TCP and unix stream listeners may be passed",
            )
        })?;
        let log = Log::new(self.log_format).map_err(|error| {
            CliError::new(Exit::Problem, format!("cannot start the log's thread: {error}"), "check ulimit -u")
        })?;
        let telemetry = Telemetry::new(log);
        let outcome = super::runtime()?.block_on(async {
            let stopped = node::stopped_by_signals()?;
            node::serve(config, &telemetry, until, stopped, activated).await
        });
        telemetry.flush();
        outcome?;
        Ok(Exit::Ok)
    }
}

/// Parses a duration such as "90s" or "1h 30m".
fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration =
        text.parse().map_err(|_| format!("{text:?} is not a duration such as 90s or 10m"))?;
    Duration::try_from(parsed).map_err(|_| "a timeout cannot be negative".to_owned())
}

/// Keys must not be readable from a core dump, or by another process of the same user.
fn keep_secrets_in_memory() {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    // A sandbox that denies this has already set the limit itself.
    let _ = setrlimit(Resource::Core, none);
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Creates the state directory and locks it. Two agents on one directory would rotate each other's certificates.
pub(super) fn lock_state_directory(directory: &Path) -> Result<LockFile, CliError> {
    let unusable = |error: std::io::Error| {
        CliError::new(
            Exit::Problem,
            format!("the state directory {} cannot be used: {error}", directory.display()),
            "run pintle as its owner, or specify another with --state-dir",
        )
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(unusable)?;
    let lock = LockFile::open(&directory.join("lock")).map_err(unusable)?;
    let metadata = std::fs::metadata(directory).map_err(unusable)?;
    check_owner(metadata.uid()).map_err(unusable)?;
    check_mode(directory, metadata.mode() & 0o7777)?;
    match lock.try_lock().map_err(unusable)? {
        true => Ok(lock),
        false => Err(CliError::new(
            Exit::Problem,
            format!("another pintle is running with the state directory {}", directory.display()),
            "check pintle status, or use another --state-dir and --cert-dir",
        )),
    }
}

fn check_owner(owner: u32) -> std::io::Result<()> {
    let user = rustix::process::geteuid().as_raw();
    if owner == user {
        return Ok(());
    }
    let detail = format!("it belongs to user {owner}, and this process runs as user {user}");
    Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, detail))
}

/// Another user with write permission could replace the agent's journal.
fn check_mode(directory: &Path, mode: u32) -> Result<(), CliError> {
    if mode & 0o022 == 0 {
        return Ok(());
    }
    let path = directory.display();
    Err(CliError::new(
        Exit::Problem,
        format!("the state directory {path} cannot be used: other users may write to it (mode {mode:04o})"),
        format!("check that nobody else has put files there, then: chmod 0700 {path}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_must_not_be_a_link_or_writable_by_others() {
        let directory = tempfile::tempdir().expect("a directory");
        let (state, other) = (directory.path().join("state"), directory.path().join("other"));
        std::fs::write(&other, "kept").expect("written");
        std::fs::create_dir(&state).expect("made");
        std::os::unix::fs::symlink(&other, state.join("lock")).expect("linked");
        assert!(lock_state_directory(&state).is_err());
        assert_eq!(std::fs::read_to_string(&other).expect("readable"), "kept");
        std::fs::remove_file(state.join("lock")).expect("removed");
        drop(lock_state_directory(&state).expect("locked"));
        std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("changed");
        assert!(lock_state_directory(&state).is_err_and(|error| error.detail.contains("0777")));
    }
}
