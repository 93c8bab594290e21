//! The plugin's JSON configuration.

use std::path::PathBuf;
use std::str::FromStr;

use pintle_plugins_api::{BackendError, BackendErrorKind};
use serde::Deserialize;
use tss_esapi::tcti_ldr::TctiNameConf;

/// Where the TPM is, and where the files of its keys are.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Configuration {
    /// How the TPM is reached, in the words of libtss2: `device:/dev/tpmrm0`, `swtpm:host=127.0.0.1,port=2321`,
    /// `mssim:…` or `tabrmd:…`. The default is the kernel's resource manager, which shares the TPM's few slots.
    pub tcti: String,
    /// The directory of the key files. Absolute, of mode 0700, and this user's.
    pub directory: PathBuf,
    /// Whether the directory is made if it does not exist. One that may be a file system not mounted yet must not be:
    /// an empty one says that every key is lost.
    pub make_directory: bool,
}

impl Default for Configuration {
    fn default() -> Self {
        Self {
            tcti: "device:/dev/tpmrm0".to_owned(),
            directory: PathBuf::from("/var/lib/pintle/tpm"),
            make_directory: false,
        }
    }
}

impl Configuration {
    /// Parses the JSON object.
    ///
    /// # Errors
    /// `Unsupported`, with a hint, if it is not one, or asks for what this backend cannot do.
    pub fn from_json(text: &str) -> Result<Self, BackendError> {
        let configuration: Self = serde_json::from_str(text).map_err(|error| {
            unsupported(
                format!("the TPM's configuration cannot be used: line {}, column {}", error.line(), error.column()),
                "its fields are tcti, directory and make_directory",
            )
        })?;
        if !configuration.directory.is_absolute() {
            let detail = format!("the TPM's directory {} is not absolute", configuration.directory.display());
            return Err(unsupported(detail, "give its full path"));
        }
        configuration.address()?;
        Ok(configuration)
    }

    /// The TCTI, parsed.
    ///
    /// # Errors
    /// `Unsupported` if it is unknown, or names a socket by its path.
    pub(crate) fn address(&self) -> Result<TctiNameConf, BackendError> {
        let (name, parameters) = self.tcti.split_once(':').unwrap_or((&self.tcti, ""));
        // tss-esapi understands host= and port= only, and silently takes the default port for anything else: the
        // agent would talk to another TPM than the one it was told to.
        if name != "device" && parameters.split(',').any(|parameter| parameter.starts_with("path=")) {
            let detail = format!("TCTI {:?}: a socket named by path= is not supported", self.tcti);
            return Err(unsupported(detail, "use host= and port="));
        }
        TctiNameConf::from_str(&self.tcti).map_err(|_| {
            unsupported(
                format!("TCTI {:?} is not understood", self.tcti),
                "use device:/dev/tpmrm0, swtpm:host=…,port=…, mssim:… or tabrmd:…",
            )
        })
    }
}

fn unsupported(detail: String, hint: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, detail).with_hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_kernels_resource_manager() {
        let configuration = Configuration::from_json("{}").expect("an empty object is enough");
        assert_eq!(configuration, Configuration::default());
    }

    #[test]
    fn what_would_be_misunderstood_is_refused() {
        for text in [
            r#"{"tcti": "swtpm:path=/run/swtpm.sock"}"#,
            r#"{"tcti": "swtpm:host=127.0.0.1,path=/run/swtpm.sock"}"#,
            r#"{"tcti": "cmd:tpm2_send"}"#,
            r#"{"directory": "keys"}"#,
            r#"{"directry": "/keys"}"#,
            "7",
            "",
        ] {
            let error = Configuration::from_json(text).expect_err(text);
            assert_eq!(error.kind, BackendErrorKind::Unsupported, "{text}");
            assert!(error.hint.is_some() && !error.detail.contains('\n'), "{text}: {error:?}");
        }
    }
}
