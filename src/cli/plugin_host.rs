//! `pintle plugin-host`: the child process that runs a module. Started only by the agent.

use super::{CliError, Exit};
use crate::keys::isolation::host;

/// The arguments of `pintle plugin-host`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The backend's name, shown in the process list
    #[allow(dead_code, reason = "it is only there to be shown by ps(1)")]
    backend: String,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        host::serve().map_err(|detail| CliError::new(Exit::Problem, detail, ""))?;
        Ok(Exit::Ok)
    }
}
