//! The configuration file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pintle_plugins_api::KeyAlgorithm;
use serde::Deserialize;

use super::ConfigError;

/// The configuration file as it stands; what is left out has a default or comes from a flag.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileConfiguration {
    pub(super) node_name: Option<String>,
    pub(super) kubeconfig: Option<PathBuf>,
    pub(super) bootstrap_kubeconfig: Option<PathBuf>,
    pub(super) cert_dir: Option<PathBuf>,
    pub(super) state_dir: Option<PathBuf>,
    pub(super) rotate_certificates: Option<bool>,
    pub(super) client_ca_file: Option<PathBuf>,
    pub(super) keep_pairs: Option<usize>,
    pub(super) backend: Option<String>,
    pub(super) key_algorithm: Option<KeyAlgorithm>,
    pub(super) expiration_seconds: Option<i32>,
    pub(super) on_key_loss: Option<OnKeyLoss>,
    #[serde(default)]
    pub(super) backends: BTreeMap<String, BackendConfiguration>,
}

/// What to do when the backend has lost the key in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum OnKeyLoss {
    /// Wait for a person.
    #[default]
    Wait,
    /// Enrol again with the bootstrap credential, with a new key in the same backend.
    Enrol,
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
}

impl FileConfiguration {
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            detail: format!("the configuration file {} cannot be read: {error}", path.display()),
            hint: "name an existing file with --config".to_owned(),
        })?;
        Self::parse(&text, path)
    }

    pub(super) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].lines().count().max(1));
            ConfigError {
                detail: format!("{}, line {line}: {}", path.display(), error.message().replace('\n', "; ")),
                hint: "docs/operators.md lists the keys; check the file with pintle config check".to_owned(),
            }
        })
    }
}
