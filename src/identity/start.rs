//! Starting an agent: what it finds, and what only a person can mend.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use pintle_agent_core::State;
use pintle_agent_core::pem_block::PemBlocks;
use pintle_agent_core::rotation::Found;

use super::recovery::{Recovery, Standing};
use super::start_error::{StartError, renamed};
use super::unfinished::Unfinished;
use super::{Agent, Parts};
use crate::config::IdentityConfig;
use crate::consumers::kubeconfig;
use crate::store::journal::JournalError;
use crate::store::{Journal, PairDirectory};
use crate::telemetry::{Event, Telemetry};
use crate::world::Files;
use crate::world::files::{FileLock, LONGEST_FILE};

pub(super) async fn start(parts: Parts) -> Result<Agent, StartError> {
    let Parts { config, ports, telemetry, commands, installed } = parts;
    let files = Arc::clone(&ports.files);
    let template = config.template();
    let authorities = config.client_ca_file.as_ref().map(|path| read_authorities(files.as_ref(), path)).transpose()?;
    let journal = Journal::on(Arc::clone(&files), config.journal(), template.clone());
    let pairs = PairDirectory::on(Arc::clone(&files), config.cert_dir.clone(), config.pair_prefix());
    telemetry.emit(Event::Started {
        subject: template.common_name.clone(),
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
    let pairs_lock = lock(files.as_ref(), &config.cert_dir)?;
    let journalled = journalled.unwrap_or_default();
    let installation = match journalled.installation() {
        "" => (ports.installation)().map_err(|_| StartError {
            detail: "the system gives no random numbers".to_owned(),
            hint: "check that this process may use getrandom(2)".to_owned(),
        })?,
        known => known.to_owned(),
    };
    let policy = config.policy(&installation);
    let recovery = Recovery {
        config: &config,
        policy: &policy,
        template: &template,
        ports: &ports,
        telemetry: &telemetry,
        pairs: &pairs,
    };
    let mut told = BTreeSet::new();
    let standing = recovery.find_held(&journalled, &mut told).await?;
    let (found, unfinished) = match standing {
        Standing::Found(found) => (found, None),
        Standing::Unknown(missing) => (Found::AsJournalled, Some(Unfinished::new(missing, told))),
    };
    let state = State::recovered(Some(journalled), installation, found, ports.clock.now(), &policy);
    if config.owns_kubeconfig
        && let Some(reason) = kubeconfig::staleness(files.as_ref(), &config.kubeconfig, &pairs.current())
    {
        telemetry.emit(Event::KubeconfigStale { path: config.kubeconfig.display().to_string(), reason });
    }

    let mut agent = Agent {
        reporter: super::report::Reporter::default(),
        probe: super::environment::Probe::default(),
        watchable: None,
        config,
        policy,
        template,
        authorities,
        journal,
        pairs,
        ports,
        telemetry,
        commands,
        installed,
        state,
        _pairs_lock: pairs_lock,
        unfinished,
    };
    // Before anybody is told that all is well (case C39).
    agent.check_files().await;
    Ok(agent)
}

/// Locks the directory of pairs: agents with state directories of their own would still prune each other's pairs.
fn lock(files: &dyn Files, directory: &Path) -> Result<Option<FileLock>, StartError> {
    let failed = |detail: String, hint: &str| StartError { detail, hint: hint.to_owned() };
    match files.try_lock(directory) {
        Ok(Some(lock)) => Ok(Some(lock)),
        Ok(None) => Err(failed(
            format!("another pintle publishes into {}", directory.display()),
            "give each agent its own --cert-dir",
        )),
        // Some network file systems have no locks; two agents there are not told apart.
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(failed(
            format!("the directory {} cannot be read: {error}", directory.display()),
            "run pintle as its owner",
        )),
    }
}

pub(super) fn read_authorities(files: &dyn Files, path: &Path) -> Result<Vec<Vec<u8>>, StartError> {
    let failed = |detail: String| StartError {
        detail: format!("the authority's certificates in {} cannot be used: {detail}", path.display()),
        hint: "name a PEM file of certificates with --client-ca-file, or leave it out".to_owned(),
    };
    let text = files.read(path, LONGEST_FILE).map_err(|error| failed(error.to_string()))?;
    PemBlocks::of(&*text).certificates().map_err(|error| failed(error.to_string()))
}

fn read_journal(
    journal: &Journal,
    config: &IdentityConfig,
    telemetry: &Telemetry,
) -> Result<Option<State>, StartError> {
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
