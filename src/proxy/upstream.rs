//! The way to the API servers: which there are, which of them answer, and through which proxy.

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

/// How long an API server that failed is tried only after the others: the first time, and at most.
const QUARANTINE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));
/// The longest answer of an HTTP proxy to CONNECT.
const LONGEST_ANSWER: usize = 8 << 10;

/// An HTTP proxy that opens tunnels (RFC 9110, section 9.3.6).
struct Tunnel {
    address: Address,
    proxy: Proxy,
}

impl Tunnel {
    fn through(proxy: Proxy) -> Result<Self, String> {
        match (proxy.url.scheme_str(), Address::of(&proxy.url, 80)) {
            (Some("http"), Some(address)) => Ok(Self { address, proxy }),
            _ => Err(format!("{proxy} cannot be used: the credential proxy takes only http://")),
        }
    }
}

struct Server {
    address: Address,
    name: ServerName<'static>,
    tunnel: Option<Tunnel>,
    /// Of the addresses that its name stands for, or the HTTP proxy's.
    preference: Preference,
    health: Mutex<Option<Failed>>,
}

struct Failed {
    until: Instant,
    times: u32,
}

/// The API servers of a cluster.
pub struct Upstream {
    servers: Vec<Server>,
    tls: rustls::ClientConfig,
    /// What they were read from, to tell whether that has changed since.
    cluster: Option<Cluster>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<_> = self.servers.iter().map(|server| server.address.authority()).collect();
        formatter.debug_struct("Upstream").field("servers", &servers).finish_non_exhaustive()
    }
}

/// What is needed to reach API servers, and to know them.
pub struct Endpoints<'a> {
    /// `https://HOST[:PORT]`, the preferred one first.
    pub servers: &'a [http::Uri],
    /// The name in the servers' certificates, where it is not that of their URL.
    pub tls_server_name: Option<&'a str>,
    /// The HTTP proxy that opens the tunnels to a server, if one does.
    pub proxy_for: &'a dyn Fn(&http::Uri) -> Option<Proxy>,
}

impl Upstream {
    /// The API server of a kubeconfig; `others` are tried when it does not answer, or come first if they name it too.
    ///
    /// # Errors
    /// If the kubeconfig's authority cannot be used, a URL has no host, or the proxy is not an HTTP proxy.
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

    /// Whether these are the API servers of this cluster as it is now.
    pub fn is_of(&self, cluster: &Cluster) -> bool {
        self.cluster.as_ref().is_some_and(|known| known.is_same_as(cluster))
    }

    /// These API servers, verified as `tls` says; what it says of client certificates and protocols is not used.
    ///
    /// # Errors
    /// What is wrong with a URL.
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

    /// Connects to the API server that answers first, given a head start in the order of preference and health, and
    /// says which it is. Those in `tried` are left out.
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

    /// The servers in the order to try them: as configured, and those that failed a short while ago behind the others.
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
        // Of many that tried it at once, only one tells something new.
        if health.as_ref().is_some_and(|failed| failed.until > now) {
            return;
        }
        let times = health.as_ref().map_or(0, |failed| failed.times);
        let quarantine = QUARANTINE.0.saturating_mul(1 << times.min(10)).min(QUARANTINE.1);
        *health = Some(Failed { until: now + quarantine, times: times + 1 });
    }

    /// Puts a server, reached at this address, on trial: unless it passes, it has failed.
    pub(super) fn trial(&self, server: usize, at: Option<SocketAddr>) -> Trial<'_> {
        Trial { upstream: self, server, at, passed: false }
    }

    /// Whether there is another server than these.
    pub(super) fn has_others(&self, tried: &[usize]) -> bool {
        tried.len() < self.servers.len()
    }
}

/// A server that is to come through a handshake.
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

/// No delay, and a dead peer is noticed within a minute although nothing is said: a watch may be silent for long.
fn configure(stream: &TcpStream) {
    use rustix::net::sockopt;
    // Options that cannot be set make a connection slower to notice things, not wrong.
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
    // Byte by byte: what follows the answer belongs to the API server, which waits for us to begin.
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() == LONGEST_ANSWER {
            return Err(io::Error::other(format!("{} answers without an end", tunnel.proxy)));
        }
        answer.push(stream.read_u8().await?);
    }
    let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    match line.split(' ').nth(1) {
        Some(status) if status.starts_with('2') => Ok(()),
        _ => Err(io::Error::other(format!("{} answers {line:?}", tunnel.proxy))),
    }
}
