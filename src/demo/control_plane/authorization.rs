//! Authorization: only the ClusterRoles that a cluster with kubelet bootstrapping binds.

use super::authentication::User;
use super::status::{Failure, GROUP, RESOURCE};

/// Whether `user` may do `verb` (get, list, watch, create, update, patch, delete) on CertificateSigningRequests or on
/// one of their subresources.
///
/// system:masters may do everything; system:node-bootstrapper and system:node grant create, get, list and watch.
pub(super) fn allows(user: &User, verb: &str, subresource: &str) -> bool {
    if user.is_in("system:masters") {
        return true;
    }
    let requester = user.is_in("system:bootstrappers") || user.is_in("system:nodes");
    requester && subresource.is_empty() && ["create", "get", "list", "watch"].contains(&verb)
}

/// Like [`allows`], but returns the API server's error.
///
/// # Errors
/// 403 with kube-apiserver's message.
pub(super) fn authorize(user: &User, verb: &str, name: &str, subresource: &str) -> Result<(), Failure> {
    if allows(user, verb, subresource) {
        return Ok(());
    }
    let resource = if subresource.is_empty() { RESOURCE.to_owned() } else { format!("{RESOURCE}/{subresource}") };
    let user = &user.name;
    Err(Failure::forbidden(
        name,
        format!("User {user:?} cannot {verb} resource {resource:?} in API group {GROUP:?} at the cluster scope"),
    ))
}

/// Whether kube-controller-manager's SubjectAccessReview would approve a node client certificate for this requester;
/// if so, the condition's message. `system:nodes` may use selfnodeclient, `system:bootstrappers` nodeclient.
pub(super) fn node_client_approval(username: &str, groups: &[String], common_name: &str) -> Option<&'static str> {
    let is_in = |group: &str| groups.iter().any(|each| each == group);
    if username == common_name && (is_in("system:nodes") || is_in("system:masters")) {
        return Some("Auto approving self kubelet client certificate after SubjectAccessReview.");
    }
    if is_in("system:bootstrappers") || is_in("system:masters") {
        return Some("Auto approving kubelet client certificate after SubjectAccessReview.");
    }
    None
}
