//! The controllers of kube-controller-manager that approve and sign CertificateSigningRequests.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use tokio::time::Instant;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Observation;
use super::authentication::hexadecimal;
use super::authorization::node_client_approval;
use super::certificate_authority::BACKDATE;
use super::certification_request::{
    CertificationRequest, KUBE_APISERVER_CLIENT, KUBE_APISERVER_CLIENT_KUBELET, KUBELET_SERVING,
};
use super::cluster::Cluster;
use super::object::{APPROVED, DENIED, FAILED, has_condition, is_issued, name_of, timestamp};

/// Lifetimes of at least this count from the backdated notBefore (kubernetes pkg/controller/certificates/authority).
const SHORT_LIFETIME: Duration = Duration::from_secs(8 * 3600);

/// The minimum of spec.expirationSeconds that the signer honours.
const MINIMUM_REQUESTED_LIFETIME: Duration = Duration::from_secs(600);

/// Processes every object after each change: approves pending requests when due, and signs approved ones. Never
/// returns.
pub(super) async fn run(cluster: Arc<Cluster>) {
    let mut changes = cluster.registry.subscribe();
    let mut faults = cluster.faults.subscribe();
    let mut first_seen: HashMap<String, Instant> = HashMap::new();
    loop {
        changes.borrow_and_update();
        faults.borrow_and_update();
        let objects = cluster.registry.list().1;
        first_seen.retain(|uid, _| objects.iter().any(|object| object.metadata.uid.as_ref() == Some(uid)));
        let mut next_due: Option<Instant> = None;
        for object in &objects {
            if has_condition(object, APPROVED) {
                if !has_condition(object, DENIED) && !has_condition(object, FAILED) && !is_issued(object) {
                    sign(&cluster, object);
                }
            } else if !has_condition(object, DENIED) {
                let uid = object.metadata.uid.clone().unwrap_or_default();
                let due = *first_seen.entry(uid).or_insert_with(Instant::now) + cluster.options.approval_delay;
                if due <= Instant::now() {
                    approve_or_deny(&cluster, object);
                } else {
                    next_due = Some(next_due.map_or(due, |next| next.min(due)));
                }
            }
        }
        let wait = async {
            match next_due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = changes.changed() => {}
            _ = faults.changed() => {}
            () = wait => {}
        }
    }
}

/// The approver. Approves a node's own client certificate; other requests wait for manual approval.
fn approve_or_deny(cluster: &Cluster, object: &CertificateSigningRequest) {
    if cluster.take_fault(|faults| std::mem::take(&mut faults.deny_next)) {
        let condition = condition(DENIED, "DeniedByFault", "Fault injection: deny_next.");
        return add_condition(cluster, object, condition);
    }
    let held = cluster.faults.borrow().hold_approvals;
    if held || cluster.options.manual_approval || object.spec.signer_name != KUBE_APISERVER_CLIENT_KUBELET {
        return;
    }
    let Ok(request) = CertificationRequest::parse(&object.spec.request.0) else { return };
    let usages = object.spec.usages.as_deref().unwrap_or_default();
    if request.check_for_signer(&object.spec.signer_name, usages).is_err() {
        return;
    }
    let username = object.spec.username.as_deref().unwrap_or_default();
    let groups = object.spec.groups.as_deref().unwrap_or_default();
    if let Some(message) = node_client_approval(username, groups, &request.common_name) {
        add_condition(cluster, object, condition(APPROVED, "AutoApproved", message));
    }
}

/// The signer. Issues a certificate, or adds the condition Failed.
fn sign(cluster: &Cluster, object: &CertificateSigningRequest) {
    let signer_name = object.spec.signer_name.as_str();
    if ![KUBE_APISERVER_CLIENT_KUBELET, KUBELET_SERVING, KUBE_APISERVER_CLIENT].contains(&signer_name) {
        return; // Handled by another signer.
    }
    let issued = if cluster.take_fault(|faults| std::mem::take(&mut faults.fail_next_signing)) {
        Err("Fault injection: fail_next_signing.".to_owned())
    } else {
        issue(cluster, object)
    };
    let mut signed = object.clone();
    let status = signed.status.get_or_insert_default();
    match issued {
        Ok(leaf) => {
            status.certificate = Some(ByteString(leaf.pem.into_bytes()));
            if cluster.update_status(&name_of(object), &signed).is_ok() {
                cluster.report(leaf.observation);
            }
        }
        Err(message) => add_condition(cluster, object, condition(FAILED, "SignerValidationFailure", &message)),
    }
}

struct Leaf {
    pem: String,
    observation: Observation,
}

fn issue(cluster: &Cluster, object: &CertificateSigningRequest) -> Result<Leaf, String> {
    let usages = object.spec.usages.as_deref().unwrap_or_default();
    let request = CertificationRequest::parse(&object.spec.request.0)?;
    request.check_for_signer(&object.spec.signer_name, usages)?;
    let faults = cluster.faults.borrow().clone();
    let (params, public_key) = request.certificate_params(usages, faults.drop_subject_alternative_name)?;

    let offset = Duration::from_secs(faults.signing_clock_offset_seconds.unsigned_abs());
    let now = SystemTime::now();
    let now = if faults.signing_clock_offset_seconds < 0 { now - offset } else { now + offset };
    let (not_before, not_after) =
        validity(now, granted_lifetime(cluster.options.cluster_signing_duration, object.spec.expiration_seconds));
    let certificate = cluster
        .client_authority()
        .sign(params, &public_key, not_before, not_after)
        .map_err(|error| error.to_string())?;

    let (_, parsed) = X509Certificate::from_der(certificate.der()).map_err(|error| error.to_string())?;
    let observation = Observation::Issued {
        name: name_of(object),
        serial: hexadecimal(parsed.raw_serial()).to_uppercase(),
        not_before: timestamp(not_before),
        not_after: timestamp(not_after),
    };
    // rcgen uses the platform's line endings; Kubernetes always uses \n.
    Ok(Leaf { pem: certificate.pem().replace("\r\n", "\n"), observation })
}

/// notBefore is five minutes ago. notAfter counts from now for lifetimes under eight hours, and from notBefore
/// otherwise.
fn validity(now: SystemTime, life: Duration) -> (SystemTime, SystemTime) {
    let not_before = now - BACKDATE;
    (not_before, if life < SHORT_LIFETIME { now + life } else { not_before + life })
}

/// Limits the requested lifetime to between ten minutes and the signer's own, which may be even shorter.
fn granted_lifetime(longest: Duration, expiration_seconds: Option<i32>) -> Duration {
    match expiration_seconds.map(|seconds| Duration::from_secs(u64::try_from(seconds).unwrap_or(0))) {
        Some(requested) if requested <= longest => requested.max(MINIMUM_REQUESTED_LIFETIME),
        _ => longest,
    }
}

fn condition(type_: &str, reason: &str, message: &str) -> CertificateSigningRequestCondition {
    CertificateSigningRequestCondition {
        type_: type_.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_update_time: None,
        last_transition_time: None,
    }
}

/// Adds a condition unless the object has changed since it was read; if it has, the controller processes it again.
fn add_condition(cluster: &Cluster, object: &CertificateSigningRequest, condition: CertificateSigningRequestCondition) {
    let approval = condition.type_ != FAILED;
    let mut changed = object.clone();
    changed.status.get_or_insert_default().conditions.get_or_insert_default().push(condition);
    let name = name_of(object);
    let _ = if approval { cluster.update_approval(&name, &changed) } else { cluster.update_status(&name, &changed) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c24_validity_and_granted_lifetime_match_the_controller() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let seconds = Duration::from_secs;
        assert_eq!(validity(now, seconds(30)), (now - seconds(300), now + seconds(30)));
        assert_eq!(validity(now, seconds(8 * 3600)), (now - seconds(300), now + seconds(8 * 3600 - 300)));
        assert_eq!(granted_lifetime(seconds(30), Some(600)), seconds(30));
        assert_eq!(granted_lifetime(seconds(86_400), Some(599)), seconds(600));
        assert_eq!(granted_lifetime(seconds(86_400), Some(3600)), seconds(3600));
        assert_eq!(granted_lifetime(seconds(86_400), None), seconds(86_400));
    }
}
