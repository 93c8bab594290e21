//! The agent's side of the control socket.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Request, Response};
use crate::config::{self, Config};
use crate::identity::{Command, Migration};
use crate::keys::Keyring;
use crate::keys::inventory::{self, Selection};
use crate::store::Journal;
use crate::telemetry::{BackendStatus, State, Status, Telemetry};

/// A request is shorter than this, octets.
const MAXIMUM_REQUEST: u64 = 1 << 16;
/// Who connects and says nothing is sent away after this time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Whom the server asks for its answers.
#[derive(Clone)]
pub struct Desk {
    /// What the agent was told to do.
    pub config: Config,
    /// The backends.
    pub keyring: Keyring,
    /// The status.
    pub telemetry: Arc<Telemetry>,
    /// The agent itself.
    pub commands: mpsc::Sender<Command>,
}

/// Listens at this path and answers until the runtime ends.
///
/// # Errors
/// If the socket cannot be made.
pub fn serve(path: &Path, desk: Desk) -> io::Result<()> {
    // One of an agent that was killed; the lock on the state directory says that no other lives.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(answer(stream, desk.clone()));
                }
                // Out of descriptors, most likely: others will be closed.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    Ok(())
}

async fn answer(stream: UnixStream, desk: Desk) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(MAXIMUM_REQUEST));
    let read = tokio::time::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await;
    if !matches!(read, Ok(Ok(_))) {
        return;
    }
    let response = match serde_json::from_str(&line) {
        Ok(request) => desk.answer(request).await,
        Err(error) => Response::Refused { reason: error.to_string() },
    };
    if let Ok(mut text) = serde_json::to_string(&response) {
        text.push('\n');
        // Who asked may have gone away.
        let _ = writer.write_all(text.as_bytes()).await;
    }
}

impl Desk {
    async fn answer(&self, request: Request) -> Response {
        match request {
            Request::Status => Response::Status { status: self.status() },
            Request::Rotate { wait } => {
                let mut status = self.telemetry.status();
                let before = status.borrow_and_update().clone();
                match self.commands.send(Command::Rotate).await {
                    Ok(()) if wait => self.rotated(status, &before).await,
                    Ok(()) => Response::Accepted,
                    Err(_) => ending(),
                }
            }
            Request::Backends => {
                let config = config::migration::followed(&self.config);
                Response::Backends { backends: inventory::backends(&config, &self.keyring).await }
            }
            Request::Keys => {
                // What the agent last wrote down, so that a device that is slow does not keep this waiting too.
                let journal = Journal::new(self.config.journal(), self.config.template().common_name);
                let state = journal.load().ok().flatten();
                Response::Keys {
                    inventory: inventory::keys(&self.config, &self.keyring, state.as_ref().as_slice()).await,
                }
            }
            Request::Prune { dry_run } => self.prune(Selection::Orphaned, dry_run).await,
            Request::PruneNamed { names, dry_run } => self.prune(Selection::Named(names), dry_run).await,
            Request::Migrate { identity, to, dry_run, wait } => self.migrate(&identity, to, dry_run, wait).await,
        }
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

    async fn prune(&self, selection: Selection, dry_run: bool) -> Response {
        match self.command(|reply| Command::Prune { selection, dry_run, reply }).await {
            Some(inventory) => Response::Keys { inventory },
            None => ending(),
        }
    }

    async fn migrate(&self, identity: &str, to: String, dry_run: bool, wait: bool) -> Response {
        let mut status = self.telemetry.status();
        let before = status.borrow_and_update().clone();
        if !before.identities.iter().any(|known| known.identity == identity || known.subject == identity) {
            let known: Vec<_> = before.identities.iter().map(|known| known.identity.as_str()).collect();
            return Response::Failed {
                reason: format!("this agent keeps no identity {identity:?}; it keeps: {}", known.join(", ")),
                hint: "see pintle status".to_owned(),
            };
        }
        let backend = to.clone();
        match self.command(|reply| Command::Migrate { to: backend, dry_run, reply }).await {
            Some(Ok(Migration { from, algorithm, moves })) => {
                if wait && moves && !dry_run {
                    return self.rotated(status, &before).await;
                }
                let from = from.map(|key| key.to_string()).unwrap_or_default();
                Response::Migration { from, to, algorithm: algorithm.to_string(), moves }
            }
            Some(Err(error)) => Response::Failed { reason: error.to_string(), hint: error.hint.unwrap_or_default() },
            None => ending(),
        }
    }

    /// Waits until an identity has been rotated since `before`, or has failed to. What changed since then is in `status`.
    async fn rotated(&self, mut status: watch::Receiver<Status>, before: &Status) -> Response {
        let known = |identity: &str| before.identities.iter().find(|known| known.identity == identity);
        loop {
            if status.changed().await.is_err() {
                return ending();
            }
            let current = self.telemetry.current_status();
            for identity in &current.identities {
                let rotations = known(&identity.identity).map_or(0, |known| known.rotations);
                if identity.rotations > rotations && (identity.phase == "holding" || identity.drains()) {
                    return Response::Status { status: current };
                }
                // One that was told before is none of this rotation's.
                let told = known(&identity.identity).is_some_and(|known| known.retry_at == identity.retry_at);
                if (identity.failures > 0 && !told) || identity.state == State::KeyLost {
                    return Response::Failed { reason: identity.reason.clone(), hint: identity.hint.clone() };
                }
            }
        }
    }

    /// Has the agent do something; `None` if it ends before it has.
    async fn command<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

fn ending() -> Response {
    Response::Refused { reason: "the agent is ending".to_owned() }
}
