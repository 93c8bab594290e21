//! Keys, as the agent sees them: each backend lives on a thread of its own, and calls to it have a deadline.

pub mod checks;
pub mod inventory;
#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it has processes and sockets of its own, with deadlines for both"
)]
pub mod isolation;

mod module;
#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it looks at a file with the rights of another user, which takes a thread of its own"
)]
mod refused_pins;
#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a backend blocks for as long as its device likes, so it has a thread of its own, and a call a deadline"
)]
mod thread;
mod tls;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pintle_agent_core::KeyName;
use pintle_backend_file::FileBackend;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyBackend, KeyReference, PublicKey};
use zeroize::Zeroizing;

use crate::config::{BackendConfiguration, Isolation, NodeConfig};
use isolation::IsolatedBackend;
use refused_pins::{PinState, RefusedPins, Remembering};

pub use module::ModuleConfiguration;
pub(crate) use module::plugin_trust;
pub use thread::BackendThread;
pub use tls::{HeldCertificate, certified_key, certified_key_within};

/// How long a backend may take to generate a key: discrete TPMs take up to a minute for an RSA key.
pub const GENERATE_DEADLINE: Duration = Duration::from_secs(120);
/// How long a backend may take for anything else.
pub const CALL_DEADLINE: Duration = Duration::from_secs(20);

/// The plugin that knows TPMs: `libpintle_backend_tpm.so` in the directory of installed plugins.
const TPM_LIBRARY: &str = "pintle_backend_tpm";

/// Opens a backend; called by whoever uses it first, and again after it could not be opened.
type Open = Box<dyn FnMut() -> Result<Box<dyn KeyBackend>, BackendError> + Send>;

/// How a backend is opened, and what is known of it before.
pub struct Opener {
    open: Open,
    /// Whether a call takes no longer than asking another thread for it.
    is_prompt: bool,
}

impl Opener {
    /// A backend that may take its time, or hang: any that is not our own code.
    pub fn new(open: impl FnMut() -> Result<Box<dyn KeyBackend>, BackendError> + Send + 'static) -> Self {
        Self { open: Box::new(open), is_prompt: false }
    }

    /// A backend that does nothing but compute: keys in files are one.
    fn prompt(open: impl FnMut() -> Result<Box<dyn KeyBackend>, BackendError> + Send + 'static) -> Self {
        Self { open: Box::new(open), is_prompt: true }
    }
}

/// All configured backends, by name.
#[derive(Clone, Default)]
pub struct Keyring {
    backends: Arc<BTreeMap<String, BackendThread>>,
}

impl Keyring {
    /// Starts a thread for each backend.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(backends: impl IntoIterator<Item = (String, Opener)>) -> std::io::Result<Self> {
        let started = backends
            .into_iter()
            .map(|(name, opener)| BackendThread::start(&name, opener).map(|thread| (name, thread)))
            .collect::<Result<_, _>>()?;
        Ok(Self { backends: Arc::new(started) })
    }

    /// A keyring of backends without threads, for a simulation.
    #[cfg(test)]
    pub(crate) fn simulated(backends: impl IntoIterator<Item = (String, BackendThread)>) -> Self {
        Self { backends: Arc::new(backends.into_iter().collect()) }
    }

    /// The names of the backends.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.backends.keys().map(String::as_str)
    }

    /// The thread of this backend.
    ///
    /// # Errors
    /// `Unavailable` if no backend of this name is configured: its keys may well exist.
    pub fn backend(&self, name: &str) -> Result<&BackendThread, BackendError> {
        self.backends.get(name).ok_or_else(|| not_configured(name))
    }

    /// The backends, each with what is wrong with it as of its last call.
    pub fn health(&self) -> impl Iterator<Item = (&str, Option<BackendError>)> {
        self.backends.iter().map(|(name, thread)| (name.as_str(), thread.health()))
    }

    /// The public half of this key.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn public_key(&self, key: &KeyName) -> Result<PublicKey, BackendError> {
        let id = key.id.clone();
        self.backend(&key.backend)?.call(CALL_DEADLINE, move |backend| backend.public_key(&id)).await
    }

    /// Whether the key of this name is in its backend, and is the one with this public half, a DER SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn has(&self, key: &KeyName, subject_public_key_info: &[u8]) -> Result<bool, BackendError> {
        Ok(self.public_key(key).await?.as_der() == subject_public_key_info)
    }

    /// How a consumer names this key.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn reference(&self, key: &KeyName) -> Result<KeyReference, BackendError> {
        let id = key.id.clone();
        self.backend(&key.backend)?.call(CALL_DEADLINE, move |backend| backend.reference(&id)).await
    }

    /// Has this key sign something, to see whether it can.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn try_key(&self, key: &KeyName) -> Result<(), BackendError> {
        let id = key.id.clone();
        let sign = move |backend: &mut dyn KeyBackend| {
            let scheme = backend.public_key(&id)?.algorithm().schemes()[0];
            backend.sign(&id, scheme, b"pintle asks whether this key is there").map(drop)
        };
        self.backend(&key.backend)?.call(CALL_DEADLINE, sign).await
    }

    /// Stores a private key (DER) under this name; a repeat with the same key changes nothing.
    ///
    /// # Errors
    /// `Unsupported` if the backend does not take over keys; otherwise those of
    /// [`KeyImport::import`](pintle_plugins_api::KeyImport::import).
    pub async fn import(&self, key: &KeyName, private_key: Zeroizing<Vec<u8>>) -> Result<PublicKey, BackendError> {
        let (id, name) = (key.id.clone(), key.backend.clone());
        let import = move |backend: &mut dyn KeyBackend| match backend.importer() {
            Some(importer) => importer.import(&id, &private_key),
            None => {
                let detail = format!("backend {name:?} does not take over keys that were made elsewhere");
                Err(BackendError::new(BackendErrorKind::Unsupported, detail))
            }
        };
        self.backend(&key.backend)?.call(CALL_DEADLINE, import).await
    }

    /// Destroys this key; an absent key is destroyed.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn delete(&self, key: &KeyName) -> Result<(), BackendError> {
        let id = key.id.clone();
        self.backend(&key.backend)?.call(CALL_DEADLINE, move |backend| backend.delete(&id)).await
    }
}

/// Opens a configured backend in the calling thread.
///
/// # Errors
/// Those of the backend; `Unavailable` if none of this name is configured.
pub fn open(config: &NodeConfig, name: &str) -> Result<Box<dyn KeyBackend>, BackendError> {
    if config.backends.contains_key(name) { (opener(config, name).open)() } else { Err(not_configured(name)) }
}

/// How each configured backend is opened.
pub fn openers(config: &NodeConfig) -> Vec<(String, Opener)> {
    config.backends.keys().map(|name| (name.clone(), opener(config, name))).collect()
}

fn not_configured(name: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Unavailable, format!("no backend {name:?} is configured"))
        .with_hint(format!("add [backends.{name}] to the configuration file"))
}

fn opener(config: &NodeConfig, name: &str) -> Opener {
    let keys = config.file_keys();
    let (module, isolation) = match config.backends[name].clone() {
        BackendConfiguration::File { directory } => {
            let directory = directory.unwrap_or(keys);
            return Opener::prompt(move || Ok(Box::new(FileBackend::open(&directory)?)));
        }
        BackendConfiguration::Pkcs11 { uri, module, pin_file, isolation } => {
            (ModuleConfiguration::Pkcs11 { uri, module, pin_file }, isolation)
        }
        BackendConfiguration::Tpm { tcti, directory, library, isolation } => {
            let make = directory.is_none();
            let directory = directory.unwrap_or_else(|| config.state_dir.join("tpm"));
            let mut configuration = serde_json::json!({ "directory": directory, "make_directory": make });
            if let Some(tcti) = tcti {
                configuration["tcti"] = tcti.into();
            }
            let library = library.unwrap_or_else(|| TPM_LIBRARY.to_owned());
            (ModuleConfiguration::Plugin { library, configuration: configuration.to_string(), pin: false }, isolation)
        }
        BackendConfiguration::Plugin { library, configuration, isolation } => {
            (ModuleConfiguration::Plugin { library, configuration: configuration.to_json(), pin: true }, isolation)
        }
    };
    let refused = RefusedPins::kept_in(config.refused_pins());
    match isolation {
        Isolation::Process(isolation) => {
            let name = name.to_owned();
            Opener::new(move || {
                let backend = IsolatedBackend::new(&name, module.clone(), isolation.clone())?;
                Ok(Box::new(backend.with_refused_pins(refused.clone())))
            })
        }
        Isolation::None => Opener::new(move || {
            if let Some(error) = refused.still_refused(&module, None) {
                return Err(error);
            }
            let pin = PinState::now(&module.pin(), None);
            match module.open() {
                Ok(backend) => {
                    let (module, refused) = (module.clone(), refused.clone());
                    Ok(Box::new(Remembering { backend, module, refused, doubtful: true }))
                }
                Err(error) => {
                    if error.kind == BackendErrorKind::Locked {
                        refused.remember(&module, pin, &error);
                    }
                    Err(error)
                }
            }
        }),
    }
}
