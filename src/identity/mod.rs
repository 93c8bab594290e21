//! The driver of the rotation: step, save the journal, perform the action, and step again with what came of it.
//!
//! Async begins here. The world is reached through [`ports::Ports`], and through nothing else.

mod changes;
mod command;
mod environment;
mod pair;
mod perform;
pub mod ports;
mod prove;
mod recovery;
pub(crate) mod report;
mod retire;
mod start;
mod start_error;
mod unfinished;

use std::sync::Arc;

use pintle_agent_core::rotation::{SubmittedRequest, Waiting};
use pintle_agent_core::{Action, Event, KeyName, Phase, Policy, State, Template, UnixTime, step};
use pintle_plugins_api::{BackendError, KeyAlgorithm};
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::IdentityConfig;
use crate::store::{Journal, PairDirectory};
use crate::telemetry::{self, Telemetry};
use crate::world::clock::has_stepped;
use crate::world::files::FileLock;
use ports::Ports;

pub use start_error::StartError;

/// What an operator may ask of a running agent.
#[derive(Debug)]
pub enum Command {
    /// Rotate now.
    Rotate,
    /// Make new keys in another backend from now on, and move there at once.
    Migrate {
        /// The backend.
        to: String,
        /// Whether only to tell what would be done.
        dry_run: bool,
        /// Who waits for the answer.
        reply: oneshot::Sender<Result<Migration, BackendError>>,
    },
}

/// What a migration does.
#[derive(Debug)]
pub struct Migration {
    /// The key in use.
    pub from: Option<KeyName>,
    /// The algorithm of the next one.
    pub algorithm: KeyAlgorithm,
    /// Whether the key in use is elsewhere, so that a rotation begins.
    pub moves: bool,
}

/// Keeps one identity: its state, and everything that is needed to act on it.
pub struct Agent {
    config: IdentityConfig,
    policy: Policy,
    template: Template,
    authorities: Option<Vec<Vec<u8>>>,
    journal: Journal,
    pairs: PairDirectory,
    ports: Ports,
    telemetry: Arc<Telemetry>,
    commands: mpsc::Receiver<Command>,
    installed: watch::Sender<bool>,
    state: State,
    reporter: report::Reporter,
    /// Held for as long as the agent lives, so that no other publishes into the same directory.
    _pairs_lock: Option<FileLock>,
    probe: environment::Probe,
    /// The pending request that can be watched, and from which version of it on.
    watchable: Option<(SubmittedRequest, String)>,
    /// Why it is not known yet what is held: then nothing is done.
    unfinished: Option<unfinished::Unfinished>,
}

/// Everything that an agent is started with.
pub struct Parts {
    /// What to do.
    pub config: IdentityConfig,
    /// The world.
    pub ports: Ports,
    /// Where events go.
    pub telemetry: Arc<Telemetry>,
    /// What operators ask for.
    pub commands: mpsc::Receiver<Command>,
    /// Becomes true once what the configuration asks for is installed and nothing is left to do, for as long as that is
    /// so.
    pub installed: watch::Sender<bool>,
}

impl Agent {
    /// Finds out where the identity stands, from the journal and the disk.
    ///
    /// # Errors
    /// What only a person can mend: a state directory that cannot be used, or a node that was renamed.
    pub async fn start(parts: Parts) -> Result<Self, StartError> {
        start::start(parts).await
    }

    /// Runs until it is told to stop.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut event = self.first_event();
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => return self.telemetry.emit(telemetry::Event::Stopped),
            asked = self.finish_recovery() => event = asked.unwrap_or(event),
        }
        let _ = self.update_proxy().await;
        loop {
            self.telemetry.alive();
            let started = self.now();
            let speaks_as = self.state.trusted().map(|credential| *credential.fingerprint());
            let (next, action) = step(std::mem::take(&mut self.state), event, started, &self.policy);
            self.report(next, &action);
            if self.state.trusted().map(|credential| *credential.fingerprint()) != speaks_as {
                // New connections speak as it from now on, and not only once something else happens.
                let _ = self.update_proxy().await;
            }
            event = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                event = self.act(action) => event,
            };
        }
        // The state may be ahead of the journal if the disk is full; one more try costs nothing.
        let _ = self.journal.save(&self.state);
        self.telemetry.emit(telemetry::Event::Stopped);
    }

    fn now(&self) -> UnixTime {
        self.ports.clock.now()
    }

    /// Saves the journal, then performs the action. Both end early when there is something else to look at.
    async fn act(&mut self, action: Action) -> Event {
        let waits = matches!(action, Action::Wait { .. });
        let is_saved = self.journal.covers(&self.state) || self.save_journal(&action);
        self.installed.send_replace(is_saved && self.is_installed(&action));
        if !is_saved && !waits {
            // Nothing is done that is not written down first; what is known stays in memory meanwhile (case C29).
            return self.pause(None).await;
        }
        match action {
            Action::Wait { until, .. } => self.pause(until).await,
            action => self.perform(action).await,
        }
    }

    /// Saves the journal, and tells when that does not work; whether it has.
    fn save_journal(&mut self, action: &Action) -> bool {
        let unsaved = self.journal.save(&self.state).err().map(|error| error.to_string());
        let is_saved = unsaved.is_none();
        self.note_journal(unsaved, action);
        is_saved
    }

    /// Waits for a time, a command, a step of the clock, or a refusal of the certificate in use.
    async fn pause(&mut self, until: Option<UnixTime>) -> Event {
        // The clock wakes us every few seconds: the watchdog wants to hear from us, and what is on this machine is looked
        // at again.
        let clock = Arc::clone(&self.ports.clock);
        let (before, started) = (clock.now(), clock.monotonic());
        let event = tokio::select! {
            biased;
            Some(command) = self.commands.recv() => self.handle_command(command).await,
            () = clock.sleep_until(until) => Event::Woke,
        };
        if has_stepped(clock.monotonic() - started, before, clock.now()) {
            self.telemetry.emit(telemetry::Event::ClockStepped);
        }
        if event == Event::Woke { self.observe_environment().await } else { event }
    }

    /// Whether what the configuration asks for is installed and nothing is left to do, so that a device may be unplugged:
    /// a good certificate whose key is where new keys are made, no rotation under way, and no old key left anywhere.
    fn is_installed(&self, action: &Action) -> bool {
        let held = self.state.held().filter(|held| !held.has_expired(self.now()));
        // With rotation off, a key stays where it is until its certificate expires, whatever the backend is now.
        let in_place = held.is_some_and(|held| held.key().backend == self.policy.backend || !self.policy.rotate);
        let idle = *self.state.phase() == Phase::Holding
            && matches!(action, Action::Wait { waiting: Waiting::UntilRotation | Waiting::RotationOff, .. });
        in_place
            && idle
            && !self.state.held_is_unproven()
            && self.state.retiring().is_empty()
            && self.state.back_off().is_none()
            && self.probe.trouble().is_none()
    }
}
