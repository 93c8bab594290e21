//! `pintle config`.

use super::{CliError, Exit, print};
use crate::config::{Config, Flags};

/// The commands under `pintle config`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Check the configuration file and the flags, and show what they amount to
    Check {
        #[command(flatten)]
        flags: Box<Flags>,
    },
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let Self::Check { flags } = self;
        let config = Config::load(&flags)?;
        let bootstrap = config.bootstrap_kubeconfig.as_ref().map(|path| path.display().to_string());
        let lines = [
            ("node-name", config.node_name.clone()),
            ("kubeconfig", config.kubeconfig.display().to_string()),
            ("bootstrap-kubeconfig", bootstrap.unwrap_or_else(|| "none".to_owned())),
            ("cert-dir", config.cert_dir.display().to_string()),
            ("state-dir", config.state_dir.display().to_string()),
            ("rotate-certificates", config.rotate_certificates.to_string()),
            ("backend", config.backend.clone()),
            ("key-algorithm", config.key_algorithm.to_string()),
            ("keep-pairs", config.keep_pairs.to_string()),
        ];
        for (name, value) in lines {
            print(&format!("{name:<22}{value}\n"));
        }
        Ok(Exit::Ok)
    }
}
