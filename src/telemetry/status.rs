//! The status: what `pintle status` shows, and an interface for scripts.

use serde::{Deserialize, Serialize};

use super::ProxyStatus;

/// The status of an agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// One entry for each identity.
    pub identities: Vec<IdentityStatus>,
    /// The backends, as of their last call.
    #[serde(default)]
    pub backends: Vec<BackendStatus>,
}

/// Whether a backend works.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendStatus {
    /// Its name in the configuration.
    pub name: String,
    /// Whether its device answered the last call.
    pub up: bool,
    /// Why it did not.
    pub reason: String,
    /// What a person can do about it.
    pub hint: String,
}

/// What state an identity is in, by what a person does about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is no certificate yet, and getting one has begun.
    #[default]
    Enrolling,
    /// The certificate is good, and its rotation is planned.
    Ready,
    /// A rotation is under way; the certificate is good.
    Rotating,
    /// A request waits for an approver.
    WaitingForApproval,
    /// A request is approved and waits for the signer.
    WaitingForSigner,
    /// Rotation is off.
    RotationOff,
    /// There is no credential to ask the API server with.
    NoCredential,
    /// Something failed and is tried again; the reason says what.
    Failing,
    /// The backend lost the key, and a person must decide.
    KeyLost,
    /// The agent does not run; this was read from disk.
    NotRunning,
}

impl State {
    /// The word in the STATE column.
    pub fn word(self) -> &'static str {
        match self {
            Self::Enrolling => "Enrolling",
            Self::Ready => "Ready",
            Self::Rotating => "Rotating",
            Self::WaitingForApproval => "WaitingForApproval",
            Self::WaitingForSigner => "WaitingForSigner",
            Self::RotationOff => "RotationOff",
            Self::NoCredential => "NoCredential",
            Self::Failing => "Failing",
            Self::KeyLost => "KeyLost",
            Self::NotRunning => "NotRunning",
        }
    }
}

/// The status of one identity. Times are RFC 3339; empty where there is no certificate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityStatus {
    /// The name of the identity on this node, such as `client`.
    pub identity: String,
    /// The subject's common name.
    pub subject: String,
    /// The signer.
    pub signer_name: String,
    /// What state it is in.
    pub state: State,
    /// What failed or what is waited for, in the cluster's own words where it has some.
    pub reason: String,
    /// What a person can do next.
    pub hint: String,
    /// The phase of the rotation.
    pub phase: String,
    /// The key of the certificate in use.
    pub key: Option<KeyStatus>,
    /// The leaf's serial number, upper-case hexadecimal.
    pub serial: String,
    /// SHA-256 of the leaf, hexadecimal, as in an API server's credential id.
    pub fingerprint: String,
    /// The beginning of the leaf's validity.
    pub not_before: String,
    /// The end of the leaf's validity.
    pub not_after: String,
    /// When the certificate was installed.
    pub installed_at: String,
    /// When the rotation window opens.
    pub window_opens: String,
    /// When the certificate is rotated.
    pub rotates_at: String,
    /// When the rotation window closes.
    pub window_closes: String,
    /// The request under way.
    pub request: String,
    /// When it is tried again.
    pub retry_at: String,
    /// Failures in a row.
    pub failures: u32,
    /// Rotations that this process has completed.
    pub rotations: u64,
    /// Failures on the way to one, as of this process.
    #[serde(default)]
    pub errors: u64,
    /// How many seconds the API server's clock is ahead of this machine's, as of its last answer.
    pub server_ahead_seconds: Option<i64>,
    /// The current pair.
    pub pair: String,
    /// The credential proxy, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxyStatus>,
}

/// The key of a certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyStatus {
    /// The backend that holds it.
    pub backend: String,
    /// Its id there.
    pub id: String,
    /// Its algorithm.
    pub algorithm: String,
}

impl IdentityStatus {
    /// Whether nothing is left of a rotation but to destroy old keys, once the last connections through the proxy that use
    /// them have ended: the new certificate is in use.
    pub fn drains(&self) -> bool {
        let earlier = |serial: &String| *serial != self.serial;
        let open = self.proxy.iter().flat_map(|proxy| proxy.statistics.open_connections.keys()).any(earlier);
        self.phase == "retiring" && open
    }

    /// The status in one line.
    pub fn line(&self) -> String {
        let mut line = format!("{}: {}", self.subject, self.state.word());
        if !self.not_after.is_empty() {
            line += &format!(", good until {}", self.not_after);
        }
        if !self.rotates_at.is_empty() && self.state == State::Ready {
            line += &format!(", rotates at {}", self.rotates_at);
        }
        if !self.reason.is_empty() {
            line += &format!(" ({})", self.reason);
        }
        line
    }
}
