//! What a CertificateSigningRequest says of itself.

use std::time::SystemTime;

use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

/// The condition type of an approved request.
pub(super) const APPROVED: &str = "Approved";
/// The condition type of a denied request.
pub(super) const DENIED: &str = "Denied";
/// The condition type of a request that the signer refused.
pub(super) const FAILED: &str = "Failed";

/// The object's name.
pub(super) fn name_of(object: &CertificateSigningRequest) -> String {
    object.metadata.name.clone().unwrap_or_default()
}

/// The object's conditions.
pub(super) fn conditions_of(object: &CertificateSigningRequest) -> &[CertificateSigningRequestCondition] {
    object.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default()
}

/// Whether the object has a condition of this type.
pub(super) fn has_condition(object: &CertificateSigningRequest, type_: &str) -> bool {
    conditions_of(object).iter().any(|condition| condition.type_ == type_)
}

/// Whether a certificate has been issued.
pub(super) fn is_issued(object: &CertificateSigningRequest) -> bool {
    let certificate = object.status.as_ref().and_then(|status| status.certificate.as_ref());
    certificate.is_some_and(|pem| !pem.0.is_empty())
}

/// The time now, in whole seconds as Kubernetes writes it.
pub(super) fn now() -> Time {
    Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH))
}

/// A system time as a timestamp in whole seconds.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let exact = Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH);
    Timestamp::from_second(exact.as_second()).unwrap_or(Timestamp::UNIX_EPOCH)
}
