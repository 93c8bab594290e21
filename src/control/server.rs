//! The agent's side of the control socket.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::{Request, Response};
use crate::agent::Command;
use crate::telemetry::Telemetry;

/// A request is shorter than this, octets.
const MAXIMUM_REQUEST: u64 = 4096;
/// Who connects and says nothing is sent away after this time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Listens at this path and answers until the runtime ends.
///
/// # Errors
/// If the socket cannot be made.
pub fn serve(path: &Path, telemetry: Arc<Telemetry>, commands: mpsc::Sender<Command>) -> io::Result<()> {
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
                    tokio::spawn(answer(stream, Arc::clone(&telemetry), commands.clone()));
                }
                // Out of descriptors, most likely: others will be closed.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    Ok(())
}

async fn answer(stream: UnixStream, telemetry: Arc<Telemetry>, commands: mpsc::Sender<Command>) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(MAXIMUM_REQUEST));
    let read = tokio::time::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await;
    if !matches!(read, Ok(Ok(_))) {
        return;
    }
    let response = match serde_json::from_str(&line) {
        Ok(Request::Status) => Response::Status { status: telemetry.status().borrow().clone() },
        Ok(Request::Rotate { wait }) => rotate(wait, &telemetry, &commands).await,
        Err(error) => Response::Refused { reason: error.to_string() },
    };
    if let Ok(mut text) = serde_json::to_string(&response) {
        text.push('\n');
        // Who asked may have gone away.
        let _ = writer.write_all(text.as_bytes()).await;
    }
}

async fn rotate(wait: bool, telemetry: &Telemetry, commands: &mpsc::Sender<Command>) -> Response {
    let mut status = telemetry.status();
    let before = status.borrow_and_update().clone();
    if commands.send(Command::Rotate).await.is_err() {
        return Response::Refused { reason: "the agent is ending".to_owned() };
    }
    if !wait {
        return Response::Accepted;
    }
    let known = |identity: &str| before.identities.iter().find(|known| known.identity == identity);
    loop {
        if status.changed().await.is_err() {
            return Response::Refused { reason: "the agent is ending".to_owned() };
        }
        let current = status.borrow_and_update().clone();
        for identity in &current.identities {
            let rotations = known(&identity.identity).map_or(0, |known| known.rotations);
            if identity.rotations > rotations && identity.phase == "holding" {
                return Response::Status { status: current };
            }
            // One that was told before is none of this rotation's.
            let told = known(&identity.identity).is_some_and(|known| known.retry_at == identity.retry_at);
            if identity.failures > 0 && !told {
                return Response::Failed { reason: identity.reason.clone(), hint: identity.hint.clone() };
            }
        }
    }
}
