//! `pintle needs-renewal`.

use std::path::PathBuf;

use pintle_agent_core::UnixTime;

use super::{CliError, Exit};
use crate::agent::clock;
use crate::config::{Config, Flags};
use crate::store::PairDirectory;

/// The arguments of `pintle needs-renewal`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// The certificate to look at, PEM [default: the current pair]
    file: Option<PathBuf>,
    /// Due once less than this part of its usable life is left, per cent
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u8).range(0..=100))]
    expires_in: u8,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let unknown = |detail: String| CliError::new(Exit::Unknown, detail, "name a PEM file with a certificate");
        let path = match self.file {
            Some(file) => file,
            None => {
                // Not 2, which would say that there is no certificate.
                let config = Config::load(&self.flags)
                    .map_err(|error| CliError::new(Exit::Unknown, &error, error.hint.clone()))?;
                PairDirectory::new(config.cert_dir, "kubelet-client").current()
            }
        };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let detail = format!("there is no certificate {}", path.display());
                return Err(CliError::new(Exit::Usage, detail, "pintle run gets one"));
            }
            Err(error) => return Err(unknown(format!("{} cannot be read: {error}", path.display()))),
        };
        let leaf = pem::parse_many(&text).unwrap_or_default().into_iter().find(|block| block.tag() == "CERTIFICATE");
        let leaf = leaf.ok_or_else(|| unknown(format!("{} holds no certificate", path.display())))?;
        let (_, leaf) = x509_parser::parse_x509_certificate(leaf.contents())
            .map_err(|error| unknown(format!("{} holds no certificate: {error}", path.display())))?;
        let time = |at: &x509_parser::time::ASN1Time| UnixTime::from_seconds(at.timestamp());
        let (begin, end) = (time(&leaf.validity().not_before), time(&leaf.validity().not_after));
        // As the agent does, the usable life counts from when the pair was written: signers set notBefore into the past.
        let written = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).ok();
        let written = written.and_then(|written| written.duration_since(std::time::UNIX_EPOCH).ok());
        let written = UnixTime::from_milliseconds(
            written.and_then(|written| i64::try_from(written.as_millis()).ok()).unwrap_or_default(),
        );
        let begin = begin.max(written).min(end);
        let left = end.since(clock::now());
        let due = left <= end.since(begin) * u32::from(self.expires_in) / 100;
        Ok(if due { Exit::Ok } else { Exit::Problem })
    }
}
