//! The credential proxy: local clients connect to the API server as this node, without access to its private key.
//!
//! client-go takes a private key only as PEM, so a kubelet cannot use a key in a token or a TPM. It connects to this
//! proxy instead, which authenticates to the API server with the backend's key and relays the bytes.
//!
//! # Flow
//! `listener` accepts connections, and `connection` handles each of them: `local_tls` accepts only the client with
//! the certificate that `local_authority` issued for this boot, `upstream` finds an API server that answers,
//! `session` implements TLS with both, and `relay` copies bytes. `epoch` holds the certificate in use. At a rotation,
//! [`ProxyHandle::swap`] sets the next one, and `request_tracker` tells clients to reconnect without failing a
//! request.
//!
//! # Guarantees
//! * Only the configured user and root can use the identity: no other user of the machine, no local certificate of
//!   another boot, and no remote host.
//! * The application protocol (ALPN) is the same on both sides, so HTTP/2, watches, and upgrades to WebSocket and
//!   SPDY work unchanged.
//! * A connection uses one certificate and is closed before that certificate expires. TLS sessions with an API server
//!   are never resumed.
//! * If a key device hangs, new connections fail after a deadline, and open ones continue.
//!
//! # Assumptions
//! It runs on a multi-threaded tokio runtime: a signature blocks the worker thread that it runs on.

mod address;
mod admission;
mod connection;
mod counters;
mod epoch;
mod listener;
mod local_authority;
mod local_server;
mod local_tls;
mod relay;
mod request_tracker;
mod session;
mod socket;
mod upstream;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::config::ProxyConfiguration;
use crate::telemetry::{Event, ProxyGauge, ProxyStatus, Statistics, Telemetry};
use admission::Admission;
use counters::Counters;
use epoch::{Epochs, Protocols};
use local_authority::LocalAuthority;
use local_tls::LocalTls;

pub use epoch::Epoch;
pub use listener::ActivatedSockets;
pub use local_server::{ClientFiles, LocalServer};
pub use upstream::{Endpoints, Upstream};

/// Limit on handshakes that wait for a key, each of which blocks a thread. Most devices sign one at a time anyway.
const MAXIMUM_WAITING_FOR_KEY: usize = 16;
/// The number of ALPN offers whose negotiated protocol is cached.
const CACHED_OFFERS: usize = 16;
/// File descriptors reserved for purposes other than connections.
const RESERVED_DESCRIPTORS: u64 = 64;

struct Shared {
    epochs: Epochs,
    counters: Counters,
    local: LocalTls,
    admission: Arc<Admission>,
    connections: Arc<Semaphore>,
    signing: Semaphore,
    protocols: Mutex<Vec<(Protocols, Option<Vec<u8>>)>>,
    certificate_error: Mutex<String>,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    signing_deadline: Duration,
    idle_timeout: Duration,
}

impl Shared {
    /// The protocol that the API server negotiated for this offer before, if any.
    fn cached_protocol(&self, offer: &Protocols) -> Option<Option<Vec<u8>>> {
        let known = self.protocols.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(known, _)| known == offer).map(|(_, negotiated)| negotiated.clone())
    }

    fn cache_protocol(&self, offer: &Protocols, negotiated: Option<&[u8]>) {
        let mut known = self.protocols.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(known, _)| known != offer);
        if known.len() == CACHED_OFFERS {
            known.remove(0);
        }
        known.push((offer.clone(), negotiated.map(<[u8]>::to_vec)));
    }

    fn forget_protocol(&self, offer: &Protocols) {
        self.protocols.lock().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| known != offer);
    }

    fn statistics(&self) -> Statistics {
        self.counters.snapshot(self.epochs.open_connections())
    }

    /// Timeout of one handshake with an API server, including the wait for the key.
    fn server_handshake_timeout(&self) -> Duration {
        self.handshake_timeout + self.signing_deadline
    }

    /// Timeout for connecting to any API server.
    fn server_timeout(&self) -> Duration {
        self.server_handshake_timeout() * 2
    }
}

/// The credential proxy; see [`Proxy::start`].
pub struct Proxy;

impl Proxy {
    /// Starts a proxy. Until there is a certificate ([`ProxyHandle::swap`]), clients wait for one, up to the
    /// handshake timeout.
    ///
    /// # Errors
    /// If it cannot listen on the address, or cannot write the local certificates.
    pub async fn start(
        configuration: ProxyConfiguration,
        activated: ActivatedSockets,
        initial: Option<Epoch>,
        telemetry: Arc<Telemetry>,
    ) -> io::Result<ProxyHandle> {
        let (directory, user) = (&configuration.runtime_directory, configuration.user);
        let failed = |error: io::Error| {
            let directory = directory.display();
            io::Error::new(error.kind(), format!("cannot create the local certificates in {directory}: {error}"))
        };
        let local = LocalTls::new(LocalAuthority::open(directory, user).map_err(failed)?)?;
        let (listeners, address) =
            listener::open(activated, configuration.listen, configuration.unix_socket.as_deref(), user)?;
        let connections = connection_limit(configuration.maximum_connections);
        let shared = Arc::new(Shared {
            epochs: Epochs::new(configuration.drain),
            counters: Counters::new(Arc::clone(&telemetry)),
            local,
            admission: Arc::new(Admission::new(configuration.maximum_handshakes.min(connections / 2))),
            connections: Arc::new(Semaphore::new(connections)),
            signing: Semaphore::new(MAXIMUM_WAITING_FOR_KEY),
            protocols: Mutex::default(),
            certificate_error: Mutex::default(),
            connect_timeout: configuration.connect_timeout,
            handshake_timeout: configuration.handshake_timeout,
            signing_deadline: configuration.signing_deadline,
            idle_timeout: configuration.idle_timeout,
        });
        let client_files = ClientFiles::in_directory(directory);
        let mut handle = ProxyHandle { address, client_files, telemetry, tasks: Vec::new(), shared };
        if let Some(initial) = initial {
            handle.swap(initial);
        }
        let accept = |listener| tokio::spawn(listener::accept(Arc::clone(&handle.shared), listener));
        let tasks = listeners.into_iter().map(accept).collect();
        handle.tasks = tasks;
        handle.telemetry.emit(Event::ProxyListening { address: address.to_string() });
        Ok(handle)
    }
}

/// A running proxy. Dropping it closes its sockets and every connection.
pub struct ProxyHandle {
    address: SocketAddr,
    client_files: ClientFiles,
    telemetry: Arc<Telemetry>,
    tasks: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl ProxyHandle {
    /// Uses this epoch's certificate for new connections, and drains the connections of the previous epoch. Does
    /// nothing if the current epoch has the same certificate and the same API servers and has not expired.
    pub fn swap(&self, epoch: Epoch) {
        let (serial, not_after) = (epoch.serial.clone(), epoch.not_after.to_string());
        if self.shared.epochs.swap(epoch) {
            self.telemetry.emit(Event::ProxySwapped { serial, not_after });
        }
    }

    /// Records why the next certificate cannot be used, or clears the error if `reason` is empty. Reported in the
    /// status, and logged when it changes.
    pub fn set_certificate_error(&self, reason: String) {
        let mut known = self.shared.certificate_error.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == reason {
            return;
        }
        known.clone_from(&reason);
        drop(known);
        if !reason.is_empty() {
            self.telemetry.emit(Event::ProxyFailed { reason: "no-certificate", detail: reason, count: 1 });
        }
    }

    /// Returns once the epoch with this serial number is not current and has no open connections, so that its key is
    /// no longer needed. Returns at once if there is no such epoch.
    pub async fn wait_until_unused(&self, serial: &str) {
        self.shared.epochs.wait_until_unused(serial).await;
    }

    /// Returns once all open connections belong to the current epoch.
    pub async fn wait_until_only_current(&self) {
        self.shared.epochs.wait_until_only_current().await;
    }

    /// The current epoch, unless it has expired.
    pub fn current(&self) -> Option<Epoch> {
        self.shared.epochs.current()
    }

    /// A gauge for the identity's status.
    pub fn gauge(&self) -> ProxyGauge {
        let (address, shared) = (self.address, Arc::downgrade(&self.shared));
        Box::new(move || {
            let shared = shared.upgrade()?;
            Some(ProxyStatus {
                address,
                serial: shared.epochs.serial().unwrap_or_default(),
                reason: shared.certificate_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                statistics: shared.statistics(),
            })
        })
    }

    /// The counters since the start, and the connections that are open now.
    pub fn statistics(&self) -> Statistics {
        self.shared.statistics()
    }

    /// The address of the first TCP listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The files that a local client needs.
    pub fn client_files(&self) -> &ClientFiles {
        &self.client_files
    }

    /// The server entry for a kubeconfig.
    pub fn local_server(&self) -> LocalServer<'_> {
        LocalServer { address: self.address, files: &self.client_files }
    }
}

impl Drop for ProxyHandle {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.epochs.close_all();
    }
}

/// The maximum number of connections, each of which needs two file descriptors. Raises the soft RLIMIT_NOFILE to the
/// hard limit first.
fn connection_limit(wanted: usize) -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            limit = raised;
        }
    }
    let descriptors = limit.current.unwrap_or(u64::MAX).saturating_sub(RESERVED_DESCRIPTORS) / 2;
    wanted.min(usize::try_from(descriptors).unwrap_or(usize::MAX)).max(1)
}
