//! What the control plane can be told to do wrong.

use std::time::Duration;

/// Faults that are in force; the default is none. Those that count apply to requests for CertificateSigningRequests
/// and are used up one by one; the rest stay until they are changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    /// The approver denies the next pending request that it looks at, whatever its signer; used up by it.
    pub deny_next: bool,
    /// The approver leaves pending requests alone.
    pub hold_approvals: bool,
    /// The signer marks the next approved request Failed; used up by it.
    pub fail_next_signing: bool,
    /// Answer so many requests with 429 Too Many Requests.
    pub too_many_requests: u32,
    /// The Retry-After of those answers, in whole seconds; none is sent when this is None.
    pub retry_after: Option<Duration>,
    /// Answer so many requests with 500 Internal Server Error.
    pub internal_errors: u32,
    /// Accept connections and requests and answer none, watches included, until this is false again.
    pub hang: bool,
    /// Port closed, connections cut. See [`ControlPlane::go_away`](super::ControlPlane::go_away), which also waits.
    pub unreachable: bool,
    /// How far the signer's clock is ahead (negative: behind), in seconds. Ahead by more than the five minutes of
    /// backdating, notBefore lies in the future.
    pub signing_clock_offset_seconds: i64,
    /// The signer leaves the first subjectAltName of each request out of the leaf.
    pub drop_subject_alternative_name: bool,
}
