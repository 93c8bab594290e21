//! `pintle plugin-host`: the child that holds a module. Only the agent starts it.

use super::{CliError, Exit};
use crate::keys::isolation::host;

/// The arguments of `pintle plugin-host`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The backend, for whoever looks at the list of processes
    #[allow(dead_code, reason = "it is there to be seen in ps(1)")]
    backend: String,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        host::serve().map_err(|detail| CliError::new(Exit::Problem, detail, ""))?;
        Ok(Exit::Ok)
    }
}
