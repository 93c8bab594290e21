//! The events, each declared once: its name, its fields, how grave it is, and its sentence.

use pintle_agent_core::UnixTime;
use serde::Serialize;

use super::rfc3339;

/// How grave an event is, as in syslog (RFC 5424, section 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Somebody should look.
    Error,
    /// Something failed and is tried again, or needs attention some day.
    Warning,
    /// A thing that happens in a healthy life.
    Info,
}

/// Something that happened. The names and fields are an interface: dashboards and alerts are built on them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The agent runs.
    Started {
        /// The subject's common name.
        subject: String,
        /// The version of pintle.
        version: &'static str,
        /// Where new keys are made.
        backend: String,
    },
    /// An identity cannot be started, and the others go on; it is tried again every few seconds.
    StartFailed {
        /// What is wrong.
        reason: String,
        /// What a person can do about it.
        hint: String,
    },
    /// A credential was found on disk and is used.
    CredentialAdopted {
        /// The file.
        path: String,
        /// The leaf's serial number.
        serial: String,
        /// The leaf's notAfter, RFC 3339.
        not_after: String,
    },
    /// Something on disk cannot be used, and what is done instead.
    DiskUnusable {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
        /// What happens now.
        instead: String,
    },
    /// A rotation begins.
    RotationStarted {
        /// Why: due, bootstrap, requested, refused, key lost or migration.
        reason: String,
    },
    /// A key is there.
    KeyGenerated {
        /// Its name.
        key: String,
        /// Its algorithm.
        algorithm: String,
    },
    /// A CertificateSigningRequest stands at the API server.
    RequestSubmitted {
        /// Its name.
        request: String,
        /// As whom it was made: `held` or `bootstrap`.
        authority: &'static str,
    },
    /// The request waits for an approver or, once approved, for the signer.
    RequestPending {
        /// Its name.
        request: String,
        /// Whether it is approved.
        approved: bool,
    },
    /// The signer has issued a certificate, and it is good.
    CertificateIssued {
        /// The request's name.
        request: String,
        /// The leaf's serial number.
        serial: String,
        /// The leaf's notAfter, RFC 3339.
        not_after: String,
    },
    /// The pair is on disk and current.
    PairPublished {
        /// The file.
        path: String,
        /// The leaf's serial number.
        serial: String,
    },
    /// The API server accepts the new certificate.
    IdentityProven {
        /// As whom it knows us; empty where it does not say.
        user: String,
        /// The leaf's serial number.
        serial: String,
    },
    /// Old keys are destroyed and old pairs removed.
    KeysRetired {
        /// The keys.
        keys: Vec<String>,
        /// How many pairs are kept.
        pairs: usize,
    },
    /// The certificate is good, and this is when it is rotated.
    Holding {
        /// The leaf's serial number.
        serial: String,
        /// When the window opens.
        #[serde(serialize_with = "rfc3339::serialize")]
        opens: UnixTime,
        /// When it is rotated.
        #[serde(serialize_with = "rfc3339::serialize")]
        rotates_at: UnixTime,
        /// The leaf's notAfter.
        #[serde(serialize_with = "rfc3339::serialize")]
        not_after: UnixTime,
    },
    /// Rotation is off, so the certificate is only held.
    RotationOff {
        /// The leaf's notAfter, RFC 3339.
        not_after: String,
    },
    /// The backend lost the key, and enrolling again by itself is not allowed.
    KeyLost {
        /// The key.
        key: String,
    },
    /// Something failed and is tried again.
    Failed {
        /// The phase in which it failed.
        phase: &'static str,
        /// What failed.
        reason: String,
        /// What a person can do about it; empty where there is nothing to say.
        hint: String,
        /// Failures in a row.
        failures: u32,
        /// When it is tried again, RFC 3339.
        retry_at: String,
    },
    /// The journal cannot be written; nothing is done until it can.
    JournalNotSaved {
        /// What the file system says.
        reason: String,
    },
    /// The wall clock was set, or the machine slept.
    ClockStepped,
    /// The API server's clock and this machine's differ by more than a minute.
    ClockOff {
        /// By how many seconds the API server is ahead.
        server_ahead_seconds: i64,
    },
    /// The kubelet's kubeconfig was written.
    KubeconfigWritten {
        /// The file.
        path: String,
    },
    /// The kubelet's kubeconfig does not use the pair that is published.
    KubeconfigStale {
        /// The file.
        path: String,
        /// What it uses instead.
        reason: String,
    },
    /// A backend's device does not answer.
    BackendDown {
        /// Its name in the configuration.
        backend: String,
        /// What is wrong.
        reason: String,
        /// What a person can do about it; empty where there is nothing to say.
        hint: String,
    },
    /// A backend's device answers again.
    BackendUp {
        /// Its name in the configuration.
        backend: String,
    },
    /// The credential proxy takes connections.
    ProxyListening {
        /// Where.
        address: String,
    },
    /// New connections through the credential proxy speak as another certificate.
    ProxySwapped {
        /// The leaf's serial number.
        serial: String,
        /// The leaf's notAfter, RFC 3339.
        not_after: String,
    },
    /// Connections through the credential proxy failed; told at most once a minute for each reason.
    ProxyFailed {
        /// Why, in one word.
        reason: &'static str,
        /// What happened to the last one.
        detail: String,
        /// How many there were since this was told last.
        count: u64,
    },
    /// Standard error was not read for a while, and what would have been written there meanwhile was not.
    LogLinesDropped {
        /// How many lines.
        lines: u64,
    },
    /// The agent ends.
    Stopped,
}

impl Event {
    /// How grave it is.
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

    /// The event as a sentence for a person.
    pub fn sentence(&self) -> String {
        match self {
            Self::Started { subject, version, backend } => {
                format!("pintle {version} keeps {subject}; new keys are made in {backend}")
            }
            Self::StartFailed { reason, hint } => format!("cannot be started: {reason} ({hint})"),
            Self::CredentialAdopted { path, serial, not_after } => {
                format!("adopted {path}: serial {serial}, good until {not_after}")
            }
            Self::DiskUnusable { path, reason, instead } => format!("{path} cannot be used ({reason}); {instead}"),
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
                format!("{request} is Issued: serial {serial}, good until {not_after}")
            }
            Self::PairPublished { path, serial } => format!("pair {path} is current, serial {serial}"),
            Self::IdentityProven { user, serial } if user.is_empty() => {
                format!("the API server accepts serial {serial}")
            }
            Self::IdentityProven { user, serial } => {
                format!("the API server knows serial {serial} as {user}")
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
                format!(
                    "rotation is off: the certificate is held until it expires at {not_after}, and not renewed before"
                )
            }
            Self::KeyLost { key } => {
                format!("the backend has lost key {key}; set on-key-loss = \"enrol\" or restore the device")
            }
            Self::Failed { phase, reason, hint, failures, retry_at } => {
                let hint = if hint.is_empty() { String::new() } else { format!(" ({hint})") };
                format!("{phase} failed {failures}×: {reason}{hint}; next try at {retry_at}")
            }
            Self::JournalNotSaved { reason } => format!("the journal cannot be saved, so nothing is done: {reason}"),
            Self::ClockStepped => "the clock was set or the machine slept: looking again at once".to_owned(),
            Self::ClockOff { server_ahead_seconds } => {
                format!("the API server's clock is {server_ahead_seconds} s ahead of this machine's")
            }
            Self::KubeconfigWritten { path } => format!("kubeconfig {path} written"),
            Self::KubeconfigStale { path, reason } => {
                format!(
                    "kubeconfig {path} does not follow rotations: {reason}; mend it with pintle kubeconfig --for file \
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
                format!("the credential proxy speaks as serial {serial}, good until {not_after}")
            }
            Self::ProxyFailed { reason, detail, count: 1 } => format!("credential proxy: {reason}: {detail}"),
            Self::ProxyFailed { reason, detail, count } => {
                format!("credential proxy: {reason}, {count} times within a minute or more, the last one: {detail}")
            }
            Self::LogLinesDropped { lines } => {
                format!("{lines} lines were dropped here: standard error was not read")
            }
            Self::Stopped => "stopped".to_owned(),
        }
    }
}
