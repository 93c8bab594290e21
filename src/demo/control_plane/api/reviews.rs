//! SelfSubjectReview and SelfSubjectAccessReview. Nothing is stored.

use hyper::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::super::authorization;
use super::super::object::now;
use super::super::status::{Failure, GROUP, RESOURCE};
use super::{Body, Call, JSON, json};

/// `authentication.k8s.io/v1 SelfSubjectReview`, used by `kubectl auth whoami`.
pub(super) async fn self_subject_review(mut call: Call) -> Result<Response<Body>, Failure> {
    read_review(&mut call).await?;
    let mut user = json!({ "username": call.user.name, "groups": call.user.groups });
    if !call.user.extra.is_empty() {
        user["extra"] = json!(call.user.extra);
    }
    json(
        StatusCode::CREATED,
        &json!({
            "kind": "SelfSubjectReview",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": { "creationTimestamp": now() },
            "status": { "userInfo": user },
        }),
    )
}

/// `authorization.k8s.io/v1 SelfSubjectAccessReview`, used by `kubectl auth can-i`.
pub(super) async fn self_subject_access_review(mut call: Call) -> Result<Response<Body>, Failure> {
    let review = read_review(&mut call).await?;
    let attributes = &review["spec"]["resourceAttributes"];
    let text = |key: &str| attributes[key].as_str().unwrap_or_default();
    let ours = text("group") == GROUP && text("resource") == RESOURCE;
    let allowed = if ours {
        authorization::allows(&call.user, text("verb"), text("subresource"))
    } else {
        call.user.is_in("system:masters")
    };
    json(
        StatusCode::CREATED,
        &json!({
            "kind": "SelfSubjectAccessReview",
            "apiVersion": "authorization.k8s.io/v1",
            "metadata": {},
            "spec": review["spec"],
            "status": { "allowed": allowed },
        }),
    )
}

async fn read_review(call: &mut Call) -> Result<Value, Failure> {
    if call.method != Method::POST {
        return Err(Failure::method_not_allowed());
    }
    call.read(&[JSON]).await
}
