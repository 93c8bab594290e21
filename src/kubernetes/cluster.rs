//! Where the API server is and as whom it is asked: what a kubeconfig says, and the clients made from it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::rt::{Read, Write};
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::{Connection, HttpConnector, proxy};
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::config::{AuthInfo, Config, ExecAuthCluster};
use pintle_agent_core::pem_block::PemBlocks;
use pintle_agent_core::text::printable;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::authorities::{Authorities, no_verification};
use super::kubeconfig::{ClientPair, KubeconfigFile, UserEntry};
use super::proxy::Proxy;
use super::{Api, credential_error};

/// An API server and, where a kubeconfig carries one, the credential for it.
#[derive(Clone)]
pub struct Cluster {
    url: http::Uri,
    tls_server_name: Option<String>,
    trust: Trust,
    proxy: Option<Proxy>,
    user: UserEntry,
    /// What kube does for the user.
    exec_and_impersonation: AuthInfo,
    source: PathBuf,
}

/// How the API server is verified.
#[derive(Clone, PartialEq, Eq)]
enum Trust {
    /// By the authorities of the operating system.
    System,
    Authorities(Authorities),
    /// Not at all.
    Nothing,
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
    /// If there is no such file, or it cannot be used.
    pub fn read(path: &Path) -> Result<Self, ClusterError> {
        let failed = |detail: String| ClusterError { path: path.to_owned(), detail, missing: false };
        let unreadable = |error: io::Error| ClusterError {
            missing: error.kind() == io::ErrorKind::NotFound,
            ..failed(match error.kind() {
                io::ErrorKind::InvalidData => error.to_string(),
                _ => format!("it cannot be read: {error}"),
            })
        };
        let file = KubeconfigFile::read(path).map_err(unreadable)?;
        let cluster = file.cluster_entry().map_err(unreadable)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        let (url, user_info) = cluster.server().map_err(failed)?;
        let authority = cluster.certificate_authority(directory).map_err(failed)?;
        let trust = match (&authority, cluster.is_insecure()) {
            (Some(_), true) => {
                return Err(failed(
                    "its cluster has both a certificate-authority and insecure-skip-tls-verify, which kubectl refuses too"
                        .to_owned(),
                ));
            }
            (None, true) => Trust::Nothing,
            (None, false) => Trust::System,
            (Some(pem), false) => Trust::Authorities(
                Authorities::parse(pem).map_err(|words| failed(format!("its certificate-authority: {words}")))?,
            ),
        };
        let proxy = match cluster.proxy_url() {
            Some(proxy_url) => Some(Proxy::of_kubeconfig(proxy_url).map_err(failed)?),
            None => Proxy::of_environment(&url),
        };
        let mut user = file.user_entry().map_err(unreadable)?;
        if user.username.is_none()
            && let Some(user_info) = user_info
        {
            // As Go's net/http does with the user in a URL.
            let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
            let (name, password) = user_info.split_once(':').unwrap_or((&user_info, ""));
            (user.username, user.password) = (Some(decoded(name)), Some(decoded(password)));
        }
        let mut auth = file.exec_and_impersonation().map_err(unreadable)?;
        if let Some(exec) = &mut auth.exec {
            // A relative path counts from the kubeconfig, a bare name is looked for in PATH.
            if let Some(command) = exec.command.as_mut().filter(|command| command.contains('/')) {
                *command = directory.join(&*command).display().to_string();
            }
            if exec.provide_cluster_info {
                exec.cluster = Some(ExecAuthCluster {
                    server: Some(url.to_string()),
                    insecure_skip_tls_verify: Some(cluster.is_insecure()),
                    certificate_authority_data: authority,
                    proxy_url: cluster.proxy_url().map(str::to_owned),
                    tls_server_name: cluster.tls_server_name().map(str::to_owned),
                    config: file.exec_extension(),
                });
            }
        }
        Ok(Self {
            url,
            tls_server_name: cluster.tls_server_name().map(str::to_owned),
            trust,
            proxy,
            user,
            exec_and_impersonation: auth,
            source: path.to_owned(),
        })
    }

    /// The kubeconfig that this was read from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The API server's URL.
    pub fn server(&self) -> String {
        self.url.to_string()
    }

    /// The API server's URL. It holds no user and no password.
    pub fn url(&self) -> &http::Uri {
        &self.url
    }

    /// The name in the API server's certificate, where it is not that of its URL.
    pub fn tls_server_name(&self) -> Option<&str> {
        self.tls_server_name.as_deref()
    }

    /// The file that holds the credential's token, if it is in one.
    pub fn token_file(&self) -> Option<PathBuf> {
        self.user.token_file(self.directory())
    }

    /// The proxy on the way to an API server of this cluster: the kubeconfig's, or else what the environment names for
    /// this server.
    pub fn proxy_for(&self, server: &http::Uri) -> Option<Proxy> {
        match &self.proxy {
            Some(proxy) if proxy.is_of_kubeconfig() => Some(proxy.clone()),
            _ => Proxy::of_environment(server),
        }
    }

    /// How this cluster's API servers are verified, with no credential.
    ///
    /// # Errors
    /// If the system's authorities are meant and there are none.
    pub fn client_config(&self) -> Result<rustls::ClientConfig, ClusterError> {
        self.tls(AuthInfo::default())
    }

    /// The API server alone.
    pub fn without_credential(&self) -> Self {
        let (user, exec_and_impersonation) = (UserEntry::default(), AuthInfo::default());
        Self { user, exec_and_impersonation, ..self.clone() }
    }

    /// Whether this is the same API server, reached and verified in the same way, whatever the credential.
    pub fn is_same_as(&self, other: &Self) -> bool {
        self.url == other.url
            && self.proxy == other.proxy
            && self.tls_server_name == other.tls_server_name
            && self.trust == other.trust
    }

    /// A client with the credential that the kubeconfig carries. This blocks for as long as an exec plugin likes, and
    /// nothing can end that, so it is called on a thread of its own.
    ///
    /// # Errors
    /// If that credential cannot be read or obtained.
    pub fn connect(&self) -> Result<Api, ClusterError> {
        let directory = self.directory();
        let mut auth = self.exec_and_impersonation.clone();
        if let Some((name, password)) = self.user.basic() {
            auth.username = Some(name.to_owned());
            auth.password = Some(password.to_owned().into());
        }
        if let Some(token) = self.user.bearer_token(directory).map_err(|words| self.failed(words))? {
            // kube would panic.
            http::HeaderValue::from_str(&token)
                .map_err(|_| self.failed(credential_error::UNUSABLE_TOKEN.to_owned()))?;
            auth.token = Some(token.as_str().into());
        }
        let mut tls = self.tls(auth.clone())?;
        if let Some(pair) = self.user.client_certificate(directory).map_err(|words| self.failed(words))? {
            let key = certified_key(&pair).map_err(|words| self.failed(words))?;
            tls.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(key));
        }
        self.api(tls, auth)
    }

    /// A client whose credential is a certificate, and nothing that the kubeconfig carries.
    ///
    /// It has connections of its own and resumes no TLS session, so it never speaks as anybody else, not even as an
    /// earlier certificate of the same node.
    ///
    /// # Errors
    /// If the kubeconfig's authority or proxy cannot be used.
    pub fn connect_with(&self, certificate: Arc<dyn ResolvesClientCert>) -> Result<Api, ClusterError> {
        let mut tls = self.client_config()?;
        tls.client_auth_cert_resolver = certificate;
        tls.resumption = Resumption::disabled();
        self.api(tls, AuthInfo::default())
    }

    /// TLS as this credential, as far as kube knows about it: an exec plugin may print a certificate.
    fn tls(&self, auth: AuthInfo) -> Result<rustls::ClientConfig, ClusterError> {
        let mut config = self.kube_config(auth);
        // None means the system's authorities, and what is set here is replaced below.
        config.root_cert = (self.trust != Trust::System).then(Vec::new);
        let mut tls = config.rustls_client_config().map_err(|error| self.no_client(&error))?;
        match &self.trust {
            Trust::System => {}
            Trust::Authorities(authorities) => {
                tls.dangerous().set_certificate_verifier(authorities.verifier());
            }
            Trust::Nothing => tls.dangerous().set_certificate_verifier(no_verification()),
        }
        Ok(tls)
    }

    fn kube_config(&self, auth: AuthInfo) -> Config {
        let mut config = Config::new(self.url.clone());
        config.auth_info = auth;
        config
    }

    fn api(&self, tls: rustls::ClientConfig, auth: AuthInfo) -> Result<Api, ClusterError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        // Else what follows the end of a TLS handshake waits for the server's delayed acknowledgement, some 40 ms.
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let Some(proxy) = &self.proxy else { return Ok(Api::new(self.client_over(tls, auth, tcp)?, None)) };
        let client = match proxy.url.scheme_str() {
            Some("http") => self.client_over(tls, auth, tunnel(proxy, tcp)),
            Some("https") => {
                // As client-go, the proxy is verified by the same authorities as the server, under its own name.
                let to_proxy = HttpsConnectorBuilder::new().with_tls_config(self.client_config()?).https_only();
                self.client_over(tls, auth, tunnel(proxy, to_proxy.enable_http1().wrap_connector(tcp)))
            }
            Some("socks5" | "socks5h") => self.client_over(tls, auth, socks(proxy, tcp)),
            _ => return Err(self.failed(format!("{proxy} is neither http, https nor socks5"))),
        };
        Ok(Api::new(client?, Some(proxy.to_string())))
    }

    /// A client that speaks this TLS over this connector.
    fn client_over<C>(
        &self,
        tls: rustls::ClientConfig,
        auth: AuthInfo,
        connector: C,
    ) -> Result<kube::Client, ClusterError>
    where
        C: tower::Service<http::Uri> + Clone + Send + Sync + 'static,
        C::Response: Connection + Read + Write + Send + Unpin + 'static,
        C::Future: Send + 'static,
        C::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut https = HttpsConnectorBuilder::new().with_tls_config(tls).https_only();
        if let Some(name) = &self.tls_server_name {
            let name = ServerName::try_from(name.clone())
                .map_err(|_| self.failed("its tls-server-name is neither a DNS name nor an IP address".to_owned()))?;
            https = https.with_server_name_resolver(FixedServerNameResolver::new(name));
        }
        let client =
            HyperClient::builder(TokioExecutor::new()).build::<_, Body>(https.enable_http1().wrap_connector(connector));
        let config = self.kube_config(auth);
        let service = tower::ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer().map_err(|error| self.no_client(&error))?)
            .layer(config.extra_headers_layer().map_err(|error| self.no_client(&error))?)
            .map_err(|error| -> Box<dyn std::error::Error + Send + Sync> { Box::from(error) })
            .service(client);
        Ok(kube::Client::new(service, "default"))
    }

    fn directory(&self) -> &Path {
        self.source.parent().unwrap_or(Path::new(""))
    }

    fn no_client(&self, error: &kube::Error) -> ClusterError {
        let exec_plugin = self.exec_and_impersonation.exec.as_ref().and_then(|exec| exec.command.as_deref());
        self.failed(credential_error::client(error, exec_plugin))
    }

    fn failed(&self, detail: String) -> ClusterError {
        ClusterError { path: self.source.clone(), detail, missing: false }
    }
}

/// The certificate of a user and its key, for rustls. The certificate may be X.509 v1, which webpki refuses to parse.
fn certified_key(pair: &ClientPair) -> Result<CertifiedKey, String> {
    let chain = PemBlocks::of(&*pair.chain).certificates();
    let chain = chain.map_err(|error| format!("its client-certificate: {error}"))?;
    let blocks = PemBlocks::of(&*pair.key);
    let der = &blocks.private_key().ok_or_else(|| match blocks.damaged {
        Some(line) => format!("its client-key: the PEM block that begins in line {line} is damaged"),
        None => "its client-key: no PRIVATE KEY block".to_owned(),
    })?;
    let key = PrivateKeyDer::try_from(der.content.as_slice())
        .ok()
        .and_then(|key| aws_lc_rs::sign::any_supported_type(&key).ok())
        .ok_or("its client-key is not a private key that can be used")?;
    let (_, leaf) = X509Certificate::from_der(&chain[0])
        .map_err(|_| "its client-certificate is not an X.509 certificate".to_owned())?;
    if key.public_key().is_some_and(|public_key| public_key.as_ref() != leaf.public_key().raw) {
        return Err("its client-key is not the key that its client-certificate is for".to_owned());
    }
    Ok(CertifiedKey::new(chain.into_iter().map(CertificateDer::from).collect(), key))
}

/// An HTTP CONNECT tunnel through this proxy, with the user and password that its URL may carry.
fn tunnel<C>(to: &Proxy, connector: C) -> proxy::Tunnel<C> {
    let tunnel = proxy::Tunnel::new(to.url.clone(), connector);
    match to.authorization() {
        Some(header) => tunnel.with_auth(header),
        None => tunnel,
    }
}

/// A SOCKS proxy, which resolves the server's name itself, as Go has it for socks5 and socks5h alike.
fn socks<C>(to: &Proxy, connector: C) -> proxy::SocksV5<C> {
    let socks = proxy::SocksV5::new(to.url.clone(), connector);
    let Some(user_info) = to.user_info().and_then(|bytes| String::from_utf8(bytes).ok()) else { return socks };
    let (user, password) = user_info.split_once(':').unwrap_or((&user_info, ""));
    socks.with_auth(user.to_owned(), password.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_or_a_directory_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let pipe = directory.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).expect("made");
        for path in [&pipe, directory.path()] {
            let error = Cluster::read(path).err().expect("it is refused");
            assert!(error.to_string().contains("regular file"), "{error}");
        }
    }
}
