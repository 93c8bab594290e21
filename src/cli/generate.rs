//! Completions and manual pages, generated from the command line's own definition.

use std::path::PathBuf;

use clap::CommandFactory;

use super::{Cli, CliError, Exit, print};

/// The arguments of `pintle completions`.
#[derive(clap::Args)]
pub(super) struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "pintle", &mut script);
        print(&String::from_utf8_lossy(&script))?;
        Ok(Exit::Ok)
    }
}

/// The arguments of `pintle man`.
#[derive(clap::Args)]
pub(super) struct Man {
    /// The directory to write them to
    directory: PathBuf,
}

impl Man {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let written = std::fs::create_dir_all(&self.directory)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &self.directory));
        written.map_err(|error| {
            let detail = format!("the manual pages cannot be written to {}: {error}", self.directory.display());
            CliError::new(Exit::Problem, detail, "name a directory that you may write to")
        })?;
        Ok(Exit::Ok)
    }
}
