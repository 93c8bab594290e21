//! Kubeconfig files (YAML) for the control plane's clients.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::certificate_authority::ClientPair;

/// With a bearer token, like the bootstrap-kubelet.conf written by `kubeadm`.
pub(super) fn with_token(server: &str, authority_pem: &str, token: &str) -> String {
    document(server, authority_pem, &format!("    token: {token}\n"))
}

/// With an inline client certificate and key.
pub(super) fn with_client_certificate(server: &str, authority_pem: &str, pair: &ClientPair) -> String {
    let user = format!(
        "    client-certificate-data: {}\n    client-key-data: {}\n",
        STANDARD.encode(&pair.certificate_pem),
        STANDARD.encode(pair.key_pem.as_bytes()),
    );
    document(server, authority_pem, &user)
}

fn document(server: &str, authority_pem: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\n\
         kind: Config\n\
         clusters:\n\
         - name: pintle-demo\n  cluster:\n    server: {server}\n    certificate-authority-data: {authority}\n\
         users:\n\
         - name: pintle-demo\n  user:\n{user}\
         contexts:\n\
         - name: pintle-demo\n  context:\n    cluster: pintle-demo\n    user: pintle-demo\n\
         current-context: pintle-demo\n",
        authority = STANDARD.encode(authority_pem),
    )
}
