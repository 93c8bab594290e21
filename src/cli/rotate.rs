//! `pintle rotate`.

use super::{CliError, Exit, print};
use crate::config::{Config, Flags};
use crate::node::control::{self, Request, Response};

/// The arguments of `pintle rotate`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// The identity [default: the only one]
    identity: Option<String>,
    /// Wait until the new certificate is in use, or the rotation has failed
    #[arg(long)]
    wait: bool,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let config = Config::load(&self.flags)?;
        let identity = config.identity(self.identity.as_deref())?.name.clone();
        let request = Request::Rotate { identity: Some(identity), wait: self.wait };
        let answer = control::ask(&config.node.control_socket(), request)
            .map_err(|error| CliError::new(Exit::Problem, &error, error.hint()))?;
        match answer {
            Response::Accepted => print("rotation requested; see pintle status\n")?,
            Response::Status { status } => {
                for identity in &status.identities {
                    let then = if identity.drains() {
                        "; the old key is destroyed once its last connections close"
                    } else {
                        ""
                    };
                    let until = identity.not_after.map(|end| format!(", valid until {end}")).unwrap_or_default();
                    print(&format!("rotated: serial {}{until}{then}\n", identity.serial))?;
                }
            }
            Response::Failed { reason, hint } => return Err(CliError::new(Exit::Problem, reason, hint)),
            answer => return Err(super::unexpected(Ok(answer))),
        }
        Ok(Exit::Ok)
    }
}
