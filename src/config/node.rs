//! What the identities of a node share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::{BackendConfiguration, ConfigError};

/// The backend that is always there.
pub const FILE_BACKEND: &str = "file";

/// The part of the configuration that is about the node and not about one of its identities.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeConfig {
    /// The node's name.
    pub name: String,
    /// The directory of the journals, the control socket and file-held keys.
    pub state_dir: PathBuf,
    /// All backends, by name; [`FILE_BACKEND`] is among them.
    pub backends: BTreeMap<String, BackendConfiguration>,
    /// Where Prometheus finds the metrics, if it is to.
    pub metrics_address: Option<SocketAddr>,
}

impl NodeConfig {
    /// Where the running agent listens for `pintle status`, `pintle rotate` and others.
    pub fn control_socket(&self) -> PathBuf {
        self.state_dir.join("control.sock")
    }

    /// Where it is kept which modules refused which PIN's file.
    pub fn refused_pins(&self) -> PathBuf {
        self.state_dir.join("refused-pins.json")
    }

    /// Where the file backend's keys are, unless its table says otherwise.
    pub fn file_keys(&self) -> PathBuf {
        match self.backends.get(FILE_BACKEND) {
            Some(BackendConfiguration::File { directory: Some(directory) }) => directory.clone(),
            _ => self.state_dir.join("keys"),
        }
    }
}

/// The host name as the kubelet takes it (`nodeutil.GetHostname`).
pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase()
}

/// A node's name is a DNS subdomain (RFC 1123).
pub(super) fn check_node_name(name: &str) -> Result<(), ConfigError> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|character| matches!(character, 'a'..='z' | '0'..='9' | '-'))
    };
    if name.len() <= 253 && name.split('.').all(label) {
        return Ok(());
    }
    Err(ConfigError::new(
        format!("node name {name:?} is not a DNS subdomain: lower-case letters, digits, '-' and '.', at most 253"),
        "give the node's name as kubectl get nodes shows it with --node-name",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_are_dns_subdomains() {
        assert!(check_node_name("Worker_1").is_err() && check_node_name("").is_err());
        assert!(check_node_name("worker-1.example.org").is_ok());
    }
}
