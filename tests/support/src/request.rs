//! CertificateSigningRequests in the cluster.

use serde_json::Value;

/// A CertificateSigningRequest (certificates.k8s.io/v1).
#[derive(Clone, Debug)]
pub struct SubmittedRequest {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `spec.signerName`.
    pub signer_name: String,
    /// `spec.username`: the user that created it.
    pub username: String,
    /// `spec.usages`.
    pub usages: Vec<String>,
    /// `spec.request` as in JSON: base64 of the PEM.
    pub request: String,
    /// The types of `status.conditions`: `Approved`, `Denied`, `Failed`.
    pub conditions: Vec<String>,
    /// `status.certificate` as in JSON, base64 of the PEM, once issued.
    pub certificate: Option<String>,
    /// The whole object.
    pub object: Value,
}

impl SubmittedRequest {
    /// Whether it is still being processed: neither issued, denied nor failed.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.certificate.is_none() && !self.has_condition("Denied") && !self.has_condition("Failed")
    }

    /// Whether `status.conditions` has a condition of this type.
    #[must_use]
    pub fn has_condition(&self, condition: &str) -> bool {
        self.conditions.iter().any(|present| present == condition)
    }

    pub(crate) fn from_object(object: Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let texts = |value: &Value| value.as_array().into_iter().flatten().map(text).collect();
        let (metadata, spec, status) = (&object["metadata"], &object["spec"], &object["status"]);
        Self {
            name: text(&metadata["name"]),
            uid: text(&metadata["uid"]),
            signer_name: text(&spec["signerName"]),
            username: text(&spec["username"]),
            usages: texts(&spec["usages"]),
            request: text(&spec["request"]),
            conditions: status["conditions"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|condition| text(&condition["type"]))
                .collect(),
            certificate: status["certificate"].as_str().map(str::to_owned),
            object,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_request_is_live_until_it_is_issued_or_denied() {
        let pending = json!({"metadata": {"name": "a"}, "spec": {"usages": ["client auth"]}});
        let pending = SubmittedRequest::from_object(pending);
        assert!(pending.is_live());
        assert_eq!(pending.usages, ["client auth"]);
        let denied = json!({"status": {"conditions": [{"type": "Denied"}]}});
        assert!(!SubmittedRequest::from_object(denied).is_live());
        let approved = json!({"status": {"conditions": [{"type": "Approved"}]}});
        assert!(SubmittedRequest::from_object(approved).is_live());
        let issued = json!({"status": {"conditions": [{"type": "Approved"}], "certificate": "LS0t"}});
        assert!(!SubmittedRequest::from_object(issued).is_live());
    }
}
