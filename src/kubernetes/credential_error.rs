//! Why a kubeconfig's credential cannot be had, in words that hold none of its values.
//!
//! A failed exec plugin comes with its arguments, environment and output, and a URL may hold a password: only what is known
//! to hold no value is passed on.

use kube::client::AuthError;

/// Why there is no client for a kubeconfig, whose exec plugin this is.
pub(super) fn client(error: &kube::Error, exec_plugin: Option<&str>) -> String {
    match error {
        kube::Error::Auth(error) => credential(error, exec_plugin),
        kube::Error::RustlsTls(error) => tls(error),
        _ => "no client can be made of it".to_owned(),
    }
}

fn tls(error: &kube::client::RustlsTlsError) -> String {
    use kube::client::RustlsTlsError as Error;
    match error {
        Error::InvalidIdentityPem(_) | Error::MissingCertificate | Error::MissingPrivateKey => {
            "the certificate or key that its exec plugin printed is not valid PEM".to_owned()
        }
        Error::InvalidPrivateKey(_) | Error::UnknownPrivateKeyFormat => {
            "the key that its exec plugin printed cannot be used with the certificate".to_owned()
        }
        // The system's authorities, which are no secret.
        error => error.to_string(),
    }
}

/// Why a kubeconfig's credential cannot be had.
pub(super) fn credential(error: &AuthError, exec_plugin: Option<&str>) -> String {
    let plugin = exec_plugin.map_or_else(|| "its exec plugin".to_owned(), |name| format!("its exec plugin {name}"));
    match error {
        AuthError::AuthExecStart(error) => format!("{plugin} cannot be started: {error}"),
        AuthError::AuthExecRun { out, .. } => format!("{plugin} failed: {}", out.status),
        AuthError::AuthExecParse(_) => format!("{plugin} printed no ExecCredential"),
        AuthError::ExecPluginFailed => format!("{plugin} printed an ExecCredential without a status"),
        AuthError::MalformedTokenExpirationDate(_) => {
            "the time at which its credential expires is not in RFC 3339".to_owned()
        }
        AuthError::InvalidBasicAuth(_) | AuthError::InvalidBearerToken(_) => UNUSABLE_TOKEN.to_owned(),
        AuthError::ReadTokenFile(error, path) => format!("its token file {} cannot be read: {error}", path.display()),
        AuthError::MissingCommand => "its exec plugin has no command".to_owned(),
        _ => "its auth-provider gives no credential; Kubernetes has replaced those by exec plugins".to_owned(),
    }
}

/// What a token is that cannot stand in an HTTP header.
pub(super) const UNUSABLE_TOKEN: &str =
    "its token holds a line break or another character that cannot stand in an HTTP header";

/// A URL's scheme, host and port: what stands before the host may be a password.
pub(super) fn address(url: &http::Uri) -> String {
    let scheme = url.scheme_str().map(|scheme| format!("{scheme}://")).unwrap_or_default();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{scheme}{}{port}", url.host().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_told_without_its_user() {
        assert_eq!(address(&"ftp://user:hunter2@proxy:21/hunter2".parse().expect("a URL")), "ftp://proxy:21");
        assert_eq!(address(&"server".parse().expect("a URL")), "server");
    }
}
