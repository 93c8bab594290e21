//! Accessors for CertificateSigningRequests.

use std::time::SystemTime;

use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

/// The condition type of an approved request.
pub(super) const APPROVED: &str = "Approved";
/// The condition type of a denied request.
pub(super) const DENIED: &str = "Denied";
/// The condition type of a request that the signer could not sign.
pub(super) const FAILED: &str = "Failed";

pub(super) fn name_of(object: &CertificateSigningRequest) -> String {
    object.metadata.name.clone().unwrap_or_default()
}

pub(super) fn conditions_of(object: &CertificateSigningRequest) -> &[CertificateSigningRequestCondition] {
    object.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default()
}

pub(super) fn has_condition(object: &CertificateSigningRequest, type_: &str) -> bool {
    conditions_of(object).iter().any(|condition| condition.type_ == type_)
}

/// Whether a certificate has been issued.
pub(super) fn is_issued(object: &CertificateSigningRequest) -> bool {
    let certificate = object.status.as_ref().and_then(|status| status.certificate.as_ref());
    certificate.is_some_and(|pem| !pem.0.is_empty())
}

/// The current time, truncated to seconds like Kubernetes timestamps.
pub(super) fn now() -> Time {
    Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH))
}

/// Converts a system time, truncated to seconds.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let exact = Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH);
    Timestamp::from_second(exact.as_second()).unwrap_or(Timestamp::UNIX_EPOCH)
}
