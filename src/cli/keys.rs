//! `pintle keys`: what is in the backends.

use super::backend::{open_all, trouble, usage};
use super::run::lock_state_directory;
use super::table::table;
use super::{CliError, Exit, print};
use crate::config::{Config, Flags};
use crate::keys::inventory::{self, Inventory, Standing, Usage};
use crate::node::control::{self, ControlError, Request, Response};

/// The commands under `pintle keys`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show the keys in all backends, and what each is for
    List {
        #[command(flatten)]
        flags: Box<Flags>,
        /// JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Destroy keys of this node's identities that nobody needs, and what interrupted checks have left
    Prune {
        #[command(flatten)]
        flags: Box<Flags>,
        /// Only show what would be destroyed
        #[arg(long)]
        dry_run: bool,
    },
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::List { flags, json } => list(&Config::load(&flags)?, json),
            Self::Prune { flags, dry_run } => prune(&Config::load(&flags)?, dry_run),
        }
    }
}

fn list(config: &Config, json: bool) -> Result<Exit, CliError> {
    let inventory = match control::ask(&config.node.control_socket(), Request::Keys) {
        Ok(Response::Keys { inventory }) => inventory,
        Err(ControlError::NotRunning) => {
            let states = journalled(config)?;
            let keyring = open_all(config)?;
            super::runtime()?.block_on(async {
                let mut views = Vec::new();
                for (identity, state) in config.identities.iter().zip(&states) {
                    views.push(inventory::keys(identity, &keyring, state.as_ref()).await);
                }
                inventory::merged(views)
            })
        }
        answer => return Err(super::unexpected(answer)),
    };
    if json {
        print(&super::json(&inventory)?)?;
    } else {
        print(&rows(&inventory))?;
        if inventory.keys.iter().any(|key| key.standing.is_prunable()) {
            print("  hint: pintle keys prune destroys what is orphaned or left over\n")?;
        }
    }
    Ok(end(&inventory))
}

fn prune(config: &Config, dry_run: bool) -> Result<Exit, CliError> {
    let inventory = match control::ask(&config.node.control_socket(), Request::Prune { dry_run }) {
        Ok(Response::Keys { inventory }) => inventory,
        Err(ControlError::NotRunning) => {
            // No agent may start now and need what is being destroyed.
            let _lock = lock_state_directory(&config.node.state_dir)?;
            let states = journalled(config)?;
            let keyring = open_all(config)?;
            super::runtime()?.block_on(async {
                let mut views = Vec::new();
                for (identity, state) in config.identities.iter().zip(&states) {
                    views.push(inventory::prune(identity, &keyring, state.as_ref(), dry_run).await);
                }
                inventory::merged(views)
            })
        }
        answer => return Err(super::unexpected(answer)),
    };
    let done = if dry_run { "would be destroyed" } else { "destroyed" };
    for key in &inventory.keys {
        print(&format!("{done}: {}:{} ({})\n", key.backend, key.id, key.standing.word()))?;
    }
    for Usage { backend, resources } in &inventory.usage {
        print(&usage(&format!("freed in {backend}"), resources))?;
    }
    if inventory.keys.is_empty() && inventory.failed.is_empty() {
        print("nothing to destroy\n")?;
    }
    for failure in inventory.unreachable.iter().chain(&inventory.failed) {
        print(&trouble(&failure.name, &failure.error))?;
    }
    Ok(end(&inventory))
}

fn rows(inventory: &Inventory) -> String {
    let header = ["BACKEND", "ID", "ALGORITHM", "STANDING"].map(str::to_owned).to_vec();
    let keys = inventory.keys.iter().map(|key| {
        vec![key.backend.clone(), key.id.to_string(), key.algorithm.clone(), key.standing.word().to_owned()]
    });
    let mut text = table(&std::iter::once(header).chain(keys).collect::<Vec<_>>());
    if inventory.keys.iter().any(|key| key.standing == Standing::Unknown) {
        text += "  unknown: the journal does not say which key is in use; pintle run finds out\n";
    }
    for Usage { backend, resources } in &inventory.usage {
        text += &usage(backend, resources);
    }
    for failure in &inventory.unreachable {
        text += &trouble(&failure.name, &failure.error);
    }
    text
}

fn end(inventory: &Inventory) -> Exit {
    if inventory.unreachable.is_empty() && inventory.failed.is_empty() { Exit::Ok } else { Exit::Problem }
}

/// What the journals say, in the order of the identities.
fn journalled(config: &Config) -> Result<Vec<Option<pintle_agent_core::State>>, CliError> {
    config.identities.iter().map(super::status::journalled).collect()
}
