//! The command line's side of the control socket.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

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

/// Asks the agent that listens at this path. Blocks until it has answered.
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
        let mut text = serde_json::to_string(&request)?;
        text.push('\n');
        stream.write_all(text.as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    exchange(&mut stream).map_err(|error| ControlError::Failed(error.to_string()))
}
