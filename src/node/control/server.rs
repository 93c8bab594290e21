//! The agent's side of the control socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use pintle_agent_core as core;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};

use super::{Request, Response};
use crate::config::{self, Config, IdentityConfig};
use crate::identity::{Command, Migration};
use crate::keys::Keyring;
use crate::keys::inventory::{self, Selection};
use crate::node::IdentityHandle;
use crate::parse_error;
use crate::store::{Journal, JournalError};
use crate::telemetry::{BackendStatus, IdentityStatus, Phase, State, Status, Telemetry};
use crate::world::{Files as _, SystemFiles, task};

/// The longest request, in bytes.
const MAXIMUM_REQUEST: u64 = 1 << 16;
/// Clients that send no request within this time are disconnected.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers requests.
#[derive(Clone)]
pub struct Server {
    /// What the agent was told to do.
    pub config: Config,
    /// The backends.
    pub keyring: Keyring,
    /// The status.
    pub telemetry: Telemetry,
    /// The identities.
    pub identities: Vec<IdentityHandle>,
}

/// Listens at this path and answers until the runtime ends.
///
/// # Errors
/// If the socket cannot be made.
pub fn serve(path: &Path, server: Server) -> io::Result<()> {
    // One of an agent that was killed; the lock on the state directory says that no other lives.
    match SystemFiles.remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    SystemFiles.set_mode(path, 0o600)?;
    task::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    task::spawn(answer(stream, server.clone()));
                }
                // Out of descriptors, most likely: others will be closed.
                Err(_) => task::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    Ok(())
}

async fn answer(stream: UnixStream, server: Server) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(MAXIMUM_REQUEST));
    let read = task::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await;
    if !matches!(read, Ok(Ok(_))) {
        return;
    }
    let response = match serde_json::from_str(&line) {
        Ok(request) => server.answer(request).await.unwrap_or_else(|refusal| refusal),
        Err(error) => Response::Refused { reason: parse_error::json(&error) },
    };
    if let Ok(mut text) = serde_json::to_string(&response) {
        text.push('\n');
        // The client may have gone away.
        let _ = writer.write_all(text.as_bytes()).await;
    }
}

impl Server {
    /// The answer to a request; as an error, why there is none.
    async fn answer(&self, request: Request) -> Result<Response, Response> {
        Ok(match request {
            Request::Status => Response::Status { status: self.status() },
            Request::Rotate { identity, wait } => {
                let identity = self.identity(identity.as_deref())?;
                let changes = Changes::from_now(identity, &self.telemetry);
                identity.send(Command::Rotate).await.map_err(|_| self.not_running(identity))?;
                if wait { changes.rotated().await? } else { Response::Accepted }
            }
            Request::Backends => {
                let config = config::migration::followed(&self.config);
                Response::Backends { backends: inventory::backends(&config, &self.keyring).await }
            }
            Request::Keys => {
                let states = || Ok::<_, Response>(self.journals().filter_map(|(_, state)| state.ok()?).collect());
                Response::Keys { inventory: inventory::keys(&self.config.node, &self.keyring, states).await? }
            }
            Request::Prune { dry_run } => self.prune(Selection::Orphaned, dry_run).await?,
            Request::PruneNamed { names, dry_run } => self.prune(Selection::Named(names), dry_run).await?,
            Request::Migrate { identity, to, dry_run, wait } => {
                self.migrate(self.identity(identity.as_deref())?, to, dry_run, wait).await?
            }
        })
    }

    /// How things stand.
    pub(super) fn status(&self) -> Status {
        let backends = self.keyring.health().map(|(name, error)| BackendStatus {
            name: name.to_owned(),
            up: error.is_none(),
            reason: error.as_ref().map(ToString::to_string).unwrap_or_default(),
            hint: error.and_then(|error| error.hint).unwrap_or_default(),
        });
        Status { backends: backends.collect(), ..self.telemetry.current_status() }
    }

    /// What the identities last wrote down, so that one whose device is slow keeps nobody waiting.
    fn journals(&self) -> impl Iterator<Item = (&IdentityConfig, Result<Option<core::State>, JournalError>)> {
        self.config.identities.iter().map(|config| (config, Journal::new(config.journal(), config.template()).load()))
    }

    async fn prune(&self, selection: Selection, dry_run: bool) -> Result<Response, Response> {
        // Of an identity whose journal cannot be read, nobody knows what it needs.
        let states = || {
            let known = self.journals().filter_map(|(config, state)| {
                let failed = |error: JournalError| Response::Failed {
                    reason: format!("the journal {} cannot be used: {error}", config.journal().display()),
                    hint: error.hint().to_owned(),
                };
                state.map_err(failed).transpose()
            });
            known.collect()
        };
        let pruned = inventory::prune(&self.config.node, &self.keyring, states, &selection, dry_run);
        Ok(Response::Keys { inventory: pruned.await? })
    }

    /// The identity of this name; where none is named, the only one.
    fn identity(&self, name: Option<&str>) -> Result<&IdentityHandle, Response> {
        let config = self
            .config
            .identity(name)
            .map_err(|error| Response::Failed { reason: error.detail.clone(), hint: error.hint })?;
        let found = self.identities.iter().find(|identity| identity.config.name == config.name);
        found.ok_or_else(ending)
    }

    async fn migrate(
        &self,
        identity: &IdentityHandle,
        to: String,
        dry_run: bool,
        wait: bool,
    ) -> Result<Response, Response> {
        let changes = Changes::from_now(identity, &self.telemetry);
        let backend = to.clone();
        match self.command(identity, |reply| Command::Migrate { to: backend, dry_run, reply }).await? {
            Ok(Migration { moves: true, .. }) if wait && !dry_run => changes.rotated().await,
            Ok(Migration { from, algorithm, moves }) => {
                let from = from.map(|key| key.to_string()).unwrap_or_default();
                Ok(Response::Migration { from, to, algorithm: algorithm.to_string(), moves })
            }
            Err(error) => Err(Response::Failed { reason: error.to_string(), hint: error.hint.unwrap_or_default() }),
        }
    }

    /// Has an identity's loop do something, and waits for what comes of it.
    async fn command<T>(
        &self,
        identity: &IdentityHandle,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Response> {
        let (reply, answer) = oneshot::channel();
        identity.send(command(reply)).await.map_err(|_| self.not_running(identity))?;
        answer.await.map_err(|_| self.not_running(identity))
    }

    /// Why the loop of an identity takes no commands.
    fn not_running(&self, identity: &IdentityHandle) -> Response {
        match self.telemetry.current_status().identity(&identity.config.name) {
            Some(status) if status.state == State::NotStarted => {
                Response::Failed { reason: status.reason.clone(), hint: status.hint.clone() }
            }
            _ => ending(),
        }
    }
}

/// What becomes of an identity from a moment on.
struct Changes<'a> {
    identity: &'a IdentityHandle,
    telemetry: &'a Telemetry,
    before: IdentityStatus,
    status: watch::Receiver<Status>,
}

impl<'a> Changes<'a> {
    fn from_now(identity: &'a IdentityHandle, telemetry: &'a Telemetry) -> Self {
        let mut status = telemetry.status();
        let before = status.borrow_and_update().identity(&identity.config.name).cloned().unwrap_or_default();
        Self { identity, telemetry, before, status }
    }

    /// Waits until the identity has been rotated, or has failed to.
    async fn rotated(mut self) -> Result<Response, Response> {
        loop {
            self.status.changed().await.map_err(|_| ending())?;
            let mut current = self.telemetry.current_status();
            current.identities.retain(|known| known.identity == self.identity.config.name);
            let Some(identity) = current.identities.first() else { continue };
            if identity.rotations > self.before.rotations && (identity.phase == Phase::Holding || identity.drains()) {
                return Ok(Response::Status { status: current });
            }
            // One that was told before is not of this rotation.
            let failed = identity.failures > 0 && self.before.retry_at != identity.retry_at;
            if failed || matches!(identity.state, State::KeyLost | State::NotStarted) {
                return Err(Response::Failed { reason: identity.reason.clone(), hint: identity.hint.clone() });
            }
        }
    }
}

fn ending() -> Response {
    Response::Refused { reason: "the agent is ending".to_owned() }
}
