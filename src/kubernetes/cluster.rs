//! Where the API server is and as whom it is asked: kubeconfig files, and the clients made from them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::rt::{Read, Write};
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::{Connection, HttpConnector, proxy};
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::config::{AuthInfo, Config, KubeConfigOptions, Kubeconfig};
use pintle_agent_core::text::printable;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::pki_types::ServerName;
use tokio::sync::oneshot;

use super::{Api, without_secrets};

/// An API server and, where a kubeconfig carries one, the credential for it.
pub struct Cluster {
    config: Config,
    source: PathBuf,
}

/// Why there is no client for a cluster.
#[derive(Debug)]
pub struct ClusterError {
    /// The kubeconfig file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub detail: String,
    /// Whether that is only that the file is not there.
    pub missing: bool,
}

impl fmt::Display for ClusterError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.missing {
            write!(formatter, "the kubeconfig {} does not exist", self.path.display())
        } else {
            write!(formatter, "the kubeconfig {} cannot be used: {}", self.path.display(), printable(&self.detail))
        }
    }
}

impl std::error::Error for ClusterError {}

/// An API server must accept a connection within this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

impl Cluster {
    /// Reads a kubeconfig file: every credential that kubectl takes there is taken here.
    ///
    /// # Errors
    /// If there is no such file, or it makes no sense.
    pub async fn read(path: &Path) -> Result<Self, ClusterError> {
        let failed = |detail: String| ClusterError { path: path.to_owned(), detail, missing: !path.exists() };
        // Reading a pipe would wait for who writes to it, and what was read from one is not there the next time.
        if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(failed(
                "it must be a regular file, since it is read again and again; a pipe, as <(…) is, cannot be".to_owned(),
            ));
        }
        let kubeconfig = Kubeconfig::read_from(path).map_err(|error| failed(without_secrets::kubeconfig(&error)))?;
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .map_err(|error| failed(without_secrets::kubeconfig(&error)))?;
        if config.cluster_url.scheme().is_none() {
            return Err(failed(format!(
                "its server {} should begin with https://",
                without_secrets::address(&config.cluster_url)
            )));
        }
        // When to try again is the rotation's own decision.
        config.default_retry = false;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        Ok(Self { config, source: path.to_owned() })
    }

    /// The kubeconfig that this was read from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The API server's URL.
    pub fn server(&self) -> String {
        self.config.cluster_url.to_string()
    }

    /// The API server's URL.
    pub fn url(&self) -> &http::Uri {
        &self.config.cluster_url
    }

    /// The name in the API server's certificate, where it is not that of its URL.
    pub fn tls_server_name(&self) -> Option<&str> {
        self.config.tls_server_name.as_deref()
    }

    /// The file that holds the credential's token, if it is in one.
    pub fn token_file(&self) -> Option<&Path> {
        self.config.auth_info.token_file.as_deref().map(Path::new)
    }

    /// The proxy on the way to the API server.
    pub fn proxy_url(&self) -> Option<&http::Uri> {
        self.config.proxy_url.as_ref()
    }

    /// How this cluster's API servers are verified, with no credential.
    ///
    /// # Errors
    /// If the kubeconfig's authority cannot be used.
    pub fn client_config(&self) -> Result<rustls::ClientConfig, ClusterError> {
        self.without_credential().config.rustls_client_config().map_err(|error| self.no_client(&error))
    }

    /// The API server alone.
    pub fn without_credential(&self) -> Self {
        let mut config = self.config.clone();
        config.auth_info = AuthInfo::default();
        Self { config, source: self.source.clone() }
    }

    /// Whether this is the same API server, reached and verified in the same way, whatever the credential.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let (one, other) = (&self.config, &other.config);
        one.cluster_url == other.cluster_url
            && one.proxy_url == other.proxy_url
            && one.tls_server_name == other.tls_server_name
            && one.root_cert == other.root_cert
            && one.accept_invalid_certs == other.accept_invalid_certs
    }

    /// A client with the credential that the kubeconfig carries. Having it may take as long as an exec plugin likes, and
    /// nothing can end that, so it is done on a thread of its own, and the answer comes when it comes.
    ///
    /// # Errors
    /// The answer is an error if that credential cannot be read or obtained.
    pub fn connect(self) -> oneshot::Receiver<Result<Api, ClusterError>> {
        let (sender, receiver) = oneshot::channel();
        let runtime = tokio::runtime::Handle::current();
        std::thread::spawn(move || {
            let _entered = runtime.enter();
            // Nobody may be waiting any more.
            let _ = sender.send(self.connect_now());
        });
        receiver
    }

    fn connect_now(&self) -> Result<Api, ClusterError> {
        let mut config = self.config.clone();
        // client-go trims what it reads from a token file; kube would send the line's end along.
        if let (None, Some(path)) = (&config.auth_info.token, config.auth_info.token_file.take()) {
            let token = std::fs::read_to_string(&path).map(zeroize::Zeroizing::new);
            let token = token.map_err(|error| self.failed(without_secrets::token_file(&path, &error)))?;
            config.auth_info.token = Some(token.trim().to_owned().into());
        }
        let client = kube::Client::try_from(config).map_err(|error| self.no_client(&error))?;
        Ok(Api::new(client))
    }

    /// A client whose credential is a certificate, and nothing that the kubeconfig carries.
    ///
    /// It has connections of its own and resumes no TLS session, so it never speaks as anybody else, not even as an
    /// earlier certificate of the same node.
    ///
    /// # Errors
    /// If the kubeconfig's authority or proxy cannot be used.
    pub fn connect_with(&self, certificate: Arc<dyn ResolvesClientCert>) -> Result<Api, ClusterError> {
        let mut config = self.config.clone();
        config.auth_info = AuthInfo::default();
        let mut tls = config.rustls_client_config().map_err(|error| self.no_client(&error))?;
        tls.client_auth_cert_resolver = certificate;
        tls.resumption = Resumption::disabled();

        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let client = match &config.proxy_url {
            None => client_over(&config, tls, tcp),
            Some(url) if url.scheme_str() == Some("http") => client_over(&config, tls, tunnel(url, tcp)),
            Some(url) if url.scheme_str() == Some("https") => {
                // As client-go, the proxy is verified by the same authorities as the server, under its own name.
                let mut proxy = config.clone();
                proxy.tls_server_name = None;
                let to_proxy =
                    proxy.rustls_https_connector_with_connector(tcp).map_err(|error| self.no_client(&error))?;
                client_over(&config, tls, tunnel(url, to_proxy))
            }
            Some(url) if url.scheme_str() == Some("socks5") => {
                client_over(&config, tls, proxy::SocksV5::new(url.clone(), tcp))
            }
            Some(url) => return Err(self.failed(without_secrets::unknown_proxy(url))),
        };
        client.map(Api::new).map_err(|detail| self.failed(detail))
    }

    fn no_client(&self, error: &kube::Error) -> ClusterError {
        let exec_plugin = self.config.auth_info.exec.as_ref().and_then(|exec| exec.command.as_deref());
        self.failed(without_secrets::client(error, exec_plugin))
    }

    fn failed(&self, detail: String) -> ClusterError {
        ClusterError { path: self.source.clone(), detail, missing: false }
    }
}

/// An HTTP CONNECT tunnel through this proxy, with the user and password that its URL may carry.
fn tunnel<C>(url: &http::Uri, connector: C) -> proxy::Tunnel<C> {
    use base64::Engine;
    let tunnel = proxy::Tunnel::new(url.clone(), connector);
    let user = url.authority().and_then(|authority| authority.as_str().split_once('@')).map(|(user, _)| user);
    let header = user.and_then(|user| {
        let decoded: Vec<u8> = percent_encoding::percent_decode_str(user).collect();
        let mut value = http::HeaderValue::from_str(&format!(
            "Basic {}",
            base64::engine::general_purpose::STANDARD.encode(decoded)
        ))
        .ok()?;
        value.set_sensitive(true);
        Some(value)
    });
    match header {
        Some(header) => tunnel.with_auth(header),
        None => tunnel,
    }
}

/// A client that speaks this TLS over this connector.
fn client_over<C>(config: &Config, tls: rustls::ClientConfig, connector: C) -> Result<kube::Client, String>
where
    C: tower::Service<http::Uri> + Clone + Send + Sync + 'static,
    C::Response: Connection + Read + Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut https = HttpsConnectorBuilder::new().with_tls_config(tls).https_only();
    if let Some(name) = &config.tls_server_name {
        let name = ServerName::try_from(name.clone()).map_err(|error| format!("tls-server-name {name:?}: {error}"))?;
        https = https.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    let https = https.enable_http1().wrap_connector(connector);
    let client = HyperClient::builder(TokioExecutor::new()).build::<_, Body>(https);
    let service = tower::ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .map_err(|error| -> Box<dyn std::error::Error + Send + Sync> { Box::new(error) })
        .service(client);
    Ok(kube::Client::new(service, config.default_namespace.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pipe_or_a_directory_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let pipe = directory.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).expect("made");
        for path in [&pipe, directory.path()] {
            let error = Cluster::read(path).await.err().expect("it is refused");
            assert!(error.to_string().contains("regular file"), "{error}");
        }
    }
}
