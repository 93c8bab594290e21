//! A backend that is somebody else's shared object: what it is opened with, in this process or in a child.

use std::fmt;
use std::path::PathBuf;

use pintle_backend_pkcs11::{Configuration, Pkcs11Backend};
use pintle_backend_plugin::{PluginBackend, Trust};
use pintle_plugins_api::{BackendError, KeyBackend};
use serde::{Deserialize, Serialize};

/// What a module is opened with. A PIN is never part of it, only its file.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum ModuleConfiguration {
    /// A PKCS#11 module and a token that it reaches.
    Pkcs11 {
        /// The token (RFC 7512).
        uri: String,
        /// The module, if the URI does not say it.
        module: Option<PathBuf>,
        /// The PIN's file, if the URI does not say it.
        pin_file: Option<PathBuf>,
    },
    /// A plugin that speaks pintle's C ABI.
    Plugin {
        /// A bare name, or an absolute path.
        library: String,
        /// A JSON object of which only the plugin knows the meaning.
        configuration: String,
        /// Whether the plugin may show somebody a PIN. The TPM's does not: its keys have none.
        pin: bool,
    },
}

/// Where a module takes its PIN from, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PinOrigin {
    /// There is none.
    None,
    /// This file.
    File(PathBuf),
    /// Only the module knows.
    Unknown,
}

/// Which plugins are loaded: root's, and, as with PKCS#11 modules, those of the user that this process is, who could
/// replace pintle itself.
pub(crate) fn plugin_trust() -> Trust {
    Trust { owner: rustix::process::geteuid().as_raw(), ..Trust::default() }
}

impl ModuleConfiguration {
    /// Opens the module in this process.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn open(&self) -> Result<Box<dyn KeyBackend>, BackendError> {
        Ok(match self {
            Self::Pkcs11 { uri, module, pin_file } => {
                Box::new(Pkcs11Backend::open(Self::token(uri, module.as_ref(), pin_file.as_ref()))?)
            }
            Self::Plugin { library, configuration, .. } => {
                Box::new(PluginBackend::open_with(&plugin_trust(), library, configuration)?)
            }
        })
    }

    /// Where it takes its PIN from.
    pub(super) fn pin(&self) -> PinOrigin {
        match self {
            Self::Pkcs11 { uri, module, pin_file } => {
                Self::token(uri, module.as_ref(), pin_file.as_ref()).pin_path().map_or(PinOrigin::None, PinOrigin::File)
            }
            Self::Plugin { pin: true, .. } => PinOrigin::Unknown,
            Self::Plugin { pin: false, .. } => PinOrigin::None,
        }
    }

    fn token(uri: &str, module: Option<&PathBuf>, pin_file: Option<&PathBuf>) -> Configuration {
        Configuration { module: module.cloned(), pin_file: pin_file.cloned(), ..Configuration::new(uri) }
    }
}

impl fmt::Debug for ModuleConfiguration {
    /// A plugin's own configuration is not shown: nobody here knows what is in it.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pkcs11 { uri, .. } => write!(formatter, "Pkcs11({uri})"),
            Self::Plugin { library, .. } => write!(formatter, "Plugin({library})"),
        }
    }
}
