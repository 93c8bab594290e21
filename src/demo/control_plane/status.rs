//! `metav1.Status`: the error responses of a Kubernetes API.

use std::time::Duration;

use serde_json::{Value, json};

/// The API group of the only stored resource.
pub(super) const GROUP: &str = "certificates.k8s.io";
pub(super) const RESOURCE: &str = "certificatesigningrequests";

/// An error response.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure {
    pub(super) code: u16,
    pub(super) reason: &'static str,
    pub(super) message: String,
    pub(super) details: Value,
    pub(super) retry_after: Option<Duration>,
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null, retry_after: None }
    }

    fn about(mut self, name: &str) -> Self {
        self.details = json!({ "name": name, "group": GROUP, "kind": RESOURCE });
        self
    }

    /// The response as a `Status` object.
    pub(super) fn to_json(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub(super) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403 for an object; `name` may be empty.
    pub(super) fn forbidden(name: &str, why: impl std::fmt::Display) -> Self {
        let object = if name.is_empty() { String::new() } else { format!(" \"{name}\"") };
        Self::new(403, "Forbidden", format!("{RESOURCE}.{GROUP}{object} is forbidden: {why}")).about(name)
    }

    /// 403 for a path that is not a resource.
    pub(super) fn forbidden_path(user: &str, verb: &str, path: &str) -> Self {
        Self::new(403, "Forbidden", format!("forbidden: User {user:?} cannot {verb} path {path:?}"))
    }

    pub(super) fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    pub(super) fn not_found(name: &str) -> Self {
        Self::new(404, "NotFound", format!("{RESOURCE}.{GROUP} \"{name}\" not found")).about(name)
    }

    pub(super) fn method_not_allowed() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    pub(super) fn not_acceptable() -> Self {
        let message = "only the following media types are accepted: application/json, application/json;as=Table";
        Self::new(406, "NotAcceptable", message)
    }

    pub(super) fn already_exists(name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{RESOURCE}.{GROUP} \"{name}\" already exists")).about(name)
    }

    pub(super) fn conflict(name: &str, why: impl std::fmt::Display) -> Self {
        let message = format!("Operation cannot be fulfilled on {RESOURCE}.{GROUP} \"{name}\": {why}");
        Self::new(409, "Conflict", message).about(name)
    }

    /// 410 for a watch from a resourceVersion that has been discarded.
    pub(super) fn expired(asked: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {asked} ({oldest})"))
    }

    pub(super) fn request_entity_too_large() -> Self {
        Self::new(413, "RequestEntityTooLarge", "Request entity too large: limit is 3145728")
    }

    pub(super) fn unsupported_media_type(accepted: &str) -> Self {
        let message =
            format!("the body of the request was in an unknown format - accepted media types include: {accepted}");
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 422 for an invalid field.
    pub(super) fn invalid(name: &str, field: &str, why: impl std::fmt::Display) -> Self {
        let message = format!("CertificateSigningRequest.{GROUP} \"{name}\" is invalid: {field}: {why}");
        let mut failure = Self::new(422, "Invalid", message);
        failure.details = json!({
            "name": name,
            "group": GROUP,
            "kind": "CertificateSigningRequest",
            "causes": [{ "reason": "FieldValueInvalid", "message": why.to_string(), "field": field }],
        });
        failure
    }

    pub(super) fn too_many_requests(retry_after: Option<Duration>) -> Self {
        let mut failure = Self::new(
            429,
            "TooManyRequests",
            "the server has received too many requests and has asked us to try again later",
        );
        if let Some(after) = retry_after {
            failure.details = json!({ "retryAfterSeconds": after.as_secs() });
        }
        failure.retry_after = retry_after;
        failure
    }

    pub(super) fn internal_error(why: impl std::fmt::Display) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {why}"))
    }
}
