//! `pintle run`: the agent.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::{CliError, Exit};
use crate::agent::{Agent, Command, Parts, StartError, Until};
use crate::config::{Config, Flags};
use crate::control;
use crate::keys::{self, Keyring};
use crate::telemetry::{Format, Log, Telemetry};

/// The arguments of `pintle run`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// End as soon as a valid certificate is installed
    #[arg(long)]
    once: bool,
    /// How the log looks
    #[arg(long, value_enum, default_value = "auto")]
    log_format: Format,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let config = Config::load(&self.flags)?;
        keep_secrets_in_memory();
        let _lock = lock_state_directory(&config.state_dir)?;
        let until = if self.once { Until::Installed } else { Until::Stopped };
        let telemetry = Arc::new(Telemetry::new(Log::new(self.log_format)));
        super::runtime()?.block_on(async {
            let (stop, stopped) = watch::channel(false);
            stop_on_signals(stop).map_err(|error| CliError::new(Exit::Problem, error, ""))?;
            run_agent(config, telemetry, until, stopped).await
        })?;
        Ok(Exit::Ok)
    }
}

/// Runs the agent with its control socket: the demo does the same.
pub(crate) async fn run_agent(
    config: Config,
    telemetry: Arc<Telemetry>,
    until: Until,
    stopped: watch::Receiver<bool>,
) -> Result<(), CliError> {
    let keyring = Keyring::start(keys::openers(&config)).map_err(|error| {
        CliError::new(Exit::Problem, format!("a backend's thread cannot be started: {error}"), "see ulimit -u")
    })?;
    let (sender, commands) = mpsc::channel::<Command>(8);
    let socket = config.control_socket();
    control::serve(&socket, Arc::clone(&telemetry), sender).map_err(|error| {
        CliError::new(
            Exit::Problem,
            format!("the control socket {} cannot be made: {error}", socket.display()),
            "a socket's path has at most 107 octets; choose a shorter --state-dir",
        )
    })?;
    let agent = Agent::start(Parts { config, keyring, telemetry, commands })
        .await
        .map_err(|StartError { detail, hint }| CliError::new(Exit::Problem, detail, hint))?;
    agent.run(until, stopped).await;
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// Sends `true` at the first SIGTERM or SIGINT.
pub(crate) fn stop_on_signals(stop: watch::Sender<bool>) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = stop.send(true);
    });
    Ok(())
}

/// Keys must not reach a core dump, nor another process of the same user.
fn keep_secrets_in_memory() {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    // Where a sandbox forbids it, it has seen to it already.
    let _ = setrlimit(Resource::Core, none);
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Creates the state directory and locks it: two agents would rotate each other's certificates.
fn lock_state_directory(directory: &Path) -> Result<File, CliError> {
    let unusable = |error: std::io::Error| {
        CliError::new(
            Exit::Problem,
            format!("the state directory {} cannot be used: {error}", directory.display()),
            "run pintle as its owner, or name another with --state-dir",
        )
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(unusable)?;
    let lock = File::create(directory.join("lock")).map_err(unusable)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => Err(CliError::new(
            Exit::Problem,
            format!("another pintle runs with the state directory {}", directory.display()),
            "see it with pintle status, or give this one its own --state-dir and --cert-dir",
        )),
        Err(std::fs::TryLockError::Error(error)) => Err(unusable(error)),
    }
}
