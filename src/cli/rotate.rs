//! `pintle rotate`.

use super::{CliError, Exit, print};
use crate::config::{Config, Flags};
use crate::node::control::{self, Request, Response};

/// The arguments of `pintle rotate`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Return only when the new certificate is in use, or when it failed
    #[arg(long)]
    wait: bool,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let config = Config::load(&self.flags)?;
        let answer = control::ask(&config.control_socket(), Request::Rotate { wait: self.wait })
            .map_err(|error| CliError::new(Exit::Problem, &error, error.hint()))?;
        match answer {
            Response::Accepted => print("rotation requested; see pintle status\n")?,
            Response::Status { status } => {
                for identity in &status.identities {
                    let then =
                        if identity.drains() { "; the old key goes with the last connections that use it" } else { "" };
                    print(&format!("rotated: serial {}, good until {}{then}\n", identity.serial, identity.not_after))?;
                }
            }
            Response::Failed { reason, hint } => return Err(CliError::new(Exit::Problem, reason, hint)),
            answer => return Err(super::unexpected(Ok(answer))),
        }
        Ok(Exit::Ok)
    }
}
