//! The process: backends, control socket, one task for each identity, and the signals that stop it.

mod connections;
pub mod control;
mod local_proxy;
mod supervisor;

use std::fmt;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::Config;
use crate::identity::StartError;
use crate::keys::{self, Keyring};
use crate::proxy::ActivatedSockets;
use crate::telemetry::{IdentityStatus, Telemetry};
use crate::world::{Files as _, SystemFiles, task};
use supervisor::Supervisor;

pub use supervisor::IdentityHandle;

/// When the node ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Only when it is stopped.
    Stopped,
    /// As soon as every identity has what its configuration asks for, and nothing is left to do; no proxy is started.
    Installed {
        /// How long to wait for that at most.
        timeout: Option<Duration>,
    },
}

/// Why a node has ended without having done what it was started for.
#[derive(Debug)]
pub enum ServeError {
    /// It could not start.
    Start(StartError),
    /// It was to end once everything is installed, and was stopped, or ran out of time, before that.
    Unfinished(Vec<IdentityStatus>),
}

impl From<StartError> for ServeError {
    fn from(error: StartError) -> Self {
        Self::Start(error)
    }
}

impl fmt::Display for ServeError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(error) => error.fmt(formatter),
            Self::Unfinished(identities) => {
                formatter.write_str("not everything that the configuration asks for is installed")?;
                identities.iter().try_for_each(|identity| {
                    write!(formatter, "; {}: {}", identity.identity, identity.state_and_reason())
                })
            }
        }
    }
}

impl std::error::Error for ServeError {}

/// Runs the identities with their backends and the control socket until `stopped` is true, or until what `until` says.
/// `activated` are the listening sockets that the service manager holds for credential proxies.
///
/// # Errors
/// What only a person can change, before anything was done; with several identities, only what concerns all of them. And
/// if `until` has not been reached.
pub async fn serve(
    config: Config,
    telemetry: &Telemetry,
    until: Until,
    stopped: watch::Receiver<bool>,
    activated: ActivatedSockets,
) -> Result<(), ServeError> {
    let keyring = Keyring::start(keys::openers(&config.node)).map_err(|error| StartError {
        detail: format!("a backend's thread cannot be started: {error}"),
        hint: "see ulimit -u, and free some".to_owned(),
    })?;
    let socket = config.node.control_socket();
    let supervisors = supervisor::for_all(&config, &keyring, telemetry, until, activated)?;
    let server = control::Server {
        config: config.clone(),
        keyring: keyring.clone(),
        telemetry: telemetry.clone(),
        identities: supervisors.iter().map(Supervisor::handle).collect(),
    };
    if let Some(address) = config.node.metrics_address {
        control::metrics::serve(address, server.clone()).await.map_err(|error| StartError {
            detail: format!("the metrics cannot be served at {address}: {error}"),
            hint: "choose another metrics-address, or leave it out".to_owned(),
        })?;
    }
    control::serve(&socket, server).map_err(|error| StartError {
        detail: format!("the control socket {} cannot be made: {error}", socket.display()),
        hint: "a socket's path has at most 107 bytes; choose a shorter --state-dir".to_owned(),
    })?;
    let result = run(supervisors, telemetry, until, stopped).await;
    // Commands read the journals from now on.
    let _ = SystemFiles.remove(&socket);
    result
}

/// Runs the identities, each in a task of its own, until they are to end.
async fn run(
    supervisors: Vec<Supervisor>,
    telemetry: &Telemetry,
    until: Until,
    mut stopped: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let (stop, stopping) = watch::channel(false);
    let installed: Vec<_> = supervisors.iter().map(Supervisor::installed).collect();
    let mut tasks = JoinSet::new();
    for supervisor in supervisors {
        task::spawn_in(&mut tasks, supervisor.run(stopping.clone()));
    }
    let mut ended = std::pin::pin!(async {
        while let Some(ended) = tasks.join_next().await {
            match ended {
                Ok(result) => result?,
                // A supervisor panics only where there is no other identity to go on for.
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_) => break,
                },
            }
        }
        Ok::<_, StartError>(())
    });
    let result = tokio::select! {
        result = &mut ended => return result.map_err(Into::into),
        _ = stopped.wait_for(|stopped| *stopped) => false,
        result = finished(until, installed) => result,
    };
    let unfinished = telemetry.current_status().identities;
    let _ = stop.send(true);
    ended.await?;
    if result || until == Until::Stopped { Ok(()) } else { Err(ServeError::Unfinished(unfinished)) }
}

/// Waits until every identity has what it should; whether it has come to that before the timeout.
async fn finished(until: Until, installed: Vec<watch::Receiver<bool>>) -> bool {
    let Until::Installed { timeout } = until else {
        return std::future::pending().await;
    };
    let all = async {
        // One that is installed may have something to do again before the last one is.
        while !installed.iter().all(|installed| *installed.borrow()) {
            for installed in &installed {
                if installed.clone().wait_for(|installed| *installed).await.is_err() {
                    // The identity's task has ended, which `run` notices.
                    return std::future::pending().await;
                }
            }
        }
    };
    match timeout {
        Some(timeout) => task::timeout(timeout, all).await.is_ok(),
        None => {
            all.await;
            true
        }
    }
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
    task::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // Nobody may be left who wants to know.
        let _ = stop.send(true);
    });
    Ok(stopped)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn it_is_finished_when_all_are_installed_at_once_and_never_without_one() {
        let until = Until::Installed { timeout: None };
        let (one, two) = (watch::Sender::new(true), watch::Sender::new(false));
        let all = || vec![one.subscribe(), two.subscribe()];
        assert_eq!(finished(until, all()).now_or_never(), None);
        one.send_replace(false);
        two.send_replace(true);
        assert_eq!(finished(until, all()).now_or_never(), None, "the first has something to do again");
        one.send_replace(true);
        assert_eq!(finished(until, all()).now_or_never(), Some(true));
        assert_eq!(finished(Until::Stopped, all()).now_or_never(), None);

        // It must not keep the runtime from noticing how the identity ended.
        let gone = vec![watch::Sender::new(false).subscribe()];
        assert_eq!(finished(until, gone).now_or_never(), None);
    }
}
