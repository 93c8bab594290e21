//! What others say of a kubeconfig and its credential, in words that hold none of its values.
//!
//! A parser quotes the lines around an error, a failed exec plugin comes with its arguments, environment and output, and
//! a proxy's URL may hold a password: nothing of theirs is passed on but what is known to hold no value.

use kube::client::AuthError;
use kube::config::{KubeconfigError, LoadDataError};

/// Where YAML is wrong, and how.
pub fn yaml(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::Error;
    let kind = match error.without_snippet() {
        Error::DuplicateMappingKey { .. } => "a key appears twice".to_owned(),
        Error::Eof { .. } => "it ends too early".to_owned(),
        // A name of the schema, not of the file.
        Error::SerdeMissingField { field, .. } => format!("{field} is missing"),
        Error::Unexpected { expected, .. } => format!("this should be {expected}"),
        Error::SerdeInvalidType { .. } | Error::InvalidScalar { .. } => "a value of another type is needed".to_owned(),
        _ => "it is no YAML, or not what should stand there".to_owned(),
    };
    match error.location() {
        Some(location) => format!("line {}, column {}: {kind}", location.line(), location.column()),
        None => kind,
    }
}

/// Why a kubeconfig cannot be used.
pub(super) fn kubeconfig(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::Parse(error) => yaml(error),
        KubeconfigError::ReadConfig(error, _) => error.to_string(),
        KubeconfigError::LoadCertificateAuthority(error) => data("certificate-authority", error),
        KubeconfigError::LoadClientCertificate(error) => data("client-certificate", error),
        KubeconfigError::LoadClientKey(error) => data("client-key", error),
        // The rest names contexts and clusters, or nothing.
        error => error.to_string(),
    }
}

fn data(what: &str, error: &LoadDataError) -> String {
    match error {
        LoadDataError::DecodeBase64(_) => format!("its {what}-data is no base64"),
        LoadDataError::ReadFile(error, path) => format!("its {what} {} cannot be read: {error}", path.display()),
        LoadDataError::NoBase64DataOrFile => format!("it has no {what}"),
    }
}

/// Why there is no client for a kubeconfig, whose exec plugin this is.
pub(super) fn client(error: &kube::Error, exec_plugin: Option<&str>) -> String {
    match error {
        kube::Error::Auth(error) => credential(error, exec_plugin),
        kube::Error::InferKubeconfig(error) => kubeconfig(error),
        kube::Error::RustlsTls(error) => tls(error),
        kube::Error::ProxyProtocolUnsupported { proxy_url } => unknown_proxy(proxy_url),
        _ => "no client can be made of it".to_owned(),
    }
}

fn tls(error: &kube::client::RustlsTlsError) -> String {
    use kube::client::RustlsTlsError as Error;
    match error {
        Error::InvalidIdentityPem(_) => "its client certificate or key is no PEM".to_owned(),
        Error::InvalidPrivateKey(_) => "its client key is not one that can be used with its certificate".to_owned(),
        // The rest is of the authority, which is no secret, or names nothing.
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
        AuthError::MalformedTokenExpirationDate(_) => "the time at which its credential ends is no time".to_owned(),
        AuthError::InvalidBasicAuth(_) | AuthError::InvalidBearerToken(_) => {
            "its token or password holds what none may hold, such as a line's end".to_owned()
        }
        AuthError::ReadTokenFile(error, path) => token_file(&path.display().to_string(), error),
        AuthError::MissingCommand => "its exec plugin has no command".to_owned(),
        _ => "its auth-provider gives no credential; Kubernetes has replaced those by exec plugins".to_owned(),
    }
}

pub(super) fn token_file(path: &str, error: &std::io::Error) -> String {
    format!("its token file {path} cannot be read: {error}")
}

pub(super) fn unknown_proxy(url: &http::Uri) -> String {
    format!("proxy-url {} is neither http, https nor socks5", address(url))
}

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
    fn yaml_errors_say_where_and_quote_nothing() {
        for wrong in ["user:\n  token: hunter2\n\ta: b\n", "token: hunter2\ntoken: hunter2\n", "{hunter2: [hunter2"] {
            let error = serde_saphyr::from_str::<serde_json::Value>(wrong).expect_err("it is wrong");
            let words = yaml(&error);
            assert!(words.starts_with("line ") && !words.contains("hunter2") && !words.contains('\n'), "{words}");
        }
    }

    #[test]
    fn a_url_is_told_without_its_user() {
        assert_eq!(address(&"ftp://user:hunter2@proxy:21/hunter2".parse().expect("a URL")), "ftp://proxy:21");
        assert_eq!(address(&"server".parse().expect("a URL")), "server");
    }
}
