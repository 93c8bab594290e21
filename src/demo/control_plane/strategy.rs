//! Rules for creating and updating CertificateSigningRequests: kube-apiserver's strategy and validation, with the
//! admission plugins NodeRestriction and CertificateSubjectRestriction.

use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::authentication::{User, hexadecimal};
use super::certificate_authority::random_bytes;
use super::certification_request::{
    CertificationRequest, KUBE_APISERVER_CLIENT, KUBE_APISERVER_CLIENT_KUBELET, KUBELET_SERVING, unknown_usage,
};
use super::object::{APPROVED, DENIED, FAILED, name_of, now};
use super::status::Failure;

/// Turns a client's object into the one to store: keeps what clients may set, and adds the identity of `user`.
pub(super) fn prepare_for_create(
    mut object: CertificateSigningRequest,
    user: &User,
) -> Result<CertificateSigningRequest, Failure> {
    let metadata = object.metadata;
    let name = match (metadata.name.filter(|name| !name.is_empty()), &metadata.generate_name) {
        (Some(name), _) => name,
        (None, Some(prefix)) if !prefix.is_empty() => format!("{prefix}{}", random_suffix()?),
        _ => return Err(Failure::invalid("", "metadata.name", "Required value: name or generateName is required")),
    };
    object.metadata = ObjectMeta {
        name: Some(name),
        generate_name: metadata.generate_name,
        labels: metadata.labels,
        annotations: metadata.annotations,
        uid: Some(random_uid()?),
        creation_timestamp: Some(now()),
        ..ObjectMeta::default()
    };
    // Clients cannot set their identity, or approve their own requests.
    object.spec.username = Some(user.name.clone());
    object.spec.groups = Some(user.groups.clone());
    object.spec.uid = None;
    object.spec.extra = (!user.extra.is_empty()).then(|| user.extra.clone());
    object.status = Some(CertificateSigningRequestStatus::default());
    Ok(object)
}

/// Validates an object and checks the admission plugins.
///
/// # Errors
/// 422 if a field is invalid, 403 if an admission plugin rejects the object.
pub(super) fn validate(object: &CertificateSigningRequest, user: &User) -> Result<(), Failure> {
    let name = name_of(object);
    let invalid = |field: &str, why: String| Err(Failure::invalid(&name, field, why));
    if name.contains(['/', '%']) || name == "." || name == ".." {
        return invalid("metadata.name", format!("Invalid value: {name:?}: may not be a path"));
    }
    let request = match CertificationRequest::parse(&object.spec.request.0) {
        Ok(request) => request,
        Err(why) => return invalid("spec.request", format!("Invalid value: {why}")),
    };
    let usages = object.spec.usages.as_deref().unwrap_or_default();
    if usages.is_empty() {
        return invalid("spec.usages", "Required value: usages must be provided".to_owned());
    }
    if let Some(unknown) = unknown_usage(usages) {
        return invalid("spec.usages", format!("Unsupported value: {unknown:?}"));
    }
    if let Some(position) = (1..usages.len()).find(|position| usages[..*position].contains(&usages[*position])) {
        return invalid(&format!("spec.usages[{position}]"), format!("Duplicate value: {:?}", usages[position]));
    }
    let signer_name = object.spec.signer_name.as_str();
    match signer_name.split_once('/') {
        _ if signer_name.is_empty() => return invalid("spec.signerName", "Required value".to_owned()),
        Some((domain, path)) if domain.contains('.') && !path.is_empty() => {}
        _ => {
            let why = format!(
                "Invalid value: {signer_name:?}: must be a fully qualified domain and path of the form 'example.com/signer-name'"
            );
            return invalid("spec.signerName", why);
        }
    }
    if let Some(seconds) = object.spec.expiration_seconds.filter(|seconds| *seconds < 600) {
        let why = format!("Invalid value: {seconds}: may not specify a duration less than 600 seconds (10 minutes)");
        return invalid("spec.expirationSeconds", why);
    }

    let of_node = signer_name == KUBE_APISERVER_CLIENT_KUBELET || signer_name == KUBELET_SERVING;
    if of_node && user.is_in("system:nodes") && request.common_name != user.name {
        return Err(Failure::forbidden(&name, format!("can only create a node CSR with CN={}", user.name)));
    }
    if signer_name == KUBE_APISERVER_CLIENT && request.organizations.iter().any(|group| group == "system:masters") {
        let why = format!("use of {KUBE_APISERVER_CLIENT} signer with system:masters group is not allowed");
        return Err(Failure::forbidden(&name, why));
    }
    Ok(())
}

/// Checks an update's preconditions.
///
/// # Errors
/// 409 if the update is based on another version of the object, or is for another object with that name.
pub(super) fn check_preconditions(
    object: &CertificateSigningRequest,
    sent: &CertificateSigningRequest,
) -> Result<(), Failure> {
    let name = name_of(object);
    if sent.metadata.name.as_ref().is_some_and(|sent| *sent != name) {
        let why = "the name of the object does not match the name on the URL";
        return Err(Failure::bad_request(why));
    }
    let differs = |sent: &Option<String>, current: &Option<String>| {
        sent.as_ref().is_some_and(|sent| !sent.is_empty() && Some(sent) != current.as_ref())
    };
    if differs(&sent.metadata.uid, &object.metadata.uid) {
        return Err(Failure::conflict(&name, "Precondition failed: UID in precondition is not that of the object"));
    }
    if differs(&sent.metadata.resource_version, &object.metadata.resource_version) {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        return Err(Failure::conflict(&name, why));
    }
    Ok(())
}

/// Validates conditions (unique types, status True) and fills in missing timestamps.
pub(super) fn complete_conditions(
    name: &str,
    conditions: &mut [CertificateSigningRequestCondition],
) -> Result<(), Failure> {
    for position in 0..conditions.len() {
        let field = format!("status.conditions[{position}]");
        let (earlier, rest) = conditions.split_at_mut(position);
        let Some(condition) = rest.first_mut() else { continue };
        if condition.type_.is_empty() {
            return Err(Failure::invalid(name, &format!("{field}.type"), "Required value"));
        }
        if earlier.iter().any(|other| other.type_ == condition.type_) {
            let why = format!("Duplicate value: {:?}", condition.type_);
            return Err(Failure::invalid(name, &format!("{field}.type"), why));
        }
        if [APPROVED, DENIED, FAILED].contains(&condition.type_.as_str()) && condition.status != "True" {
            let why = format!("Unsupported value: {:?}: supported values: \"True\"", condition.status);
            return Err(Failure::invalid(name, &format!("{field}.status"), why));
        }
        condition.last_update_time.get_or_insert_with(now);
        condition.last_transition_time.get_or_insert_with(now);
    }
    Ok(())
}

/// Five random characters without vowels, as in Kubernetes' name generator.
fn random_suffix() -> Result<String, Failure> {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let bytes = random_bytes::<5>().map_err(Failure::internal_error)?;
    Ok(bytes.iter().map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])).collect())
}

/// A version 4 UUID (RFC 9562, section 5.4).
fn random_uid() -> Result<String, Failure> {
    let mut bytes = random_bytes::<16>().map_err(Failure::internal_error)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = hexadecimal(&bytes);
    Ok(format!("{}-{}-{}-{}-{}", &digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]))
}
