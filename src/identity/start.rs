//! Starting an agent: what it finds, and what only a person can mend.

use std::fmt;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pintle_agent_core::State;

use super::connection::Connections;
use super::recovery::Recovery;
use super::{Agent, Parts};
use crate::config::Config;
use crate::consumers::kubeconfig;
use crate::store::journal::JournalError;
use crate::store::{Journal, PairDirectory};
use crate::telemetry::{Event, Telemetry};
use crate::world::SystemClock;
use crate::world::{Files, SystemFiles};

/// Why an agent cannot start: only a person can mend it.
#[derive(Debug)]
pub struct StartError {
    /// What is wrong, and where.
    pub detail: String,
    /// What to do about it.
    pub hint: String,
}

impl fmt::Display for StartError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.detail)
    }
}

impl std::error::Error for StartError {}

pub(super) async fn start(parts: Parts) -> Result<Agent, StartError> {
    let Parts { config, keyring, telemetry, commands } = parts;
    let files: Arc<dyn Files> = Arc::new(SystemFiles);
    let (policy, template) = (config.policy(), config.template());
    let authorities = config.client_ca_file.as_ref().map(read_authorities).transpose()?;
    let journal = Journal::on(Arc::clone(&files), config.journal(), template.common_name.clone());
    let pairs = PairDirectory::on(Arc::clone(&files), config.cert_dir.clone(), "kubelet-client");
    telemetry.emit(Event::Started {
        identity: template.common_name.clone(),
        version: env!("CARGO_PKG_VERSION"),
        backend: config.backend.clone(),
    });

    let journalled = read_journal(&journal, &config, &telemetry)?;
    if let Err(error) = pairs.prepare() {
        return Err(StartError {
            detail: format!("the directory {} cannot be used: {error}", config.cert_dir.display()),
            hint: "make it a directory that pintle may write to, or name another with --cert-dir".to_owned(),
        });
    }
    let pairs_lock = lock(&config.cert_dir)?;
    let recovery =
        Recovery { config: &config, template: &template, keyring: &keyring, telemetry: &telemetry, pairs: &pairs };
    let mut state = journalled.unwrap_or_default();
    recovery.settle_held(&mut state).await?;
    recovery.settle_keys(&mut state, &policy.key_prefix).await;
    if let Some(reason) = kubeconfig::staleness(&config.kubeconfig, &pairs.current()) {
        telemetry.emit(Event::KubeconfigStale { path: config.kubeconfig.display().to_string(), reason });
    }

    Ok(Agent {
        clock: SystemClock::new(),
        connections: Connections::default(),
        reporter: super::report::Reporter::default(),
        probe: super::look_around::Probe::default(),
        config,
        policy,
        template,
        authorities,
        journal,
        pairs,
        keyring,
        telemetry,
        commands,
        state,
        _pairs_lock: pairs_lock,
        proxy: None,
    })
}

/// Locks the directory of pairs: agents with state directories of their own would still prune each other's pairs.
fn lock(directory: &Path) -> Result<File, StartError> {
    let failed = |detail: String, hint: &str| StartError { detail, hint: hint.to_owned() };
    let opened = File::open(directory).map_err(|error| {
        failed(format!("the directory {} cannot be read: {error}", directory.display()), "run pintle as its owner")
    })?;
    match opened.try_lock() {
        Ok(()) => Ok(opened),
        Err(TryLockError::WouldBlock) => Err(failed(
            format!("another pintle publishes into {}", directory.display()),
            "give each agent its own --cert-dir",
        )),
        // Some network file systems have no locks; two agents there are not told apart.
        Err(TryLockError::Error(_)) => Ok(opened),
    }
}

pub(super) fn read_authorities(path: &PathBuf) -> Result<Vec<Vec<u8>>, StartError> {
    let failed = |detail: String| StartError {
        detail: format!("the authority's certificates in {} cannot be used: {detail}", path.display()),
        hint: "name a PEM file of certificates with --client-ca-file, or leave it out".to_owned(),
    };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let blocks = pem::parse_many(text).map_err(|error| failed(error.to_string()))?;
    let certificates: Vec<_> =
        blocks.into_iter().filter(|block| block.tag() == "CERTIFICATE").map(pem::Pem::into_contents).collect();
    if certificates.is_empty() { Err(failed("there is none".to_owned())) } else { Ok(certificates) }
}

fn read_journal(journal: &Journal, config: &Config, telemetry: &Telemetry) -> Result<Option<State>, StartError> {
    let path = journal.path().display();
    match journal.load() {
        Ok(state) => Ok(state),
        Err(JournalError::Unreadable(reason)) => {
            // The pair and the keys still tell most of it.
            let instead = match journal.set_aside() {
                Ok(aside) => format!("it is kept as {}, and the state is taken from the pair on disk", aside.display()),
                Err(error) => format!("it cannot be moved aside either: {error}"),
            };
            telemetry.emit(Event::DiskUnusable { path: path.to_string(), reason, instead });
            Ok(None)
        }
        Err(JournalError::OtherIdentity { found, wanted }) => Err(renamed(&found, &wanted, config)),
        Err(error) => Err(StartError {
            detail: format!("the journal {path} cannot be used: {error}"),
            hint: error.hint().to_owned(),
        }),
    }
}

/// The node's name is not the one in the credential (case C12).
pub(super) fn renamed(found: &str, wanted: &str, config: &Config) -> StartError {
    let name = found.strip_prefix("system:node:").unwrap_or(found);
    StartError {
        detail: format!("the credential on this machine is of {found}, and this node is now {wanted}"),
        hint: format!(
            "to keep the old name: --node-name {name}; to enrol as the new one: mv {pki} {pki}.old && mv {state} \
             {state}.old, and start with --bootstrap-kubeconfig",
            pki = config.cert_dir.display(),
            state = config.state_dir.display()
        ),
    }
}
