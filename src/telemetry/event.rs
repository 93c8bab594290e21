//! The events. Each is declared once, with its name, fields, level and sentence.

use pintle_agent_core::UnixTime;
use serde::Serialize;

use super::rfc3339;

/// Severity, as in syslog (RFC 5424, section 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Needs an operator's attention.
    Error,
    /// Something failed and is retried, or will need attention.
    Warning,
    /// Part of normal operation.
    Info,
}

/// Something that happened. Names and fields are an interface that dashboards and alerts depend on.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The agent has started to manage an identity.
    Started {
        /// The subject's common name.
        subject: String,
        /// The version of pintle.
        version: &'static str,
        /// The backend that generates new keys.
        backend: String,
    },
    /// An identity cannot start. The other identities continue, and this one is retried every few seconds.
    StartFailed {
        /// What is wrong.
        reason: String,
        /// What to do about it.
        hint: String,
    },
    /// A credential was found on disk and is in use.
    CredentialAdopted {
        /// The file.
        path: String,
        /// The leaf's serial number.
        serial: String,
        /// The leaf's notAfter, RFC 3339.
        not_after: String,
    },
    /// Something on disk cannot be used.
    DiskUnusable {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
        /// What the agent does instead.
        instead: String,
    },
    /// A rotation begins.
    RotationStarted {
        /// The reason: due, bootstrap, requested, refused, key lost or migration.
        reason: String,
    },
    /// A key is there.
    KeyGenerated {
        /// Its name.
        key: String,
        /// Its algorithm.
        algorithm: String,
    },
    /// A CertificateSigningRequest was created, or one that already exists was found.
    RequestSubmitted {
        /// Its name.
        request: String,
        /// The credential that it was created with: `held` or `bootstrap`.
        authority: &'static str,
    },
    /// The request waits for approval or, once approved, for the signer.
    RequestPending {
        /// Its name.
        request: String,
        /// Whether it is approved.
        approved: bool,
    },
    /// The signer has issued a certificate, and it passed all checks.
    CertificateIssued {
        /// The request's name.
        request: String,
        /// The leaf's serial number.
        serial: String,
        /// The leaf's notAfter, RFC 3339.
        not_after: String,
    },
    /// The pair is on disk and is the current one.
    PairPublished {
        /// The file.
        path: String,
        /// The leaf's serial number.
        serial: String,
    },
    /// The API server accepts the new certificate.
    IdentityProven {
        /// The user name that the API server reports; empty if it reports none.
        user: String,
        /// The leaf's serial number.
        serial: String,
    },
    /// Old keys were deleted and old pairs removed.
    KeysRetired {
        /// The keys.
        keys: Vec<String>,
        /// The number of pairs kept.
        pairs: usize,
    },
    /// The certificate is valid, and its rotation is scheduled.
    Holding {
        /// The leaf's serial number.
        serial: String,
        /// When the rotation window opens.
        #[serde(serialize_with = "rfc3339::serialize")]
        opens: UnixTime,
        /// When the rotation is scheduled.
        #[serde(serialize_with = "rfc3339::serialize")]
        rotates_at: UnixTime,
        /// The leaf's notAfter.
        #[serde(serialize_with = "rfc3339::serialize")]
        not_after: UnixTime,
    },
    /// Rotation is off, so the certificate is not renewed.
    RotationOff {
        /// The leaf's notAfter, RFC 3339.
        not_after: String,
    },
    /// The backend lost the key, and the configuration does not allow enrolling again.
    KeyLost {
        /// The key.
        key: String,
    },
    /// Something failed and is retried.
    Failed {
        /// The rotation phase in which it failed.
        phase: &'static str,
        /// What failed.
        reason: String,
        /// What to do about it; may be empty.
        hint: String,
        /// Consecutive failures.
        failures: u32,
        /// When it is retried, RFC 3339.
        retry_at: String,
    },
    /// The journal cannot be written. Rotation pauses until it can.
    JournalNotSaved {
        /// The file system's error.
        reason: String,
    },
    /// The wall clock was set, or the machine resumed from sleep.
    ClockStepped,
    /// The API server's clock and this machine's differ by more than a minute.
    ClockOff {
        /// How far the API server's clock is ahead; negative if it is behind.
        server_ahead_seconds: i64,
    },
    /// The kubelet's kubeconfig was written.
    KubeconfigWritten {
        /// The file.
        path: String,
    },
    /// The kubelet's kubeconfig does not use the published pair.
    KubeconfigStale {
        /// The file.
        path: String,
        /// What it uses instead.
        reason: String,
    },
    /// A backend's device does not respond.
    BackendDown {
        /// The backend's name in the configuration.
        backend: String,
        /// What is wrong.
        reason: String,
        /// What to do about it; may be empty.
        hint: String,
    },
    /// A backend's device responds again.
    BackendUp {
        /// The backend's name in the configuration.
        backend: String,
    },
    /// The credential proxy accepts connections.
    ProxyListening {
        /// Where.
        address: String,
    },
    /// New connections through the credential proxy use a different certificate.
    ProxySwapped {
        /// The leaf's serial number.
        serial: String,
        /// The leaf's notAfter, RFC 3339.
        not_after: String,
    },
    /// Connections through the credential proxy failed. Emitted at most once a minute for each reason.
    ProxyFailed {
        /// The reason, as in the status and the metrics.
        reason: &'static str,
        /// What happened to the last one.
        detail: String,
        /// The number of failures since the last event for this reason.
        count: u64,
    },
    /// Log lines were dropped because standard error was not read for a while.
    LogLinesDropped {
        /// How many lines.
        lines: u64,
    },
    /// The agent is stopping.
    Stopped,
}

impl Event {
    /// The event's severity.
    pub fn level(&self) -> Level {
        match self {
            Self::KeyLost { .. } | Self::StartFailed { .. } => Level::Error,
            Self::DiskUnusable { .. }
            | Self::RotationOff { .. }
            | Self::Failed { .. }
            | Self::JournalNotSaved { .. }
            | Self::ClockOff { .. }
            | Self::BackendDown { .. }
            | Self::KubeconfigStale { .. }
            | Self::LogLinesDropped { .. }
            | Self::ProxyFailed { .. } => Level::Warning,
            _ => Level::Info,
        }
    }

    /// The event as a sentence, for the terminal.
    pub fn sentence(&self) -> String {
        match self {
            Self::Started { subject, version, backend } => {
                format!("pintle {version} manages {subject}; new keys are generated in {backend}")
            }
            Self::StartFailed { reason, hint } => format!("cannot start: {reason} ({hint})"),
            Self::CredentialAdopted { path, serial, not_after } => {
                format!("adopted {path}: serial {serial}, valid until {not_after}")
            }
            Self::DiskUnusable { path, reason, instead } => format!("cannot use {path} ({reason}); {instead}"),
            Self::RotationStarted { reason } => format!("a certificate is needed: {reason}"),
            Self::KeyGenerated { key, algorithm } => format!("key {key} generated, {algorithm}"),
            Self::RequestSubmitted { request, authority } => {
                format!("CertificateSigningRequest {request} submitted with the {authority} credential")
            }
            Self::RequestPending { request, approved: false } => {
                format!("{request} is Pending: waiting for approval (kubectl certificate approve {request})")
            }
            Self::RequestPending { request, approved: true } => {
                format!("{request} is Approved: waiting for the signer")
            }
            Self::CertificateIssued { request, serial, not_after } => {
                format!("{request} is Issued: serial {serial}, valid until {not_after}")
            }
            Self::PairPublished { path, serial } => format!("pair {path} is current, serial {serial}"),
            Self::IdentityProven { user, serial } if user.is_empty() => {
                format!("the API server accepts serial {serial}")
            }
            Self::IdentityProven { user, serial } => {
                format!("the API server authenticates serial {serial} as {user}")
            }
            Self::KeysRetired { keys, pairs } => {
                format!(
                    "{} old {} destroyed, {pairs} pairs kept",
                    keys.len(),
                    if keys.len() == 1 { "key" } else { "keys" }
                )
            }
            Self::Holding { serial, rotates_at, not_after, .. } => {
                format!("holding serial {serial} until {not_after}; rotates at {rotates_at}")
            }
            Self::RotationOff { not_after } => {
                format!("rotation is off: the certificate is not renewed before it expires at {not_after}")
            }
            Self::KeyLost { key } => {
                format!(
                    "the backend lost key {key}; restore the device, or set on-key-loss = \"enrol\" and restart pintle"
                )
            }
            Self::Failed { phase, reason, hint, failures, retry_at } => {
                let hint = if hint.is_empty() { String::new() } else { format!(" ({hint})") };
                format!("{phase} failed {failures}×: {reason}{hint}; retrying at {retry_at}")
            }
            Self::JournalNotSaved { reason } => format!("the journal cannot be saved, so rotation is paused: {reason}"),
            Self::ClockStepped => "the clock was set or the machine slept: checking everything again".to_owned(),
            Self::ClockOff { server_ahead_seconds } => {
                format!("the API server's clock is {server_ahead_seconds} s ahead of this machine's")
            }
            Self::KubeconfigWritten { path } => format!("kubeconfig {path} written"),
            Self::KubeconfigStale { path, reason } => {
                format!(
                    "kubeconfig {path} does not follow rotations: {reason}; fix it with pintle kubeconfig --for file \
                     --write {path}"
                )
            }
            Self::BackendDown { backend, reason, hint } => {
                let hint = if hint.is_empty() { String::new() } else { format!(" ({hint})") };
                format!("backend {backend} is down: {reason}{hint}")
            }
            Self::BackendUp { backend } => format!("backend {backend} is up again"),
            Self::ProxyListening { address } => format!("the credential proxy listens on {address}"),
            Self::ProxySwapped { serial, not_after } => {
                format!("the credential proxy uses serial {serial}, valid until {not_after}")
            }
            Self::ProxyFailed { reason, detail, count: 1 } => format!("credential proxy: {reason}: {detail}"),
            Self::ProxyFailed { reason, detail, count } => {
                format!("credential proxy: {reason}, {count} times since the last report, most recently: {detail}")
            }
            Self::LogLinesDropped { lines } => {
                format!("{lines} log lines dropped: standard error was not read")
            }
            Self::Stopped => "stopped".to_owned(),
        }
    }
}
