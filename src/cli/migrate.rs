//! `pintle migrate`: moves an identity's key to another backend by rotating it.

use super::{CliError, Exit, print};
use crate::config::{Config, Flags};
use crate::node::control::{self, ControlError, Request, Response};

/// The arguments of `pintle migrate`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// The identity [default: the only one]
    identity: Option<String>,
    /// The backend to generate its keys in from now on
    #[arg(long, value_name = "BACKEND")]
    to: String,
    /// Only show what would be done, and whether the backend responds
    #[arg(long)]
    dry_run: bool,
    /// Wait until the new certificate is in use, or the rotation has failed
    #[arg(long)]
    wait: bool,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let config = Config::load(&self.flags)?;
        let Self { identity, to, dry_run, wait, .. } = self;
        let identity = Some(config.identity(identity.as_deref())?.name.clone());
        let failed = if config.node.backends.contains_key(&to) { Exit::Problem } else { Exit::Usage };
        let request = Request::Migrate { identity, to, dry_run, wait };
        match control::ask(&config.node.control_socket(), request) {
            Ok(Response::Migration { from, to, algorithm, moves: false }) => {
                print(&format!("{from} is already in {to}; new keys ({algorithm}) are generated there\n"))?;
            }
            Ok(Response::Migration { from, to, algorithm, moves: true }) => {
                let will = if dry_run { "would be" } else { "is" };
                let from = if from.is_empty() { "no key yet".to_owned() } else { from };
                print(&format!(
                    "{from} {will} replaced by a new {algorithm} key in {to}; the old key is destroyed once the API \
                     server has accepted the new certificate\n"
                ))?;
            }
            Ok(Response::Status { status }) => {
                for identity in &status.identities {
                    let key = identity.key.as_ref().map(|key| format!("{}:{}", key.backend, key.id));
                    print(&format!("migrated: key {}, serial {}\n", key.unwrap_or_default(), identity.serial))?;
                }
            }
            Ok(Response::Failed { reason, hint }) => return Err(CliError::new(failed, reason, hint)),
            Err(error @ ControlError::NotRunning) => {
                let hint = "start the agent with pintle run; or set backend in its configuration file, then start it";
                return Err(CliError::new(Exit::Problem, error, hint));
            }
            answer => return Err(super::unexpected(answer)),
        }
        Ok(Exit::Ok)
    }
}
