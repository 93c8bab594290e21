//! Flags and a TOML file become a [`Config`]: whatever is wrong with them is said here, before anything is done.

mod backends;
mod file;
mod flags;
mod identity;
pub mod migration;
mod node;
mod proxy;
mod settings;
mod suggestion;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use file::{BackendConfiguration, FileConfiguration, Isolation, PluginTable, ProcessIsolation};
pub use flags::Flags;
pub use identity::{DEFAULT_IDENTITY, IdentityConfig, IdentityKind};
pub use node::{FILE_BACKEND, NodeConfig};
pub use proxy::{ProxyConfiguration, ProxySettings};

use identity::{IdentityTable, NodeKubeconfigs};

use crate::world::{Files as _, SystemFiles};

/// Where the configuration is looked for when no `--config` is given.
pub const DEFAULT_CONFIG: &str = "/etc/pintle/config.toml";

/// What is wrong with the configuration.
#[derive(Debug)]
pub struct ConfigError {
    /// What is wrong, and where.
    pub detail: String,
    /// What to do about it.
    pub hint: String,
}

impl ConfigError {
    fn new(detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { detail: detail.into(), hint: hint.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.detail)
    }
}

impl std::error::Error for ConfigError {}

/// What the agent is to do: for a node, and for each of its identities.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What the identities share.
    pub node: Arc<NodeConfig>,
    /// The identities, at least one, in the order of the configuration file.
    pub identities: Vec<IdentityConfig>,
}

impl Config {
    /// Reads the file that the flags name, or the default one if it exists, and lets the flags override it.
    ///
    /// # Errors
    /// The first thing that is wrong, with what to do about it.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let file = match &flags.config {
            Some(path) => FileConfiguration::read(path)?,
            None if SystemFiles.exists(Path::new(DEFAULT_CONFIG)) => {
                FileConfiguration::read(Path::new(DEFAULT_CONFIG))?
            }
            None => FileConfiguration::default(),
        };
        let mut config = Self::from_parts(flags.clone(), file)?;
        config.identities.iter_mut().try_for_each(migration::follow)?;
        Ok(config)
    }

    fn from_parts(flags: Flags, mut file: FileConfiguration) -> Result<Self, ConfigError> {
        let tables = identity_tables(&flags, &mut file)?;
        let name = flags.node_name.or(file.node_name).unwrap_or_else(node::host_name);
        node::check_node_name(&name)?;
        let mut backends = file.backends;
        backends.entry(FILE_BACKEND.to_owned()).or_insert_with(|| BackendConfiguration::File { directory: None });
        for backend in backends.values_mut() {
            if let BackendConfiguration::File { directory } | BackendConfiguration::Tpm { directory, .. } = backend {
                *directory = directory.as_deref().map(absolute).transpose()?;
            }
        }
        let state_dir = flags.state_dir.or(file.state_dir).unwrap_or_else(|| "/var/lib/pintle".into());
        let node = Arc::new(NodeConfig {
            name,
            state_dir: absolute(&state_dir)?,
            backends,
            metrics_address: flags.metrics_address.or(file.metrics_address),
        });
        backends::check(&node)?;
        let shared = NodeKubeconfigs {
            kubeconfig: flags.kubeconfig.or(file.kubeconfig),
            bootstrap_kubeconfig: flags.bootstrap_kubeconfig.or(file.bootstrap_kubeconfig),
        };
        let several = tables.len() > 1;
        let heir = tables.iter().position(|table| table.kubeconfig.is_none());
        let resolve = |(index, table): (usize, IdentityTable)| {
            let name = table.name.clone();
            table.resolve(&node, &shared, heir == Some(index)).map_err(|error| match several {
                true => ConfigError { detail: format!("[[identity]] {name:?}: {}", error.detail), ..error },
                false => error,
            })
        };
        let identities = tables.into_iter().enumerate().map(resolve).collect::<Result<Vec<_>, _>>()?;
        identity::check_distinct(&identities)?;
        Ok(Self { node, identities })
    }

    /// The identity of this name; where none is named, the only one.
    ///
    /// # Errors
    /// If there is no such identity, or if none is named and there are several.
    pub fn identity(&self, name: Option<&str>) -> Result<&IdentityConfig, ConfigError> {
        let known: Vec<_> = self.identities.iter().map(|identity| identity.name.as_str()).collect();
        let known = known.join(", ");
        match (name, self.identities.as_slice()) {
            (None, [only]) => Ok(only),
            (None, _) => Err(ConfigError::new(
                format!("the configuration has several identities: {known}"),
                "add the name of one as an argument (inspect and needs-renewal: --identity NAME)",
            )),
            (Some(name), identities) => identities.iter().find(|identity| identity.name == name).ok_or_else(|| {
                ConfigError::new(
                    format!("the configuration has no identity {name:?}; it has: {known}"),
                    "name one of these, or add a table [[identity]]",
                )
            }),
        }
    }
}

/// The identities' tables with the flags applied: those of the file or, if it has none, one made of the file's top-level
/// keys.
fn identity_tables(flags: &Flags, file: &mut FileConfiguration) -> Result<Vec<IdentityTable>, ConfigError> {
    let mut tables = std::mem::take(&mut file.identity);
    let top_level = file.keys_of_one_identity();
    if !tables.is_empty() && !top_level.is_empty() {
        return Err(ConfigError::new(
            format!("{} at the top level: with [[identity]] tables, each identity has its own", top_level.join(", ")),
            "move it into the table of the identity that it is meant for",
        ));
    }
    if tables.is_empty() {
        tables.push(file.take_only_identity());
    }
    let given = flags.of_one_identity();
    match tables.as_mut_slice() {
        [only] => only.apply(flags),
        _ if given.is_empty() => {}
        several => {
            return Err(ConfigError::new(
                format!("{}: there are {} identities, and a flag does not say which", given.join(", "), several.len()),
                "set it in the identity's table of the configuration file",
            ));
        }
    }
    Ok(tables)
}

/// This path made absolute: a kubeconfig names the pair, and is read from elsewhere.
fn absolute(path: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(path).map_err(|error| {
        let detail = format!("{:?} is not a path: {error}", path.display());
        ConfigError::new(detail, "give the path of a file or directory")
    })
}

#[cfg(test)]
mod tests;
