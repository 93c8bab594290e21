//! `pintle demo`.

use std::time::Duration;

use super::{CliError, Exit};
use crate::demo::device::Backend;
use crate::demo::run::{self, Options};

/// The arguments of `pintle demo`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Lifetime of the certificates, like kube-controller-manager's flag, such as 12s or 1h
    #[arg(long, value_name = "DURATION", default_value = "12s", value_parser = duration)]
    cluster_signing_duration: Duration,
    /// Leave requests Pending until you approve them with kubectl
    #[arg(long)]
    manual_approval: bool,
    /// Continue after two rotations, and print how to inspect the demo with kubectl and openssl
    #[arg(long)]
    keep: bool,
    /// Backend for the private keys. The device belongs to the demo and is removed afterwards
    #[arg(long, value_enum, default_value = "file")]
    backend: Backend,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let options = Options {
            cluster_signing_duration: self.cluster_signing_duration,
            manual_approval: self.manual_approval,
            keep: self.keep,
            backend: self.backend,
        };
        super::runtime()?.block_on(run::run(options))?;
        Ok(Exit::Ok)
    }
}

/// Parses a duration in Go's format, of at least five seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration =
        text.parse().map_err(|_| format!("{text:?} is not a duration such as 12s or 1h"))?;
    match Duration::try_from(parsed) {
        Ok(duration) if duration >= Duration::from_secs(5) => Ok(duration),
        _ => Err("too short: the minimum is 5s".to_owned()),
    }
}
