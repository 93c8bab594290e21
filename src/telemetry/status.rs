//! The status that `pintle status` shows, and that scripts read.
//!
//! Values are typed, and formatted only when serialized: JSON has times as RFC 3339, and an empty string for a
//! missing time.

use pintle_agent_core::UnixTime;
use serde::{Deserialize, Serialize};

use super::{ProxyStatus, rfc3339};

/// The status of the agent on a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// One entry per identity.
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
    /// Whether its device responded to the last call.
    pub up: bool,
    /// Why it did not.
    pub reason: String,
    /// What to do about it.
    pub hint: String,
}

/// The state of an identity, classified by what an operator has to do about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is no certificate yet; enrollment is in progress.
    #[default]
    Enrolling,
    /// The certificate is valid, and its rotation is scheduled.
    Ready,
    /// A rotation is in progress; the certificate is valid.
    Rotating,
    /// A request waits for approval.
    WaitingForApproval,
    /// A request is approved and waits for the signer.
    WaitingForSigner,
    /// Rotation is off.
    RotationOff,
    /// There is no credential to authenticate to the API server with.
    NoCredential,
    /// Something failed and is retried; see the reason.
    Failing,
    /// The backend lost the key, and an operator must decide what to do.
    KeyLost,
    /// The identity cannot start until an operator fixes the cause; see the reason.
    NotStarted,
    /// The agent is not running; the status was read from disk.
    NotRunning,
}

impl State {
    /// The state as shown in the STATE column.
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
            Self::NotStarted => "NotStarted",
            Self::NotRunning => "NotRunning",
        }
    }
}

/// The phase of a rotation, without the data that the rotation keeps for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The credential in use is valid, or there is none yet.
    #[default]
    Holding,
    /// A key is being generated.
    Generating,
    /// A certificate is being requested.
    Requesting,
    /// The request waits for an approver or the signer.
    Awaiting,
    /// The API server is being asked whether it accepts the certificate.
    Proving,
    /// The certificate is being written.
    Publishing,
    /// The previous certificate is being written again, because the API server rejected its successor.
    Restoring,
    /// Old keys are being deleted.
    Retiring,
}

impl From<&pintle_agent_core::Phase> for Phase {
    fn from(phase: &pintle_agent_core::Phase) -> Self {
        use pintle_agent_core::Phase as Core;
        match phase {
            Core::Holding => Self::Holding,
            Core::Generating { .. } => Self::Generating,
            Core::Requesting { .. } => Self::Requesting,
            Core::Awaiting { .. } => Self::Awaiting,
            Core::Proving { .. } => Self::Proving,
            Core::Publishing { .. } => Self::Publishing,
            Core::Restoring { .. } => Self::Restoring,
            Core::Retiring { .. } => Self::Retiring,
        }
    }
}

/// The status of one identity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityStatus {
    /// The name of the identity on this node, such as `client`.
    pub identity: String,
    /// The subject's common name.
    pub subject: String,
    /// The signerName of its requests.
    pub signer_name: String,
    /// What state it is in.
    pub state: State,
    /// What failed or is being waited for, in the cluster's own words where it gives any.
    pub reason: String,
    /// What to do about it.
    pub hint: String,
    /// The phase of the rotation.
    pub phase: Phase,
    /// The key of the certificate in use.
    pub key: Option<KeyStatus>,
    /// The leaf's serial number, upper-case hexadecimal.
    pub serial: String,
    /// SHA-256 of the leaf, hexadecimal, as in an API server's credential ID.
    pub fingerprint: String,
    /// The leaf's notBefore. Here and below, `None` if there is no certificate.
    #[serde(with = "rfc3339::optional")]
    pub not_before: Option<UnixTime>,
    /// The leaf's notAfter.
    #[serde(with = "rfc3339::optional")]
    pub not_after: Option<UnixTime>,
    /// When the certificate was installed.
    #[serde(with = "rfc3339::optional")]
    pub installed_at: Option<UnixTime>,
    /// When the rotation window opens.
    #[serde(with = "rfc3339::optional")]
    pub window_opens: Option<UnixTime>,
    /// When the rotation is scheduled.
    #[serde(with = "rfc3339::optional")]
    pub rotates_at: Option<UnixTime>,
    /// When the rotation window closes.
    #[serde(with = "rfc3339::optional")]
    pub window_closes: Option<UnixTime>,
    /// The name of the current CertificateSigningRequest; may be empty.
    pub request: String,
    /// When the rotation is retried; `None` if nothing has failed.
    #[serde(with = "rfc3339::optional")]
    pub retry_at: Option<UnixTime>,
    /// Consecutive failures.
    pub failures: u32,
    /// Rotations that this process has completed.
    pub rotations: u64,
    /// Failures of rotations since this process started.
    #[serde(default)]
    pub errors: u64,
    /// How far the API server's clock was ahead of this machine's at its last response.
    pub server_ahead_seconds: Option<i64>,
    /// The file name of the current pair.
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
    /// Its identifier in the backend.
    pub id: String,
    /// Its algorithm.
    pub algorithm: String,
}

impl IdentityStatus {
    /// Whether a valid certificate is in use and its key is available.
    pub fn is_good(&self, now: UnixTime) -> bool {
        self.not_after.is_some_and(|end| now < end) && self.state != State::KeyLost
    }

    /// Whether the new certificate is in use, and only old keys remain to be deleted, once the last connections
    /// through the proxy that use them have closed.
    pub fn drains(&self) -> bool {
        let earlier = |serial: &String| *serial != self.serial;
        let open = self.proxy.iter().flat_map(|proxy| proxy.statistics.open_connections.keys()).any(earlier);
        self.phase == Phase::Retiring && open
    }

    /// The state, with the reason in brackets if there is one.
    pub fn state_and_reason(&self) -> String {
        let reason = if self.reason.is_empty() { String::new() } else { format!(" ({})", self.reason) };
        format!("{}{reason}", self.state.word())
    }

    /// The status as one line.
    pub fn line(&self) -> String {
        let mut line = format!("{}: {}", self.subject, self.state.word());
        if let Some(end) = self.not_after {
            line += &format!(", valid until {end}");
        }
        if let Some(at) = self.rotates_at.filter(|_| self.state == State::Ready) {
            line += &format!(", rotates at {at}");
        }
        if !self.reason.is_empty() {
            line += &format!(" ({})", self.reason);
        }
        line
    }
}

impl Status {
    /// The status of the identity of this name.
    pub fn identity(&self, name: &str) -> Option<&IdentityStatus> {
        self.identities.iter().find(|identity| identity.identity == name)
    }

    /// The status as one line: that of the only identity, or how many of several are ready and the states of the
    /// others.
    pub fn line(&self) -> String {
        if let [only] = self.identities.as_slice() {
            return only.line();
        }
        let is_ready = |identity: &&IdentityStatus| matches!(identity.state, State::Ready | State::RotationOff);
        let ready = self.identities.iter().filter(is_ready).count();
        let mut line = format!("{ready} of {} identities ready", self.identities.len());
        for identity in self.identities.iter().filter(|identity| !is_ready(identity)) {
            line += &format!("; {}: {}", identity.identity, identity.state_and_reason());
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_line_summarizes_all_identities() {
        let of = |name: &str, state, reason: &str| IdentityStatus {
            identity: name.to_owned(),
            subject: "system:node:a".to_owned(),
            state,
            reason: reason.to_owned(),
            ..IdentityStatus::default()
        };
        let status = |identities| Status { identities, backends: Vec::new() };
        assert_eq!(status(vec![of("client", State::Ready, "")]).line(), "system:node:a: Ready");
        let three = status(vec![
            of("kubelet", State::Ready, ""),
            of("metrics", State::RotationOff, "rotation is off"),
            of("probe", State::Failing, "the token is away"),
        ]);
        assert_eq!(three.line(), "2 of 3 identities ready; probe: Failing (the token is away)");
    }

    /// Scripts parse this, and so do other versions of the command line.
    #[test]
    fn times_are_rfc_3339_and_missing_ones_are_empty() {
        let status = IdentityStatus { not_after: Some(UnixTime::from_seconds(100)), ..IdentityStatus::default() };
        let json = serde_json::to_value(&status).expect("JSON");
        assert_eq!((&json["notAfter"], &json["retryAt"]), (&"1970-01-01T00:01:40Z".into(), &"".into()));
        assert_eq!((&json["phase"], &json["state"]), (&"holding".into(), &"enrolling".into()));
        assert_eq!(serde_json::from_value::<IdentityStatus>(json).expect("a status"), status);
    }
}
