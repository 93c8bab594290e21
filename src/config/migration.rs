//! Where `pintle migrate` has moved an identity: it holds until the configuration names another backend.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Config, ConfigError, IdentityConfig};
use crate::parse_error;
use crate::store::durable;
use crate::world::files::LONGEST_FILE;
use crate::world::{Files, SystemFiles};

/// What stands in the file.
#[derive(Serialize, Deserialize)]
struct Migration {
    /// The backend that the configuration named at that time: a later change of the configuration takes precedence.
    configured: String,
    /// The backend that keys are made in instead.
    backend: String,
}

/// The configuration as it stands after the migrations that have been recorded since it was loaded.
pub(crate) fn followed(config: &Config) -> Config {
    let mut config = config.clone();
    for identity in &mut config.identities {
        identity.backend.clone_from(&identity.configured_backend);
        // What the agent itself wrote is readable; if it is not, what is configured is the best that is known.
        let _ = follow(identity);
    }
    config
}

/// Takes the backend of the identity's last migration, if it still holds.
pub(super) fn follow(config: &mut IdentityConfig) -> Result<(), ConfigError> {
    let path = config.migration();
    let migration = recorded(&SystemFiles, &path).map_err(|error| {
        ConfigError::new(
            format!("{} cannot be used: {}", path.display(), parse_error::json(&error)),
            "remove it, and name the backend in the configuration file",
        )
    })?;
    if let Some(Migration { configured, backend }) = migration
        && configured == config.backend
        && config.node.backends.contains_key(&backend)
    {
        config.backend = backend;
    }
    Ok(())
}

/// What was recorded, if it can be read: a user who may not read it may not run the agent either.
fn recorded(files: &dyn Files, path: &Path) -> Result<Option<Migration>, serde_json::Error> {
    let Ok(content) = files.read(path, LONGEST_FILE) else { return Ok(None) };
    serde_json::from_slice(&content).map(Some)
}

/// Records that the identity's keys are made in `backend` from now on.
///
/// # Errors
/// Whatever the file system says.
pub fn save(files: &dyn Files, config: &IdentityConfig, backend: &str) -> io::Result<()> {
    let path = config.migration();
    if backend == config.configured_backend {
        return remove(files, &path);
    }
    let migration = Migration { configured: config.configured_backend.clone(), backend: backend.to_owned() };
    durable::replace(files, &path, &serde_json::to_vec_pretty(&migration).map_err(io::Error::other)?, 0o600)
}

/// Removes the record of a migration after which the configuration has come to name another backend: it must not hold
/// again when the configuration comes back to the one from before.
///
/// # Errors
/// Whatever the file system says.
pub fn forget_outdated(files: &dyn Files, config: &IdentityConfig) -> io::Result<()> {
    let path = config.migration();
    match recorded(files, &path) {
        Ok(Some(migration)) if migration.configured != config.configured_backend => remove(files, &path),
        _ => Ok(()),
    }
}

fn remove(files: &dyn Files, path: &Path) -> io::Result<()> {
    match files.remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Flags;

    #[test]
    fn a_migration_holds_until_the_configuration_changes_its_mind() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("config.toml");
        let load = |backend: &str| {
            let tables = "[backends.one]\ntype = \"file\"\n[backends.two]\ntype = \"file\"\n";
            std::fs::write(&file, format!("backend = \"{backend}\"\n{tables}")).expect("written");
            let flags = Flags {
                config: Some(file.clone()),
                node_name: Some("worker-1".to_owned()),
                state_dir: Some(directory.path().to_owned()),
                ..Flags::default()
            };
            Config::load(&flags).expect("valid").identities.remove(0)
        };
        let config = load("file");
        save(&SystemFiles, &config, "one").expect("saved");
        let moved = load("file");
        assert_eq!((moved.backend.as_str(), moved.configured_backend.as_str()), ("one", "file"));
        let changed = load("two");
        assert_eq!(changed.backend, "two");
        forget_outdated(&SystemFiles, &moved).expect("kept");
        assert_eq!(load("file").backend, "one");
        forget_outdated(&SystemFiles, &changed).expect("removed");
        assert_eq!(load("file").backend, "file", "an agent has run with another backend meanwhile");
        save(&SystemFiles, &moved, "file").expect("saved");
        assert_eq!(load("file").backend, "file");
    }
}
