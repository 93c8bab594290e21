//! What the control plane says of its clients: their requests, and who they are.

use std::path::Path;

use serde_json::Value;

use super::ControlPlane;
use crate::audit;
use crate::authority::CertificatePair;
use crate::request::SubmittedRequest;

/// Who the API server takes a client for (SelfSubjectReview).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// For example `system:node:NAME`.
    pub username: String,
    /// For example `system:nodes`, `system:authenticated`.
    pub groups: Vec<String>,
    /// SHA-256 of the leaf's DER in lower-case hexadecimal, when the client showed a certificate.
    pub certificate_sha256: Option<String>,
}

impl ControlPlane {
    /// Every CertificateSigningRequest that the cluster holds.
    #[must_use]
    pub fn requests(&self) -> Vec<SubmittedRequest> {
        let mut list = self.kubectl_json(&["get", "certificatesigningrequests", "-o", "json"]);
        match list["items"].take() {
            Value::Array(items) => items.into_iter().map(SubmittedRequest::from_object).collect(),
            _ => Vec::new(),
        }
    }

    /// The CertificateSigningRequest with this name, or `None`.
    #[must_use]
    pub fn request(&self, name: &str) -> Option<SubmittedRequest> {
        self.requests().into_iter().find(|request| request.name == name)
    }

    /// Approves a CertificateSigningRequest, as a person would.
    pub fn approve(&self, name: &str) {
        self.kubectl(&["certificate", "approve", name]);
    }

    /// Denies a CertificateSigningRequest, as a person would.
    pub fn deny(&self, name: &str) {
        self.kubectl(&["certificate", "deny", name]);
    }

    /// Who the API server takes the holder of a pair for.
    ///
    /// # Errors
    /// What kubectl printed, when the API server refuses the pair.
    pub fn who_is(&self, pair: &CertificatePair) -> Result<Identity, String> {
        self.who_is_in(&self.kubeconfig_for(pair))
    }

    /// Who the API server takes the user of a kubeconfig for.
    ///
    /// # Errors
    /// What kubectl printed, when the API server refuses the credential.
    pub fn who_is_in(&self, kubeconfig: &Path) -> Result<Identity, String> {
        let output = self.try_kubectl_as(kubeconfig, &["auth", "whoami", "-o", "json"])?;
        let review: Value = serde_json::from_str(&output).map_err(|error| error.to_string())?;
        let user = &review["status"]["userInfo"];
        Ok(Identity {
            username: user["username"].as_str().unwrap_or_default().to_owned(),
            groups: audit::texts(&user["groups"]),
            certificate_sha256: audit::certificate_sha256(&user["extra"]),
        })
    }
}
