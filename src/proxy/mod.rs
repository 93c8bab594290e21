//! The credential proxy: a local client speaks to the API server as this node, with a key that it never sees.
//!
//! client-go takes a private key only as PEM, so a key in a token or a TPM cannot be given to a kubelet. It connects to
//! this proxy instead, which makes the real connection with the backend's key, and copies octets.
//!
//! # Flow
//! `listener` accepts, `connection` lives a connection's life: `local_tls` lets in only the client that holds the
//! certificate that `local_authority` made for this boot, `upstream` finds an API server that answers, `session` is
//! TLS with either, `relay` copies. `generation` knows as which certificate; at a rotation, [`ProxyHandle::swap`]
//! gives it the next one, and `conversation` knows how to tell clients so that no request fails.
//!
//! # Guarantees
//! * Nothing but the configured user (and root) can use the identity: not other users of the machine, not a local
//!   certificate of another boot, and nobody elsewhere.
//! * The application protocol (ALPN) is the same on both sides, so HTTP/2, watches, and upgrades to WebSocket and SPDY
//!   pass as they are.
//! * A connection speaks as one certificate, and none outlives it; no TLS session with an API server is ever resumed.
//! * A key device that hangs fails new connections by a deadline, and open ones go on.
//!
//! # Assumptions
//! It runs on a tokio runtime with more than one worker: a signature blocks the one it is made on.

mod address;
mod admission;
mod connection;
mod conversation;
mod counters;
mod generation;
mod listener;
mod local_authority;
mod local_server;
mod local_tls;
mod relay;
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
use generation::{Generations, Protocols};
use local_authority::LocalAuthority;
use local_tls::LocalTls;

pub use generation::Generation;
pub use listener::Activated;
pub use local_server::{ClientFiles, LocalServer};
pub use upstream::{Endpoints, Upstream};

/// At most this many handshakes wait for a key at once, each on a thread: a device signs one after the other anyway.
const SIGNING_AT_ONCE: usize = 16;
/// How many different offers of application protocols are remembered.
const REMEMBERED_OFFERS: usize = 16;
/// Descriptors that are not for connections.
const OTHER_DESCRIPTORS: u64 = 64;

/// What all connections share.
struct Shared {
    generations: Generations,
    counters: Counters,
    local: LocalTls,
    admission: Arc<Admission>,
    connections: Arc<Semaphore>,
    signing: Semaphore,
    protocols: Mutex<Vec<(Protocols, Option<Vec<u8>>)>>,
    trouble: Mutex<String>,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    signing_deadline: Duration,
    idle_timeout: Duration,
}

impl Shared {
    /// Which protocol the API server settles on for this offer, if that is known.
    fn known_protocol(&self, offer: &Protocols) -> Option<Option<Vec<u8>>> {
        let known = self.protocols.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(known, _)| known == offer).map(|(_, settled)| settled.clone())
    }

    fn remember_protocol(&self, offer: &Protocols, settled: Option<&[u8]>) {
        let mut known = self.protocols.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(known, _)| known != offer);
        if known.len() == REMEMBERED_OFFERS {
            known.remove(0);
        }
        known.push((offer.clone(), settled.map(<[u8]>::to_vec)));
    }

    fn forget_protocol(&self, offer: &Protocols) {
        self.protocols.lock().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| known != offer);
    }

    fn statistics(&self) -> Statistics {
        self.counters.snapshot(self.generations.open_connections())
    }

    /// How long one handshake with an API server may take, the wait for the key included.
    fn server_handshake_timeout(&self) -> Duration {
        self.handshake_timeout + self.signing_deadline
    }

    /// How long it may take until some API server is connected.
    fn server_timeout(&self) -> Duration {
        self.server_handshake_timeout() * 2
    }
}

/// The proxy.
pub struct Proxy;

impl Proxy {
    /// Starts a proxy. Without a generation, clients wait for the first [`ProxyHandle::swap`] as long as a handshake may
    /// take.
    ///
    /// # Errors
    /// If the address cannot be listened on, or the local certificates cannot be written.
    pub async fn start(
        configuration: ProxyConfiguration,
        activated: Activated,
        initial: Option<Generation>,
        telemetry: Arc<Telemetry>,
    ) -> io::Result<ProxyHandle> {
        let (directory, user) = (&configuration.runtime_directory, configuration.user);
        let failed = |error: io::Error| {
            io::Error::new(error.kind(), format!("the local certificates in {}: {error}", directory.display()))
        };
        let local = LocalTls::new(LocalAuthority::open(directory, user).map_err(failed)?)?;
        let (listeners, address) =
            listener::open(activated, configuration.listen, configuration.unix_socket.as_deref(), user)?;
        let connections = connection_limit(configuration.maximum_connections);
        let shared = Arc::new(Shared {
            generations: Generations::new(configuration.drain),
            counters: Counters::new(Arc::clone(&telemetry)),
            local,
            admission: Arc::new(Admission::new(configuration.maximum_handshakes.min(connections / 2))),
            connections: Arc::new(Semaphore::new(connections)),
            signing: Semaphore::new(SIGNING_AT_ONCE),
            protocols: Mutex::default(),
            trouble: Mutex::default(),
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
    /// Makes new connections speak as this generation, and moves the others over. One of the same serial number and the
    /// same API servers as the current one changes nothing, unless that has ended.
    pub fn swap(&self, generation: Generation) {
        let (serial, not_after) = (generation.serial.clone(), generation.not_after.to_string());
        if self.shared.generations.swap(generation) {
            self.telemetry.emit(Event::ProxySwapped { serial, not_after });
        }
    }

    /// Notes why there can be no other generation, or by an empty reason that there is no trouble: for the status, and once
    /// for the log.
    pub fn note_trouble(&self, reason: String) {
        let mut known = self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == reason {
            return;
        }
        known.clone_from(&reason);
        drop(known);
        if !reason.is_empty() {
            self.telemetry.emit(Event::ProxyFailed { reason: "no-certificate", detail: reason, count: 1 });
        }
    }

    /// Returns once no connection speaks as the generation of this serial number, and none will: its key is not needed
    /// any more. A generation that is not known is unused.
    pub async fn wait_until_unused(&self, serial: &str) {
        self.shared.generations.wait_until_unused(serial).await;
    }

    /// Returns once no connection speaks as an earlier generation than the current one.
    pub async fn wait_until_only_current(&self) {
        self.shared.generations.wait_until_only_current().await;
    }

    /// The current generation, unless it has ended.
    pub fn current(&self) -> Option<Generation> {
        self.shared.generations.current()
    }

    /// Tells how it stands, for the status of its identity.
    pub fn gauge(&self) -> ProxyGauge {
        let (address, shared) = (self.address, Arc::downgrade(&self.shared));
        Box::new(move || {
            let shared = shared.upgrade()?;
            Some(ProxyStatus {
                address,
                serial: shared.generations.serial().unwrap_or_default(),
                reason: shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                statistics: shared.statistics(),
            })
        })
    }

    /// What the proxy has done, and its open connections.
    pub fn statistics(&self) -> Statistics {
        self.shared.statistics()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What a local client needs.
    pub fn client_files(&self) -> &ClientFiles {
        &self.client_files
    }

    /// The local end for a kubeconfig.
    pub fn local_server(&self) -> LocalServer<'_> {
        LocalServer { address: self.address, files: &self.client_files }
    }
}

impl Drop for ProxyHandle {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.generations.end();
    }
}

/// How many connections there may be: each needs two descriptors, of which the system gives only so many. The soft limit
/// is raised to the hard one first.
fn connection_limit(wanted: usize) -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            limit = raised;
        }
    }
    let descriptors = limit.current.unwrap_or(u64::MAX).saturating_sub(OTHER_DESCRIPTORS) / 2;
    wanted.min(usize::try_from(descriptors).unwrap_or(usize::MAX)).max(1)
}
