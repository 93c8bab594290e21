//! The command line's side of the control socket.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{Request, Response};

/// Why there is no answer.
#[derive(Debug)]
pub enum ControlError {
    /// No agent listens there.
    NotRunning,
    /// It may not be asked by this user.
    Forbidden,
    /// Anything else.
    Failed(String),
}

impl fmt::Display for ControlError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRunning => formatter.write_str("no agent runs with this state directory"),
            Self::Forbidden => formatter.write_str("the agent's control socket belongs to another user"),
            Self::Failed(detail) => write!(formatter, "the agent does not answer: {detail}"),
        }
    }
}

impl std::error::Error for ControlError {}

impl ControlError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotRunning => "start the agent with pintle run",
            Self::Forbidden => "ask as the user that runs the agent",
            Self::Failed(_) => "see the agent's log; restart it if it has stopped there",
        }
    }
}

/// A running agent says how it stands, or that it has taken a command, within this time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Asks the agent that listens at this path. Blocks until it has answered, or should have.
///
/// # Errors
/// If there is none, or its answer makes no sense.
pub fn ask(path: &Path, request: Request) -> Result<Response, ControlError> {
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::NotRunning,
        io::ErrorKind::PermissionDenied => ControlError::Forbidden,
        _ => ControlError::Failed(error.to_string()),
    })?;
    let exchange = |stream: &mut UnixStream| -> io::Result<Response> {
        // Everything else takes as long as an approver or a device does.
        let quick = matches!(request, Request::Status | Request::Rotate { wait: false, .. });
        stream.set_read_timeout(quick.then_some(ANSWER_TIMEOUT))?;
        let mut text = serde_json::to_string(&request)?;
        text.push('\n');
        stream.write_all(text.as_bytes())?;
        let mut line = String::new();
        match BufReader::new(stream).read_line(&mut line) {
            Ok(0) => return Err(io::Error::other("it ended")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::other(format!("nothing within {} s", ANSWER_TIMEOUT.as_secs())));
            }
            read => read?,
        };
        Ok(serde_json::from_str(&line)?)
    };
    exchange(&mut stream).map_err(|error| ControlError::Failed(error.to_string()))
}
