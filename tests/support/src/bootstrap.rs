//! The credentials that a node requests its first certificate with.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::control_plane::ControlPlane;
use crate::permissions::{GROUP, STATIC_TOKEN};

/// The credential in a bootstrap kubeconfig.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootstrapCredential {
    /// A bootstrap token that is a Secret in kube-system, as created by `kubeadm token create`.
    SecretToken,
    /// A bearer token from `--token-auth-file`.
    StaticToken,
    /// A client certificate in the group system:bootstrappers.
    ClientCertificate,
}

impl BootstrapCredential {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::SecretToken, Self::StaticToken, Self::ClientCertificate];
}

impl ControlPlane {
    /// Writes a kubeconfig that can only request a node's certificate, with a new credential if its kind allows one.
    #[must_use]
    pub fn bootstrap_kubeconfig(&self, credential: BootstrapCredential) -> PathBuf {
        match credential {
            BootstrapCredential::SecretToken => {
                let id = format!("{:06}", self.next_number());
                let secret = "0123456789abcdef";
                self.create(&secret_token(&id, secret));
                self.kubeconfig_with_token(&format!("{id}.{secret}"))
            }
            BootstrapCredential::StaticToken => self.kubeconfig_with_token(STATIC_TOKEN),
            BootstrapCredential::ClientCertificate => {
                let name = format!("bootstrap-{}", self.next_number());
                let pair = self.authority().issue_client(&name, &[GROUP], Duration::from_secs(24 * 3600));
                self.kubeconfig_for(&pair)
            }
        }
    }
}

fn secret_token(id: &str, secret: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": format!("bootstrap-token-{id}"), "namespace": "kube-system"},
        "type": "bootstrap.kubernetes.io/token",
        "stringData": {"token-id": id, "token-secret": secret, "usage-bootstrap-authentication": "true"},
    })
}
