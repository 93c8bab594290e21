//! The API servers: their addresses, their health, and the HTTP proxy in front of them.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::address::{Address, Preference, race};
use crate::kubernetes::{Cluster, ClusterError, Proxy};

/// How long an API server that failed is tried only after the others: initial and maximum.
const FAILURE_BACK_OFF: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));
/// Limit on an HTTP proxy's response to CONNECT, in bytes.
const MAXIMUM_RESPONSE: usize = 8 << 10;

/// An HTTP proxy that supports CONNECT (RFC 9110, section 9.3.6).
struct Tunnel {
    address: Address,
    proxy: Proxy,
}

impl Tunnel {
    fn through(proxy: Proxy) -> Result<Self, String> {
        match (proxy.url.scheme_str(), Address::of(&proxy.url, 80)) {
            (Some("http"), Some(address)) => Ok(Self { address, proxy }),
            _ => Err(format!("{proxy} cannot be used: the credential proxy supports only http:// proxies")),
        }
    }
}

struct Server {
    address: Address,
    name: ServerName<'static>,
    tunnel: Option<Tunnel>,
    /// Among the addresses of the server's name, or of the HTTP proxy's.
    preference: Preference,
    health: Mutex<Option<Failed>>,
}

struct Failed {
    until: Instant,
    times: u32,
}

/// The API servers of a cluster, and how to verify them.
pub struct Upstream {
    servers: Vec<Server>,
    tls: rustls::ClientConfig,
    /// The source of these endpoints, for detecting changes.
    cluster: Option<Cluster>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<_> = self.servers.iter().map(|server| server.address.authority()).collect();
        formatter.debug_struct("Upstream").field("servers", &servers).finish_non_exhaustive()
    }
}

/// The configuration of an [`Upstream`].
pub struct Endpoints<'a> {
    /// `https://HOST[:PORT]`, in order of preference.
    pub servers: &'a [http::Uri],
    /// The name to verify in the servers' certificates, if it differs from the URL's host.
    pub tls_server_name: Option<&'a str>,
    /// The HTTP proxy to use for a server's URL, if any.
    pub proxy_for: &'a dyn Fn(&http::Uri) -> Option<Proxy>,
}

impl Upstream {
    /// The API server of a kubeconfig, then `others`. If `others` contains the kubeconfig's server, their order takes
    /// precedence.
    ///
    /// # Errors
    /// If the kubeconfig's CA is invalid, a URL has no host, or the proxy is not an HTTP proxy.
    pub fn of(cluster: &Cluster, others: &[http::Uri]) -> Result<Self, ClusterError> {
        let tls = cluster.client_config()?;
        let own = cluster.url();
        let mut servers = others.to_vec();
        if !servers.iter().any(|server| Address::of(server, 443) == Address::of(own, 443)) {
            servers.insert(0, own.clone());
        }
        let proxy_for = |server: &http::Uri| cluster.proxy_for(server);
        let endpoints =
            Endpoints { servers: &servers, tls_server_name: cluster.tls_server_name(), proxy_for: &proxy_for };
        let upstream = Self::new(&endpoints, tls).map_err(|detail| ClusterError {
            path: cluster.source().to_owned(),
            detail,
            missing: false,
        })?;
        Ok(Self { cluster: Some(cluster.without_credential()), ..upstream })
    }

    /// Whether this was created from the same cluster configuration.
    pub fn is_of(&self, cluster: &Cluster) -> bool {
        self.cluster.as_ref().is_some_and(|known| known.is_same_as(cluster))
    }

    /// Creates an upstream of these API servers, verified as in `tls`. Its client certificate and ALPN settings are
    /// ignored.
    ///
    /// # Errors
    /// A message that says which URL is invalid.
    pub fn new(endpoints: &Endpoints<'_>, tls: rustls::ClientConfig) -> Result<Self, String> {
        let servers = endpoints.servers.iter().map(|url| {
            let address = Address::of(url, 443).ok_or_else(|| format!("the API server's URL {url} has no host"))?;
            let name = endpoints.tls_server_name.unwrap_or(address.host()).to_owned();
            let name = ServerName::try_from(name).map_err(|error| format!("the API server {url}: {error}"))?;
            let tunnel = (endpoints.proxy_for)(url).map(Tunnel::through).transpose()?;
            Ok(Server { address, name, tunnel, preference: Preference::default(), health: Mutex::default() })
        });
        Ok(Self { servers: servers.collect::<Result<_, String>>()?, tls, cluster: None })
    }

    pub(super) fn tls(&self) -> &rustls::ClientConfig {
        &self.tls
    }

    pub(super) fn name(&self, server: usize) -> &ServerName<'static> {
        &self.servers[server].name
    }

    pub(super) fn authority(&self, server: usize) -> String {
        self.servers[server].address.authority()
    }

    /// Connects to the first API server that answers, trying them in order of preference and health; returns its
    /// index. Skips those in `tried`.
    pub(super) async fn connect(&self, tried: &[usize], timeout: Duration) -> Result<(TcpStream, usize), String> {
        let attempt = |server: usize| async move {
            let attempt = tokio::time::timeout(timeout, self.attempt(server)).await;
            let late = format!("no connection within {} s", timeout.as_secs());
            let result = attempt.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, late)));
            result.map(|stream| (stream, server)).map_err(|error| {
                self.failed(server);
                format!("{}: {error}", self.authority(server))
            })
        };
        race(self.order(tried), attempt).await.map_err(|failures| failures.join("; "))
    }

    async fn attempt(&self, server: usize) -> io::Result<TcpStream> {
        let Server { address: target, preference, tunnel, .. } = &self.servers[server];
        let address = tunnel.as_ref().map_or(target, |tunnel| &tunnel.address);
        let mut stream = address.connect(preference).await.map_err(|error| match tunnel {
            Some(tunnel) => io::Error::new(error.kind(), format!("{}: {error}", tunnel.proxy)),
            None => error,
        })?;
        configure(&stream);
        if let Some(tunnel) = tunnel {
            open_tunnel(&mut stream, tunnel, target).await?;
        }
        Ok(stream)
    }

    /// The servers to try, in the configured order, but those that failed recently last.
    fn order(&self, tried: &[usize]) -> Vec<usize> {
        let now = Instant::now();
        let mut order: Vec<_> = (0..self.servers.len()).filter(|server| !tried.contains(server)).collect();
        order.sort_by_key(|server| {
            let health = self.servers[*server].health.lock().unwrap_or_else(PoisonError::into_inner);
            health.as_ref().map(|failed| failed.until).filter(|until| *until > now)
        });
        order
    }

    fn failed(&self, server: usize) {
        let mut health = self.servers[server].health.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        // Of many concurrent attempts that failed, only the first counts.
        if health.as_ref().is_some_and(|failed| failed.until > now) {
            return;
        }
        let times = health.as_ref().map_or(0, |failed| failed.times);
        let quarantine = FAILURE_BACK_OFF.0.saturating_mul(1 << times.min(10)).min(FAILURE_BACK_OFF.1);
        *health = Some(Failed { until: now + quarantine, times: times + 1 });
    }

    /// Starts a trial of a server that was reached at this address. Unless it passes, the server is marked as failed.
    pub(super) fn trial(&self, server: usize, at: Option<SocketAddr>) -> Trial<'_> {
        Trial { upstream: self, server, at, passed: false }
    }

    /// Whether a server that is not in `tried` is left.
    pub(super) fn has_others(&self, tried: &[usize]) -> bool {
        tried.len() < self.servers.len()
    }
}

/// A handshake with a server whose outcome decides the server's health.
pub(super) struct Trial<'a> {
    upstream: &'a Upstream,
    server: usize,
    at: Option<SocketAddr>,
    passed: bool,
}

impl Trial<'_> {
    pub(super) fn passed(mut self) {
        self.passed = true;
        let server = &self.upstream.servers[self.server];
        *server.health.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if !self.passed {
            self.upstream.servers[self.server].preference.failed(self.at);
            self.upstream.failed(self.server);
        }
    }
}

/// Sets TCP_NODELAY, and keepalives that detect a dead peer within a minute: a watch may be idle for long.
fn configure(stream: &TcpStream) {
    use rustix::net::sockopt;
    // Without an option, a dead peer is detected later, which is no reason to fail.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, Duration::from_secs(30));
    let _ = sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10));
    let _ = sockopt::set_tcp_keepcnt(stream, 3);
    let _ = sockopt::set_tcp_user_timeout(stream, 60_000);
}

async fn open_tunnel(stream: &mut TcpStream, tunnel: &Tunnel, target: &Address) -> io::Result<()> {
    let authority = target.authority();
    let mut request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n").into_bytes();
    if let Some(authorization) = tunnel.proxy.authorization() {
        request.extend([b"Proxy-Authorization: ", authorization.as_bytes(), b"\r\n"].concat());
    }
    request.extend(b"\r\n");
    stream.write_all(&request).await?;
    let mut answer = Vec::new();
    // Byte by byte: anything after the response belongs to the API server, which waits for the ClientHello.
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() == MAXIMUM_RESPONSE {
            return Err(io::Error::other(format!("the response of {} to CONNECT is too long", tunnel.proxy)));
        }
        answer.push(stream.read_u8().await?);
    }
    let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    match line.split(' ').nth(1) {
        Some(status) if status.starts_with('2') => Ok(()),
        _ => Err(io::Error::other(format!("{} answered CONNECT with {line:?}", tunnel.proxy))),
    }
}
