//! `pintle config`.

use std::path::PathBuf;

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
        let path =
            |path: &Option<PathBuf>| path.as_ref().map_or_else(|| "none".to_owned(), |path| path.display().to_string());
        let backends: Vec<_> = config.backends.keys().map(String::as_str).collect();
        let expiration = config.expiration_seconds;
        let lines = [
            ("node-name", config.node_name.clone()),
            ("kubeconfig", config.kubeconfig.display().to_string()),
            ("bootstrap-kubeconfig", path(&config.bootstrap_kubeconfig)),
            ("cert-dir", config.cert_dir.display().to_string()),
            ("state-dir", config.state_dir.display().to_string()),
            ("rotate-certificates", config.rotate_certificates.to_string()),
            ("client-ca-file", path(&config.client_ca_file)),
            ("backend", config.backend.clone()),
            ("backends", backends.join(", ")),
            ("key-algorithm", config.key_algorithm.to_string()),
            ("on-key-loss", if config.enrol_after_key_loss { "enrol" } else { "wait" }.to_owned()),
            ("keep-pairs", config.keep_pairs.to_string()),
            (
                "expiration-seconds",
                expiration.map_or_else(|| "what the signer gives".to_owned(), |seconds| seconds.to_string()),
            ),
        ];
        for (name, value) in lines {
            print(&format!("{name:<22}{value}\n"));
        }
        Ok(Exit::Ok)
    }
}
