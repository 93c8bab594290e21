//! `pintle needs-renewal`.

use std::path::PathBuf;

use pintle_agent_core::issued::Leaf;
use zeroize::Zeroizing;

use super::{CliError, Exit};
use crate::config::{Config, ConfigError, Flags};
use crate::store::pair::{installed_at, text_of};
use crate::world::clock;

/// The arguments of `pintle needs-renewal`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// The certificate to check, PEM [default: the current pair]
    file: Option<PathBuf>,
    /// The identity whose current pair to check [default: the only one]
    #[arg(long, value_name = "NAME", conflicts_with = "file")]
    identity: Option<String>,
    /// Report as due when less than this percentage of its usable lifetime is left
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u8).range(0..=100))]
    expires_in: u8,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let unknown = |detail: String| CliError::new(Exit::Unknown, detail, "specify a PEM file with a certificate");
        let path = match self.file {
            Some(file) => file,
            None => {
                // Not 2, which would mean that there is no certificate.
                let unknown = |error: ConfigError| CliError::new(Exit::Unknown, &error, error.hint.clone());
                let config = Config::load(&self.flags).map_err(unknown)?;
                config.identity(self.identity.as_deref()).map_err(unknown)?.pairs().current()
            }
        };
        let text = match std::fs::read(&path).map(Zeroizing::new) {
            Ok(content) => text_of(&content),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let detail = format!("no certificate at {}", path.display());
                return Err(CliError::new(Exit::Usage, detail, "pintle run obtains one"));
            }
            Err(error) => return Err(unknown(format!("{} cannot be read: {error}", path.display()))),
        };
        let leaf = Leaf::of(&text).map_err(|rejection| unknown(format!("{}: {rejection}", path.display())))?;
        // As in the agent, the usable lifetime starts when the pair was written: signers backdate notBefore.
        let written = installed_at(&path).unwrap_or(leaf.not_before);
        let (begin, end) = (leaf.not_before.max(written).min(leaf.not_after), leaf.not_after);
        let left = end.since(clock::now());
        let due = left <= end.since(begin) * u32::from(self.expires_in) / 100;
        Ok(if due { Exit::Ok } else { Exit::Problem })
    }
}
