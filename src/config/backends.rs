//! What the tables of the backends say, as far as it can be judged before anything is opened.

use std::path::Path;

use pintle_backend_pkcs11::Configuration;

use super::{BackendConfiguration, ConfigError, Isolation, NodeConfig, ProcessIsolation};
use crate::world::User;

/// Checks every backend's table.
pub(super) fn check(node: &NodeConfig) -> Result<(), ConfigError> {
    node.backends.iter().try_for_each(|(name, backend)| {
        check_one(backend, &node.state_dir)
            .map_err(|error| ConfigError { detail: format!("[backends.{name}]: {}", error.detail), ..error })
    })
}

fn check_one(backend: &BackendConfiguration, state_dir: &Path) -> Result<(), ConfigError> {
    let user = match backend.isolation() {
        Some(Isolation::Process(isolation)) => user(isolation)?,
        Some(Isolation::None) | None => None,
    };
    match backend {
        BackendConfiguration::Pkcs11 { uri, module, pin_file, .. } => {
            check_token(uri, module.as_deref(), pin_file.as_deref())
        }
        BackendConfiguration::Tpm { directory, .. } => match user {
            Some(User { uid: 1.., .. }) => check_tpm_directory(directory.as_deref(), state_dir),
            _ => Ok(()),
        },
        BackendConfiguration::File { .. } | BackendConfiguration::Plugin { .. } => Ok(()),
    }
}

/// The user that a module's process is to run as.
fn user(isolation: &ProcessIsolation) -> Result<Option<User>, ConfigError> {
    isolation.run_as().map_err(|error| {
        ConfigError::new(
            format!("isolation: {error}"),
            "name a user and a group that getent passwd and getent group show, or give both as numbers",
        )
    })
}

fn check_token(uri: &str, module: Option<&Path>, pin_file: Option<&Path>) -> Result<(), ConfigError> {
    // Not as long as the URI: whatever else is wrong with it, a PIN in it must be said first, and never shown.
    if uri.contains("pin-value") {
        return Err(ConfigError::new(
            "a PIN in the pkcs11: URI is refused, since configurations are shown",
            "put the PIN into a file of mode 0400, and name it with pin-file",
        ));
    }
    let module = module.map(Path::to_owned);
    let pin_file = pin_file.map(Path::to_owned);
    Configuration { module, pin_file, ..Configuration::new(uri) }.check().map_err(|error| {
        let hint = error.hint.unwrap_or_else(|| "docs/hardware.md shows how a token is named (RFC 7512)".to_owned());
        ConfigError::new(error.detail, hint)
    })
}

/// Only the agent's user has access to the state directory.
fn check_tpm_directory(directory: Option<&Path>, state_dir: &Path) -> Result<(), ConfigError> {
    let hint = "make a directory of mode 0700 that belongs to that user, such as /var/lib/pintle-tpm, and name it with \
                directory";
    match directory {
        None => Err(ConfigError::new(
            "isolation names another user, who cannot keep key files in the state directory",
            hint,
        )),
        Some(directory) if directory.starts_with(state_dir) => Err(ConfigError::new(
            format!("isolation names another user, who cannot get to {}", directory.display()),
            hint,
        )),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, FileConfiguration, Flags};
    use super::*;

    fn error(table: &str) -> Option<ConfigError> {
        let text = format!("[backends.x]\n{table}\n");
        let flags = Flags { node_name: Some("worker-1".to_owned()), ..Flags::default() };
        let file = FileConfiguration::parse(&text, Path::new("config.toml")).expect(table);
        Config::from_parts(flags, file).err()
    }

    #[test]
    fn a_token_that_cannot_be_meant_is_refused_when_the_configuration_is_loaded() {
        let module = "module = \"/usr/lib/module.so\"";
        for (keys, words) in [
            ("uri = \"pkcs11:token=a\"".to_owned(), "no module"),
            ("uri = \"pkcs11:token=a\"\nmodule = \"module.so\"".to_owned(), "not absolute"),
            ("uri = \"pkcs11:token=a?module-path=m.so\"".to_owned(), "not absolute"),
            (format!("uri = \"pkcs11:slot-id=99999999999999999999\"\n{module}"), "not a number"),
            (format!("uri = \"pkcs11:token=%FF\"\n{module}"), "not UTF-8"),
            (format!("uri = \"pkcs11:token=a\"\npin-file = \"../pin\"\n{module}"), "neither absolute"),
            (format!("uri = \"pkcs11:token=a?pin-source=/a\"\npin-file = \"/b\"\n{module}"), "twice"),
            (format!("uri = \"pkcs11:token=a\"\n{module}\nisolation = {{ user = \"nobody-here\" }}"), "nobody-here"),
        ] {
            let error = error(&format!("type = \"pkcs11\"\n{keys}")).expect(&keys);
            assert!(error.detail.starts_with("[backends.x]: ") && error.detail.contains(words), "{keys}: {error}");
            assert!(!error.hint.is_empty(), "{keys}");
        }
        // Only the service has the credential.
        let table = format!("type = \"pkcs11\"\nuri = \"pkcs11:token=a\"\npin-file = \"token-pin\"\n{module}");
        assert!(error(&table).is_none());
    }

    #[test]
    fn another_users_tpm_keys_are_not_kept_in_the_state_directory() {
        let table = |rest: &str| error(&format!("type = \"tpm\"\n{rest}"));
        let nobody = "isolation = { user = \"nobody\", group = \"0\" }";
        let refused = table(nobody).expect("no directory");
        assert!(refused.hint.contains("directory"), "{refused:?}");
        assert!(table(&format!("{nobody}\ndirectory = \"/var/lib/pintle/tpm\"")).is_some());
        assert!(table(&format!("{nobody}\ndirectory = \"/var/lib/pintle-tpm\"")).is_none());
        assert!(table("isolation = { user = \"root\" }").is_none() && table("").is_none());
    }
}
