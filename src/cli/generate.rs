//! Shell completions and manual pages, generated from the command line's definition.

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
            let detail = format!("cannot write the manual pages to {}: {error}", self.directory.display());
            CliError::new(Exit::Problem, detail, "specify a directory with write permission")
        })?;
        Ok(Exit::Ok)
    }
}
