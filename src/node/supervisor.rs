//! Keeps one identity running, whatever becomes of it: a fault in one never ends another.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use pintle_agent_core::{Policy, State};
use tokio::sync::{mpsc, watch};

use super::Until;
use super::connections::Connections;
use super::local_proxy::RunningProxy;
use crate::config::{Config, IdentityConfig};
use crate::identity::ports::{LocalProxy, Ports};
use crate::identity::report::status_of;
use crate::identity::{Agent, Command, Parts, StartError};
use crate::keys::Keyring;
use crate::kubernetes::port::ApiServer;
use crate::proxy::ActivatedSockets;
use crate::telemetry::{self, Event, IdentityStatus, Telemetry};
use crate::world::{SystemClock, SystemFiles, random, task};

/// How many commands may wait for an identity.
const COMMANDS: usize = 8;

/// One identity's task.
pub(super) struct Supervisor {
    config: IdentityConfig,
    keyring: Keyring,
    telemetry: Arc<Telemetry>,
    handle: IdentityHandle,
    installed: watch::Sender<bool>,
    /// Whether to run the credential proxy, and on which sockets of the service manager.
    proxy: Option<ActivatedSockets>,
    /// Whether the node has no other identity: a fault then ends the process, and the service manager takes over.
    alone: bool,
}

/// How the node reaches the loop of an identity.
#[derive(Clone)]
pub struct IdentityHandle {
    /// The identity.
    pub config: IdentityConfig,
    commands: Arc<Mutex<Option<mpsc::Sender<Command>>>>,
}

impl IdentityHandle {
    /// Has the identity's loop do something.
    ///
    /// # Errors
    /// If there is no loop: the identity could not be started, or it is ending.
    pub async fn send(&self, command: Command) -> Result<(), NotRunning> {
        let sender = self.commands.lock().unwrap_or_else(PoisonError::into_inner).clone();
        sender.ok_or(NotRunning)?.send(command).await.map_err(|_| NotRunning)
    }
}

/// The loop of an identity does not run.
#[derive(Debug)]
pub struct NotRunning;

/// A supervisor for each identity of the configuration, each in the status from now on.
///
/// # Errors
/// If the service manager holds a socket that is nobody's.
pub(super) fn for_all(
    config: &Config,
    keyring: &Keyring,
    telemetry: &Telemetry,
    until: Until,
    mut activated: ActivatedSockets,
) -> Result<Vec<Supervisor>, StartError> {
    let proxies = config.identities.iter().filter(|identity| identity.proxy.is_some()).count();
    let mut sockets_of = |identity: &IdentityConfig| match &identity.proxy {
        Some(_) if proxies == 1 => std::mem::take(&mut activated),
        Some(proxy) => activated.take(proxy.configuration.listen, proxy.configuration.unix_socket.as_deref()),
        None => ActivatedSockets::default(),
    };
    let supervisors: Vec<_> = config
        .identities
        .iter()
        .map(|identity| Supervisor {
            telemetry: Arc::new(telemetry.for_identity(IdentityStatus {
                state: telemetry::State::Enrolling,
                ..status_of(&State::default(), identity)
            })),
            config: identity.clone(),
            keyring: keyring.clone(),
            handle: IdentityHandle { config: identity.clone(), commands: Arc::default() },
            installed: watch::Sender::new(false),
            proxy: (until == Until::Stopped).then(|| sockets_of(identity)),
            alone: config.identities.len() == 1,
        })
        .collect();
    if proxies > 1 && !activated.is_empty() {
        return Err(StartError {
            detail: "the service manager holds a socket at an address that is no identity's proxy.listen".to_owned(),
            hint: "give the socket unit the address of one of the tables [identity.proxy]".to_owned(),
        });
    }
    Ok(supervisors)
}

impl Supervisor {
    pub(super) fn handle(&self) -> IdentityHandle {
        self.handle.clone()
    }

    /// Whether the identity has what its configuration asks for, and nothing is left to do.
    pub(super) fn installed(&self) -> watch::Receiver<bool> {
        self.installed.subscribe()
    }

    /// Runs the identity until `stopping` is true. What keeps it from starting, or makes it panic, is told, and it is
    /// started again a little later, unless it is the node's only one.
    ///
    /// # Errors
    /// Of the only identity: what keeps it from starting.
    ///
    /// # Panics
    /// As the only identity did.
    pub(super) async fn run(self, mut stopping: watch::Receiver<bool>) -> Result<(), StartError> {
        let mut told = None;
        loop {
            let error = match task::spawn(self.attempt(stopping.clone())?).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) if self.alone => return Err(error),
                Ok(Err(error)) => error,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) if self.alone => std::panic::resume_unwind(panic),
                    // What it says stands on standard error already.
                    Ok(_) => StartError {
                        detail: "it panicked: that is a bug in pintle".to_owned(),
                        hint: "report it with the lines before this one; the identity is started again".to_owned(),
                    },
                    // The runtime ends.
                    Err(_) => return Ok(()),
                },
            };
            self.tell(&error, &mut told);
            let again = task::sleep(Policy::LOCAL_RETRY);
            tokio::select! {
                () = again => {}
                _ = stopping.wait_for(|stopping| *stopping) => return Ok(()),
            }
        }
    }

    /// One life of the identity, from start to stop.
    fn attempt(
        &self,
        stopping: watch::Receiver<bool>,
    ) -> Result<impl Future<Output = Result<(), StartError>> + Send + 'static, StartError> {
        let (sender, commands) = mpsc::channel(COMMANDS);
        let (config, keyring, telemetry) = (self.config.clone(), self.keyring.clone(), Arc::clone(&self.telemetry));
        let installed = self.installed.clone();
        let proxy = self.proxy.as_ref().map(ActivatedSockets::try_clone).transpose().map_err(|error| StartError {
            detail: format!("a socket of the service manager cannot be used: {error}"),
            hint: "see ulimit -n, and free some".to_owned(),
        })?;
        // Commands that come before it has started wait for that.
        *self.handle.commands.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        Ok(async move {
            let connections = Arc::new(Connections::new(config.clone(), keyring.clone()));
            let mut ports = Ports {
                clock: Arc::new(SystemClock::new()),
                files: Arc::new(SystemFiles),
                api: Arc::clone(&connections) as Arc<dyn ApiServer>,
                keyring: keyring.clone(),
                installation: Arc::new(|| random::installation().map_err(io::Error::other)),
                proxy: None,
            };
            if let Some(activated) = proxy {
                let started = RunningProxy::start(&config, &keyring, &connections, &telemetry, activated).await?;
                ports.proxy = started.map(|proxy| Arc::new(proxy) as Arc<dyn LocalProxy>);
            }
            let agent = Agent::start(Parts { config, ports, telemetry, installed, commands }).await?;
            agent.run(stopping).await;
            Ok(())
        })
    }

    /// Tells why the identity does not run; in the log only once.
    fn tell(&self, error: &StartError, told: &mut Option<String>) {
        *self.handle.commands.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.installed.send_replace(false);
        if told.as_ref() != Some(&error.detail) {
            *told = Some(error.detail.clone());
            let (reason, hint) = (error.detail.clone(), error.hint.clone());
            self.telemetry.emit(Event::StartFailed { reason, hint });
        }
        let known = self.telemetry.current_status().identity(&self.config.name).cloned();
        self.telemetry.set_status(IdentityStatus {
            state: telemetry::State::NotStarted,
            reason: error.detail.clone(),
            hint: error.hint.clone(),
            ..known.unwrap_or_default()
        });
        // It is looked after, and the watchdog need not be.
        self.telemetry.alive();
    }
}
