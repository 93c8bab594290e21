//! The configuration file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pintle_plugins_api::KeyAlgorithm;
use serde::Deserialize;

use super::identity::{DEFAULT_IDENTITY, IdentityTable, OnKeyLoss};
use super::proxy::ProxyTable;
use super::settings::{given_settings, identity_settings, move_settings, with_settings};
use super::{ConfigError, suggestion};
use crate::parse_error;
use crate::world::{User, files};

identity_settings! { with_settings!
    /// The configuration file as it stands; what is left out has a default or comes from a flag.
    #[derive(Clone, Debug, Default, Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    pub struct FileConfiguration {
        pub(super) node_name: Option<String>,
        pub(super) kubeconfig: Option<PathBuf>,
        pub(super) bootstrap_kubeconfig: Option<PathBuf>,
        pub(super) state_dir: Option<PathBuf>,
        pub(super) metrics_address: Option<SocketAddr>,
        #[serde(default)]
        pub(super) identity: Vec<IdentityTable>,
        #[serde(default)]
        pub(super) backends: BTreeMap<String, BackendConfiguration>,
    }
}

/// A backend's table, `[backends.NAME]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum BackendConfiguration {
    /// Keys as PKCS#8 files.
    File {
        /// Where they are [default: `keys` in the state directory].
        directory: Option<PathBuf>,
    },
    /// Keys in a PKCS#11 token.
    Pkcs11 {
        /// The token, a `pkcs11:` URI (RFC 7512) without a PIN.
        uri: String,
        /// The module's absolute path, if the URI does not say it.
        module: Option<PathBuf>,
        /// The PIN's file, if the URI does not say it: absolute, or a name in systemd's credentials directory.
        pin_file: Option<PathBuf>,
        /// Where the module runs.
        #[serde(default)]
        isolation: Isolation,
    },
    /// Keys in a TPM 2.0.
    Tpm {
        /// How it is reached, in the words of libtss2 [default: `device:/dev/tpmrm0`].
        tcti: Option<String>,
        /// The directory of the key files, which only this TPM can use: it must exist [default: `tpm` in the state
        /// directory, which is made].
        directory: Option<PathBuf>,
        /// The plugin [default: `pintle_backend_tpm` in /usr/lib/pintle/plugins].
        library: Option<String>,
        /// Where the plugin runs.
        #[serde(default)]
        isolation: Isolation,
    },
    /// Keys in whatever a plugin reaches.
    Plugin {
        /// The bare name of a file in /usr/lib/pintle/plugins, or an absolute path.
        library: String,
        /// What the plugin is given, as a JSON object.
        #[serde(default)]
        configuration: PluginTable,
        /// Where the plugin runs.
        #[serde(default)]
        isolation: Isolation,
    },
}

impl BackendConfiguration {
    /// The word for its type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Pkcs11 { .. } => "pkcs11",
            Self::Tpm { .. } => "tpm",
            Self::Plugin { .. } => "plugin",
        }
    }

    /// Where its module runs; the file backend has none.
    pub fn isolation(&self) -> Option<&Isolation> {
        match self {
            Self::File { .. } => None,
            Self::Pkcs11 { isolation, .. } | Self::Tpm { isolation, .. } | Self::Plugin { isolation, .. } => {
                Some(isolation)
            }
        }
    }
}

/// Where a module runs.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "WrittenIsolation")]
pub enum Isolation {
    /// In the agent: fastest, and the module can take the agent along.
    None,
    /// In a process of its own.
    Process(ProcessIsolation),
}

impl Default for Isolation {
    fn default() -> Self {
        Self::Process(ProcessIsolation::default())
    }
}

/// The process that a module runs in.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ProcessIsolation {
    /// The user that it runs as, a name or a number [default: the agent's].
    pub user: Option<String>,
    /// Its only group, such as `tss` [default: the user's own].
    pub group: Option<String>,
    /// What is added to the agent's own environment, such as a module's configuration file. No place for secrets.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

impl ProcessIsolation {
    /// The user and group that it names; `None` if it is the agent's own.
    ///
    /// # Errors
    /// If there is no such user or group.
    pub fn run_as(&self) -> std::io::Result<Option<User>> {
        match (&self.user, &self.group) {
            (Some(user), Some(group)) => User::with_group(user, group).map(Some),
            (Some(user), None) => User::named(user).map(Some),
            (None, _) => Ok(None),
        }
    }
}

/// `"none"`, `"process"`, or a table.
#[derive(Deserialize)]
#[serde(untagged, expecting = "isolation is \"process\", \"none\", or a table of user, group and environment")]
enum WrittenIsolation {
    Word(IsolationWord),
    Table(ProcessIsolation),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum IsolationWord {
    None,
    Process,
}

impl TryFrom<WrittenIsolation> for Isolation {
    type Error = String;

    fn try_from(written: WrittenIsolation) -> Result<Self, String> {
        match written {
            WrittenIsolation::Word(IsolationWord::None) => Ok(Self::None),
            WrittenIsolation::Word(IsolationWord::Process) => Ok(Self::default()),
            WrittenIsolation::Table(ProcessIsolation { user: None, group: Some(_), .. }) => {
                Err("isolation names a group and no user".to_owned())
            }
            WrittenIsolation::Table(process) => Ok(Self::Process(process)),
        }
    }
}

/// A plugin's own configuration.
#[derive(Clone, Default, PartialEq, Deserialize)]
pub struct PluginTable(serde_json::Map<String, serde_json::Value>);

impl PluginTable {
    /// The JSON object that the plugin is given.
    pub fn to_json(&self) -> String {
        serde_json::Value::Object(self.0.clone()).to_string()
    }
}

impl std::fmt::Debug for PluginTable {
    /// The names only: nobody here knows which value is a secret.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_set().entries(self.0.keys()).finish()
    }
}

impl FileConfiguration {
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = files::read_to_string(path).map_err(|error| ConfigError {
            detail: format!("the configuration file {} cannot be read: {error}", path.display()),
            hint: "name an existing file with --config".to_owned(),
        })?;
        Self::parse(&text, path)
    }

    pub(super) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let hint = match suggestion::for_unknown_key::<Self, IdentityTable, ProxyTable>(text) {
                Some(meant) => format!("did you mean {meant}? docs/operators.md lists the keys"),
                None => "docs/operators.md lists the keys; check the file with pintle config check".to_owned(),
            };
            ConfigError { detail: format!("{}, {}", path.display(), parse_error::toml(text, &error)), hint }
        })
    }

    /// The top-level keys given that are about one identity rather than about the node.
    pub(super) fn keys_of_one_identity(&self) -> Vec<&'static str> {
        identity_settings!(given_settings! self)
    }

    /// The identity that the top-level keys describe.
    pub(super) fn take_only_identity(&mut self) -> IdentityTable {
        let mut identity = IdentityTable { name: DEFAULT_IDENTITY.to_owned(), ..IdentityTable::default() };
        identity_settings!(move_settings! self => identity);
        identity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_its_line() {
        for (text, line) in [
            ("keep-pairs = 2\n\nunknown = 1\n", 3),
            ("unknown = 1\n", 1),
            ("keep-pairs = 2\nnode-name = 5\n", 2),
            ("[backends.x]\ntype = \"file\"\n\n[backends.y]\ntype = \"paper\"\n", 5),
        ] {
            let error = FileConfiguration::parse(text, Path::new("config.toml")).expect_err(text);
            assert!(error.detail.starts_with(&format!("config.toml, line {line}: ")), "{text}: {error}");
        }
    }
}
