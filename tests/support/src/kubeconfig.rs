//! Kubeconfig files.

use std::path::{Path, PathBuf};

use crate::authority::CertificatePair;
use crate::scratch::write_private;

/// How a kubeconfig authenticates.
pub(crate) enum Credential {
    Pair(CertificatePair),
    Token(String),
}

impl From<CertificatePair> for Credential {
    fn from(pair: CertificatePair) -> Self {
        Self::Pair(pair)
    }
}

/// Writes a kubeconfig with one cluster, which refers to its CA by file, and one user.
pub(crate) fn write(path: &Path, server_url: &str, authority: &Path, credential: &Credential) -> PathBuf {
    let user = match credential {
        Credential::Pair(pair) => {
            format!("client-certificate: {}\n    client-key: {}", pair.certificate.display(), pair.key.display())
        }
        Credential::Token(token) => format!("token: {token}"),
    };
    let certificate_authority = authority.display();
    let contents = format!(
        "\
apiVersion: v1
kind: Config
clusters:
- name: test
  cluster:
    server: {server_url}
    certificate-authority: {certificate_authority}
users:
- name: test
  user:
    {user}
contexts:
- name: test
  context:
    cluster: test
    user: test
current-context: test
"
    );
    write_private(path, contents.as_bytes());
    path.to_owned()
}
