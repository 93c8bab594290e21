//! The process: backends, control socket, and the signals that end it.

pub mod control;

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::config::Config;
use crate::identity::{Agent, Command, Parts, StartError, Until};
use crate::proxy::Activated;

use crate::keys::{self, Keyring};
use crate::telemetry::Telemetry;

/// How many commands may wait for the agent.
const COMMANDS: usize = 8;

/// Runs the agent with its backends and its control socket until it is stopped, or until what `until` says.
///
/// # Errors
/// What only a person can mend, before anything was done.
pub async fn serve(
    config: Config,
    telemetry: Arc<Telemetry>,
    until: Until,
    stopped: watch::Receiver<bool>,
) -> Result<(), StartError> {
    serve_on(config, telemetry, until, stopped, Activated::default()).await
}

/// As [`serve`], with the listening sockets that the service manager holds for the credential proxy.
///
/// # Errors
/// As [`serve`].
pub async fn serve_on(
    config: Config,
    telemetry: Arc<Telemetry>,
    until: Until,
    stopped: watch::Receiver<bool>,
    activated: Activated,
) -> Result<(), StartError> {
    let keyring = Keyring::start(keys::openers(&config)).map_err(|error| StartError {
        detail: format!("a backend's thread cannot be started: {error}"),
        hint: "see ulimit -u, and free some".to_owned(),
    })?;
    let (sender, commands) = mpsc::channel::<Command>(COMMANDS);
    let socket = config.control_socket();
    let desk = control::Desk {
        config: config.clone(),
        keyring: keyring.clone(),
        telemetry: Arc::clone(&telemetry),
        commands: sender,
    };
    if let Some(address) = config.metrics_address {
        control::metrics::serve(address, desk.clone()).await.map_err(|error| StartError {
            detail: format!("the metrics cannot be served at {address}: {error}"),
            hint: "choose another metrics-address, or leave it out".to_owned(),
        })?;
    }
    control::serve(&socket, desk).map_err(|error| StartError {
        detail: format!("the control socket {} cannot be made: {error}", socket.display()),
        hint: "a socket's path has at most 107 octets; choose a shorter --state-dir".to_owned(),
    })?;
    let mut agent = Agent::start(Parts { config, keyring, telemetry, commands }).await?;
    if until == Until::Stopped {
        agent.start_proxy(activated).await?;
    }
    agent.run(until, stopped).await;
    // Whoever asks from now on reads the journal.
    let _ = std::fs::remove_file(&socket);
    Ok(())
}

/// Becomes true at the first SIGTERM or SIGINT.
///
/// # Errors
/// If the system does not let signals be caught.
pub fn stopped_by_signals() -> Result<watch::Receiver<bool>, StartError> {
    let caught = |kind| {
        signal(kind).map_err(|error| StartError {
            detail: format!("signals cannot be caught: {error}"),
            hint: "see ulimit -n, and free some".to_owned(),
        })
    };
    let (mut terminate, mut interrupt) = (caught(SignalKind::terminate())?, caught(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // Nobody may be left who wants to know.
        let _ = stop.send(true);
    });
    Ok(stopped)
}
