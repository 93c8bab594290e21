//! The test bed: an API server that identifies its clients, a CA for them, and a proxy in between.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use futures::{StreamExt as _, TryStreamExt as _};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use pintle::config::ProxyConfiguration;
use pintle::consumers::kubeconfig::Kubeconfig;
use pintle::kubernetes;
use pintle::proxy::{ActivatedSockets, Endpoints, Epoch, Proxy, ProxyHandle, Upstream};
use pintle::telemetry::{Log, Statistics, Telemetry};
use pintle::world::clock::now;
use pintle::world::{SystemFiles, User};
use pintle_agent_core::Template;
use pintle_plugins_api::PublicKey;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SubjectPublicKeyInfo,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::client::{self, Client, Pair, get_over};

pub(crate) type Answer = Response<BoxBody<Bytes, Infallible>>;

pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A CA for servers and clients.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, "test authority");
        Self(CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap())
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        roots
    }

    fn issue(&self, name: &str, server: bool) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let mut parameters = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.extended_key_usages =
            vec![if server { ExtendedKeyUsagePurpose::ServerAuth } else { ExtendedKeyUsagePurpose::ClientAuth }];
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.0).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    /// The API server's TLS configuration.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()), provider())
            .allow_unauthenticated()
            .build()
            .unwrap();
        let (certificate, key) = self.issue("server", true);
        let mut tls = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], key)
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(tls))
    }

    pub(crate) fn certified_key(&self, name: &str) -> Arc<CertifiedKey> {
        let (certificate, key) = self.issue(name, false);
        Arc::new(CertifiedKey::from_der(vec![certificate], key, &provider()).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// Issues a certificate (PEM) for a key in a backend.
    pub(crate) fn certify(&self, template: &Template, key: &PublicKey) -> String {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, &template.common_name);
        for organization in &template.organizations {
            parameters.distinguished_name.push(DnType::OrganizationName, organization);
        }
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = SubjectPublicKeyInfo::from_der(key.as_der()).unwrap();
        parameters.signed_by(&key, &self.0).unwrap().pem()
    }

    pub(crate) fn upstream(&self, servers: &[SocketAddr]) -> Arc<Upstream> {
        self.upstream_through(servers, None)
    }

    pub(crate) fn upstream_through(&self, servers: &[SocketAddr], proxy_url: Option<&str>) -> Arc<Upstream> {
        let tls = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots())
            .with_no_client_auth();
        let servers: Vec<http::Uri> = servers.iter().map(|it| format!("https://{it}").parse().unwrap()).collect();
        let proxy_for = |_: &http::Uri| proxy_url.map(|url| kubernetes::Proxy::new(&url.parse().unwrap(), "proxy-url"));
        let endpoints = Endpoints { servers: &servers, tls_server_name: Some("localhost"), proxy_for: &proxy_for };
        Arc::new(Upstream::new(&endpoints, tls).unwrap())
    }

    /// An epoch whose certificate expires in an hour. `name` is the common name that the server sees.
    pub(crate) fn epoch(&self, name: &str, upstream: &Arc<Upstream>) -> Epoch {
        Epoch {
            serial: name.to_owned(),
            not_after: now() + Duration::from_secs(3600),
            certificate: self.certified_key(name),
            upstream: Arc::clone(upstream),
        }
    }
}

/// Requests per client name, and the number of connections.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) requests: Mutex<BTreeMap<String, u64>>,
    pub(crate) connections: AtomicU64,
    pub(crate) anonymous: AtomicU64,
}

/// An API server. Dropping it closes its port and connections.
pub(crate) struct ApiServer {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Seen>,
    task: JoinHandle<()>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ApiServer {
    pub(crate) async fn start(authority: &Authority) -> Self {
        Self::start_on(TcpListener::bind("127.0.0.1:0").await.unwrap(), authority)
    }

    /// Starts a server on the address of an earlier one.
    pub(crate) async fn start_again(authority: &Authority, address: SocketAddr) -> Self {
        Self::start_on(TcpListener::bind(address).await.unwrap(), authority)
    }

    fn start_on(listener: TcpListener, authority: &Authority) -> Self {
        let (acceptor, address, seen) = (authority.acceptor(), listener.local_addr().unwrap(), Arc::<Seen>::default());
        let shared = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                stream.set_nodelay(true).unwrap();
                connections.spawn(serve(acceptor.clone(), stream, Arc::clone(&shared)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { address, seen, task }
    }

    pub(crate) fn requests(&self) -> u64 {
        self.seen.requests.lock().unwrap().values().sum()
    }

    pub(crate) fn requests_of(&self, name: &str) -> u64 {
        self.seen.requests.lock().unwrap().get(name).copied().unwrap_or_default()
    }
}

async fn serve(acceptor: TlsAcceptor, stream: TcpStream, seen: Arc<Seen>) {
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let Some(leaf) = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()) else {
        seen.anonymous.fetch_add(1, Ordering::Relaxed);
        return;
    };
    seen.connections.fetch_add(1, Ordering::Relaxed);
    let (_, leaf) = X509Certificate::from_der(leaf).unwrap();
    let name = leaf.subject().iter_common_name().next().unwrap().as_str().unwrap().to_owned();
    let service = service_fn(move |request| {
        *seen.requests.lock().unwrap().entry(name.clone()).or_default() += 1;
        let name = name.clone();
        async move { Ok::<_, Infallible>(answer(request, name).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
}

fn full(bytes: impl Into<Bytes>) -> Answer {
    Response::new(Full::new(bytes.into()).boxed())
}

async fn answer(mut request: Request<Incoming>, name: String) -> Answer {
    let path = request.uri().path().to_owned();
    let argument: u64 = path.rsplit('/').next().and_then(|last| last.parse().ok()).unwrap_or_default();
    match path.split('/').nth(1) {
        Some("upgrade") => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut stream = TokioIo::new(upgrade.await.unwrap());
                let mut buffer = vec![0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    stream.write_all(&buffer[..count]).await.unwrap();
                    stream.flush().await.unwrap();
                }
            });
            let mut response = full("");
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert("connection", "upgrade".parse().unwrap());
            response.headers_mut().insert("upgrade", "echo".parse().unwrap());
            response
        }
        Some("upload") => {
            let (mut checksum, mut body) = (Context::new(&SHA256), request.into_body());
            while let Some(Ok(frame)) = body.frame().await {
                checksum.update(frame.data_ref().unwrap());
            }
            full(hexadecimal(checksum.finish().as_ref()))
        }
        Some("download") => Response::new(BodyExt::boxed(StreamBody::new(body_of(argument).map_ok(Frame::data)))),
        Some("watch") => {
            let events = futures::stream::unfold(0u64, move |number| async move {
                tokio::time::sleep(Duration::from_millis(argument)).await;
                Some((Ok::<_, Infallible>(Frame::data(Bytes::from(format!("{number}\n")))), number + 1))
            });
            Response::new(BodyExt::boxed(StreamBody::new(events)))
        }
        Some("slow") => {
            // Read the request completely first: hyper closes a connection if it responds before that.
            let _ = request.into_body().collect().await;
            tokio::time::sleep(Duration::from_millis(argument)).await;
            full(name)
        }
        _ => {
            let _ = request.into_body().collect().await;
            full(name)
        }
    }
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A body of this many bytes, in pieces of varying size.
pub(crate) fn body_of(length: u64) -> impl futures::Stream<Item = Result<Bytes, Infallible>> + Send + Sync {
    const PIECE: u64 = 60_007;
    let pattern = Bytes::from((0..PIECE).map(|place| (place * 31 % 251) as u8).collect::<Vec<_>>());
    futures::stream::iter((0..length).step_by(PIECE as usize))
        .map(move |start| Ok(pattern.slice(..PIECE.min(length - start) as usize)))
}

pub(crate) async fn checksum_of(mut body: impl futures::Stream<Item = Bytes> + Unpin) -> String {
    let mut checksum = Context::new(&SHA256);
    while let Some(bytes) = body.next().await {
        checksum.update(&bytes);
    }
    hexadecimal(checksum.finish().as_ref())
}

/// A running proxy and its client's files.
pub(crate) struct Bed {
    pub(crate) proxy: ProxyHandle,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) telemetry: Arc<Telemetry>,
}

impl Bed {
    pub(crate) fn configuration(directory: &tempfile::TempDir) -> ProxyConfiguration {
        ProxyConfiguration {
            listen: ([127, 0, 0, 1], 0).into(),
            user: User { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() },
            runtime_directory: directory.path().join("client"),
            ..ProxyConfiguration::default()
        }
    }

    pub(crate) async fn start(
        initial: Option<Epoch>,
        change: impl FnOnce(&mut ProxyConfiguration, &tempfile::TempDir),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut configuration = Self::configuration(&directory);
        change(&mut configuration, &directory);
        let telemetry = Arc::new(Telemetry::new(Log::silent()));
        let started = Proxy::start(configuration, ActivatedSockets::default(), initial, Arc::clone(&telemetry)).await;
        Self { proxy: started.unwrap(), directory, telemetry }
    }

    /// The kubeconfig that pintle writes for the local client.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        let (mut kubeconfig, path) = (Kubeconfig::new(), self.directory.path().join("kubeconfig"));
        kubeconfig.use_proxy(self.proxy.local_server(), None).unwrap();
        kubeconfig.write(&SystemFiles, &path, None).unwrap();
        path
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join("client").join(name)
    }

    /// The accepted client's TLS configuration, offering these protocols.
    pub(crate) fn client_config(&self, protocols: &[&str]) -> ClientConfig {
        client::config(self.proxy.client_files(), protocols)
    }

    pub(crate) fn client_config_with(&self, protocols: &[&str], pair: Option<Pair>) -> ClientConfig {
        client::config_with(self.proxy.client_files(), protocols, pair)
    }

    /// Opens a new connection.
    pub(crate) async fn connect(&self, protocol: &str) -> std::io::Result<Client> {
        self.connect_with(self.client_config(&[protocol])).await
    }

    pub(crate) async fn connect_with(&self, config: ClientConfig) -> std::io::Result<Client> {
        client::secure(TcpStream::connect(self.proxy.address()).await?, config).await
    }

    /// Sends a GET over a new connection and returns the body.
    pub(crate) async fn get(&self, path: &str) -> std::io::Result<String> {
        let mut stream = self.connect("http/1.1").await?;
        get_over(&mut stream, path).await
    }

    pub(crate) fn statistics(&self) -> Statistics {
        self.proxy.statistics()
    }

    pub(crate) fn failures(&self, reason: &str) -> u64 {
        self.statistics().failures.get(reason).copied().unwrap_or_default()
    }

    pub(crate) fn open(&self) -> u64 {
        self.statistics().open_connections.values().sum()
    }
}

/// Waits until the condition holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 20 s: {what}");
}
