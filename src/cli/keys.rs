//! `pintle keys`: list and delete the keys in the backends.

use super::backend::{open_all, problem_lines, usage_line};
use super::run::lock_state_directory;
use super::table::table;
use super::{CliError, Exit, print};
use crate::config::{Config, Flags};
use crate::keys::inventory::{self, Inventory, KeyEntry, KeyUse, Selection, Usage};
use crate::node::control::{self, ControlError, Request, Response};

/// The commands under `pintle keys`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show the keys in all backends, and what each is used for
    List {
        #[command(flatten)]
        flags: Box<Flags>,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Destroy the keys that this installation created and no longer uses, or the specified keys
    Prune {
        #[command(flatten)]
        flags: Box<Flags>,
        /// Keys to destroy, as in the output of keys list: ID, or BACKEND:ID. Make sure that no other node uses them
        #[arg(value_name = "KEY")]
        names: Vec<String>,
        /// Only show what would be destroyed
        #[arg(long)]
        dry_run: bool,
    },
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::List { flags, json } => list(&Config::load(&flags)?, json),
            Self::Prune { flags, names, dry_run } => prune(&Config::load(&flags)?, names, dry_run),
        }
    }
}

fn list(config: &Config, json: bool) -> Result<Exit, CliError> {
    let inventory = keys(config)?;
    if json {
        print(&super::json(&inventory)?)?;
    } else {
        print(&rows(&inventory.keys))?;
        print(&notes(&inventory))?;
    }
    Ok(exit(&inventory))
}

/// All keys, as reported by the running agent, or else from the backends and journals.
fn keys(config: &Config) -> Result<Inventory, CliError> {
    match control::ask(&config.node.control_socket(), Request::Keys) {
        Ok(Response::Keys { inventory }) => Ok(inventory),
        Err(ControlError::NotRunning) => {
            let keyring = open_all(config)?;
            super::runtime()?.block_on(inventory::keys(&config.node, &keyring, || journalled(config)))
        }
        answer => Err(super::unexpected(answer)),
    }
}

fn prune(config: &Config, names: Vec<String>, dry_run: bool) -> Result<Exit, CliError> {
    if !names.is_empty() {
        // The keys' uses are checked before anything is destroyed.
        let (selected, _) = inventory::named(&keys(config)?.keys, &names, true);
        if !selected.is_empty() {
            print(&rows(&selected))?;
        }
    }
    let request = match &names[..] {
        [] => Request::Prune { dry_run },
        names => Request::PruneNamed { names: names.to_vec(), dry_run },
    };
    let inventory = match control::ask(&config.node.control_socket(), request) {
        Ok(Response::Keys { inventory }) => inventory,
        Err(ControlError::NotRunning) => {
            // Prevents an agent from starting and using a key that is being destroyed.
            let _lock = lock_state_directory(&config.node.state_dir)?;
            let keyring = open_all(config)?;
            let selection = if names.is_empty() { Selection::Orphaned } else { Selection::Named(names) };
            let journalled = || journalled(config);
            super::runtime()?.block_on(inventory::prune(&config.node, &keyring, journalled, &selection, dry_run))?
        }
        answer => return Err(super::unexpected(answer)),
    };
    let done = if dry_run { "would be destroyed" } else { "destroyed" };
    for key in &inventory.keys {
        print(&format!("{done}: {} ({})\n", key.name(), key.used.word()))?;
    }
    for Usage { backend, resources } in &inventory.usage {
        print(&usage_line(&format!("freed in {backend}"), resources))?;
    }
    if inventory.keys.is_empty() {
        print("nothing to destroy\n")?;
    }
    for failure in inventory.unreachable.iter().chain(&inventory.failed) {
        print(&problem_lines(&failure.name, &failure.error))?;
    }
    Ok(exit(&inventory))
}

fn rows(keys: &[KeyEntry]) -> String {
    let header = ["BACKEND", "ID", "ALGORITHM", "USE"].map(str::to_owned).to_vec();
    let rows = keys
        .iter()
        .map(|key| vec![key.backend.clone(), key.id.to_string(), key.algorithm.clone(), key.used.word().to_owned()]);
    table(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
}

/// The lines below the table.
fn notes(inventory: &Inventory) -> String {
    let any = |used| inventory.keys.iter().any(|key| key.used == used);
    let mut text = String::new();
    for Usage { backend, resources } in &inventory.usage {
        text += &usage_line(backend, resources);
    }
    for failure in &inventory.unreachable {
        text += &problem_lines(&failure.name, &failure.error);
    }
    if any(KeyUse::Orphaned) {
        text += "  hint: pintle keys prune destroys orphaned keys\n";
    }
    if any(KeyUse::LeftOver) {
        text += "  left-over: from an interrupted pintle backend check, on this or another node that uses the device\n";
    }
    if any(KeyUse::Unknown) {
        text += "  unknown: not in a journal of this node; another node, cluster or installation may use it\n";
    }
    if any(KeyUse::LeftOver) || any(KeyUse::Unknown) {
        text += "  hint: pintle keys prune BACKEND:ID destroys such a key; make sure first that nothing uses it\n";
    }
    text
}

fn exit(inventory: &Inventory) -> Exit {
    if inventory.unreachable.is_empty() && inventory.failed.is_empty() { Exit::Ok } else { Exit::Problem }
}

/// The journals of all identities.
fn journalled(config: &Config) -> Result<Vec<pintle_agent_core::State>, CliError> {
    config.identities.iter().filter_map(|identity| super::status::journalled(identity).transpose()).collect()
}
