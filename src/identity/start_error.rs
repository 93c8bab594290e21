//! What keeps an agent from starting.

use std::fmt;

use crate::config::IdentityConfig;

/// Why an agent cannot start: only a person can mend it.
#[derive(Debug)]
pub struct StartError {
    /// What is wrong, and where.
    pub detail: String,
    /// What to do about it.
    pub hint: String,
}

impl fmt::Display for StartError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.detail)
    }
}

impl std::error::Error for StartError {}

/// The node's name is not the one in the credential (case C12).
pub(super) fn renamed(found: &str, wanted: &str, config: &IdentityConfig) -> StartError {
    let name = found.strip_prefix("system:node:").unwrap_or(found);
    StartError {
        detail: format!("the credential on this machine is of {found}, and this node is now {wanted}"),
        hint: format!(
            "to keep the old name: --node-name {name}; to enrol as the new one: mv {pki} {pki}.old && mv {state} \
             {state}.old, and start with --bootstrap-kubeconfig",
            pki = config.cert_dir.display(),
            state = config.node.state_dir.display()
        ),
    }
}
