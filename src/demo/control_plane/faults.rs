//! Fault injection for the control plane.

use std::time::Duration;

/// The faults in force; none by default. Counted faults apply to requests for CertificateSigningRequests and are
/// consumed one by one; the others stay until changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    /// The approver denies the next pending request, whatever its signer. Reset when used.
    pub deny_next: bool,
    /// The approver does not process pending requests.
    pub hold_approvals: bool,
    /// The signer marks the next approved request Failed. Reset when used.
    pub fail_next_signing: bool,
    /// Respond with 429 Too Many Requests to this many requests.
    pub too_many_requests: u32,
    /// The Retry-After header of these responses, in whole seconds; none is sent if this is `None`.
    pub retry_after: Option<Duration>,
    /// Respond with 500 Internal Server Error to this many requests.
    pub internal_errors: u32,
    /// Accept connections and requests, but send no responses or watch events until this is false again.
    pub hang: bool,
    /// Close the port and all connections. [`ControlPlane::go_away`](super::ControlPlane::go_away) also waits for it.
    pub unreachable: bool,
    /// The offset of the signer's clock in seconds; negative if it is slow. If it is more than five minutes fast, the
    /// backdated notBefore is in the future.
    pub signing_clock_offset_seconds: i64,
    /// The signer omits the first subjectAltName of each request.
    pub drop_subject_alternative_name: bool,
}
