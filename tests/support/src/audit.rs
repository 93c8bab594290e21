//! The API server's audit log: who requested what, and with which certificate.

use std::path::Path;

use serde_json::Value;

use crate::process::read_lossy;

/// Logs every completed request, without bodies.
pub(crate) const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules: [{level: Metadata}]
";

/// A completed request (audit.k8s.io/v1, stage ResponseComplete). A watch completes when it ends.
#[derive(Clone, Debug)]
pub struct AuditEvent {
    /// `user.username`, for example `system:node:NAME`.
    pub username: String,
    /// `user.groups`.
    pub groups: Vec<String>,
    /// SHA-256 of the client certificate's DER in lower-case hexadecimal, from the API server's credential ID; `None`
    /// for a token.
    pub certificate_sha256: Option<String>,
    /// `verb`, for example `create`.
    pub verb: String,
    /// `objectRef.resource`; empty if the request has none.
    pub resource: String,
    /// `objectRef.subresource`; may be empty.
    pub subresource: String,
    /// `objectRef.name`; may be empty.
    pub name: String,
    /// `userAgent`.
    pub user_agent: String,
    /// `responseStatus.code`.
    pub code: u64,
    /// The whole event.
    pub object: Value,
}

/// The events in the log, without a last line that is incomplete.
pub(crate) fn read(path: &Path) -> Vec<AuditEvent> {
    read_lossy(path)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .map(|object| {
            let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
            AuditEvent {
                username: text("/user/username"),
                groups: texts(&object["user"]["groups"]),
                certificate_sha256: certificate_sha256(&object["user"]["extra"]),
                verb: text("/verb"),
                resource: text("/objectRef/resource"),
                subresource: text("/objectRef/subresource"),
                name: text("/objectRef/name"),
                user_agent: text("/userAgent"),
                code: object["responseStatus"]["code"].as_u64().unwrap_or_default(),
                object,
            }
        })
        .collect()
}

/// Reads a user's `extra`: `authentication.kubernetes.io/credential-id: ["X509SHA256=<hexadecimal>"]` (since 1.32).
pub(crate) fn certificate_sha256(extra: &Value) -> Option<String> {
    texts(&extra["authentication.kubernetes.io/credential-id"])
        .iter()
        .find_map(|id| id.strip_prefix("X509SHA256=").map(str::to_lowercase))
}

pub(crate) fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScratchDirectory;

    #[test]
    fn complete_lines_are_parsed_and_an_incomplete_one_is_skipped() {
        let scratch = ScratchDirectory::new();
        let line = r#"{"verb":"create","user":{"username":"system:node:a","groups":["system:nodes"],"extra":{"authentication.kubernetes.io/credential-id":["X509SHA256=AB01"]}},"objectRef":{"resource":"certificatesigningrequests"},"responseStatus":{"code":201}}"#;
        let log = scratch.write("audit.log", format!("{line}\n{}", &line[..40]));
        let events = read(&log);
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].username, "system:node:a");
        assert_eq!(events[0].certificate_sha256.as_deref(), Some("ab01"));
        assert_eq!((events[0].resource.as_str(), events[0].code), ("certificatesigningrequests", 201));
    }
}
