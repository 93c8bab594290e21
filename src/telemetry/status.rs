//! The status: what `pintle status` shows, and an interface for scripts.
//!
//! Its values are typed, and become text only where somebody reads them: JSON has times as RFC 3339, and an empty string
//! where there is none.

use pintle_agent_core::UnixTime;
use serde::{Deserialize, Serialize};

use super::{ProxyStatus, rfc3339};

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
    /// The identity cannot be started: only a person can change that, and the reason says how.
    NotStarted,
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
            Self::NotStarted => "NotStarted",
            Self::NotRunning => "NotRunning",
        }
    }
}

/// The phase of a rotation, without what the rotation knows in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The credential in use is good; or there is none, and getting one begins.
    #[default]
    Holding,
    /// A key is being made.
    Generating,
    /// A certificate is being requested.
    Requesting,
    /// The request waits for an approver or the signer.
    Awaiting,
    /// The API server is asked whether it accepts the certificate.
    Proving,
    /// The certificate is being written.
    Publishing,
    /// The certificate before is being written again, since the API server refused the one after it.
    Restoring,
    /// Old keys are being destroyed.
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
    /// The signer.
    pub signer_name: String,
    /// What state it is in.
    pub state: State,
    /// What failed or what is waited for, in the cluster's own words where it has some.
    pub reason: String,
    /// What a person can do next.
    pub hint: String,
    /// The phase of the rotation.
    pub phase: Phase,
    /// The key of the certificate in use.
    pub key: Option<KeyStatus>,
    /// The leaf's serial number, upper-case hexadecimal.
    pub serial: String,
    /// SHA-256 of the leaf, hexadecimal, as in an API server's credential id.
    pub fingerprint: String,
    /// The beginning of the leaf's validity; as all times here, `None` where there is no certificate.
    #[serde(with = "rfc3339::optional")]
    pub not_before: Option<UnixTime>,
    /// The end of the leaf's validity.
    #[serde(with = "rfc3339::optional")]
    pub not_after: Option<UnixTime>,
    /// When the certificate was installed.
    #[serde(with = "rfc3339::optional")]
    pub installed_at: Option<UnixTime>,
    /// When the rotation window opens.
    #[serde(with = "rfc3339::optional")]
    pub window_opens: Option<UnixTime>,
    /// When the certificate is rotated.
    #[serde(with = "rfc3339::optional")]
    pub rotates_at: Option<UnixTime>,
    /// When the rotation window closes.
    #[serde(with = "rfc3339::optional")]
    pub window_closes: Option<UnixTime>,
    /// The request under way.
    pub request: String,
    /// When it is tried again; `None` if nothing has failed.
    #[serde(with = "rfc3339::optional")]
    pub retry_at: Option<UnixTime>,
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
    /// Whether a good certificate is in use, with a key that is there.
    pub fn is_good(&self, now: UnixTime) -> bool {
        self.not_after.is_some_and(|end| now < end) && self.state != State::KeyLost
    }

    /// Whether nothing is left of a rotation but to destroy old keys, once the last connections through the proxy that use
    /// them have ended: the new certificate is in use.
    pub fn drains(&self) -> bool {
        let earlier = |serial: &String| *serial != self.serial;
        let open = self.proxy.iter().flat_map(|proxy| proxy.statistics.open_connections.keys()).any(earlier);
        self.phase == Phase::Retiring && open
    }

    /// The state, and why.
    pub fn state_and_reason(&self) -> String {
        let reason = if self.reason.is_empty() { String::new() } else { format!(" ({})", self.reason) };
        format!("{}{reason}", self.state.word())
    }

    /// The status in one line.
    pub fn line(&self) -> String {
        let mut line = format!("{}: {}", self.subject, self.state.word());
        if let Some(end) = self.not_after {
            line += &format!(", good until {end}");
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

    /// The status in one line: that of the only identity, or how many of several are ready and what the others do.
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
    fn one_line_speaks_for_the_node() {
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

    /// Scripts read this, and so does the command line of an earlier or later version.
    #[test]
    fn times_are_rfc_3339_and_what_there_is_not_is_empty() {
        let status = IdentityStatus { not_after: Some(UnixTime::from_seconds(100)), ..IdentityStatus::default() };
        let json = serde_json::to_value(&status).expect("JSON");
        assert_eq!((&json["notAfter"], &json["retryAt"]), (&"1970-01-01T00:01:40Z".into(), &"".into()));
        assert_eq!((&json["phase"], &json["state"]), (&"holding".into(), &"enrolling".into()));
        assert_eq!(serde_json::from_value::<IdentityStatus>(json).expect("a status"), status);
    }
}
