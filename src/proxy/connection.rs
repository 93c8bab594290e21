//! Handles one connection: authenticate the client, connect upstream, relay, drain.
//!
//! # Flow
//! 1. The proxy reads the ClientHello for the application protocols that the client offers.
//! 2. It completes the local handshake with the protocol that the API server negotiates for such an offer. If that is
//!    not cached, it makes a handshake with the API server *without* a client certificate to learn it, and caches it
//!    once the client has authenticated. So the key signs only for authenticated clients: a local user without the
//!    local certificate can neither use the identity nor keep a slow key device busy.
//! 3. It takes a lease of the current epoch and connects to the API server with that epoch's certificate and the same
//!    offer. If the API server now negotiates another protocol, the connection is closed and the cache entry dropped.
//! 4. It copies bytes until both sides have closed, or the epoch has.

use std::future::poll_fn;
use std::io;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::server::Acceptor;
use rustls::{AlertDescription, HandshakeKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::admission::HandshakePermit;
use super::epoch::{Lease, Protocols, Stage};
use super::relay::{Endpoint, Relay};
use super::request_tracker::RequestTracker;
use super::session::{HandshakeError, Session};
use super::socket::Socket;
use crate::telemetry::FailureReason;

/// Idle time after which a connection is closed once its client has been told to use another one.
const DRAINED_IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// The same where the client could not be told. An idle HTTP/1.1 client cannot be told anything, and may be about to
/// send a request. client-go closes a connection that has been idle for 90 s (net/http's IdleConnTimeout). Closing it
/// earlier may cross a request in flight, which is then lost if it is a POST (RFC 9112, section 9.5).
const UNANNOUNCED_IDLE_TIMEOUT: Duration = Duration::from_secs(100);
/// Idle time after which a half-closed connection is closed.
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(60);
/// The beginning of HTTP/2 with prior knowledge on a unix socket (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0";
/// A fatal no_application_protocol alert record (RFC 7301, section 3.2; RFC 8446, section 6).
const NO_APPLICATION_PROTOCOL: [u8; 7] = [21, 3, 3, 0, 2, 2, 120];

struct Failure {
    reason: FailureReason,
    detail: String,
}

fn failure(reason: FailureReason, detail: impl ToString) -> Failure {
    Failure { reason, detail: detail.to_string() }
}

/// An authenticated client, and the application protocols that it offers.
struct Client {
    endpoint: Endpoint,
    offer: Protocols,
    /// The protocol negotiated with the client; none on a unix socket.
    negotiated_locally: Option<Option<Vec<u8>>>,
}

/// Serves a connection until it closes.
pub(super) async fn serve(shared: &Shared, socket: Socket, permit: HandshakePermit) {
    let counters = &shared.counters;
    counters.accepted.fetch_add(1, Ordering::Relaxed);
    // Boxed, so that an open connection does not keep the memory of the larger opening future.
    let opened = Box::pin(open(shared, socket, permit)).await;
    let result = match opened {
        Ok((relay, lease)) => run(shared, relay, lease).await,
        Err(failure) => Err(failure),
    };
    if let Err(Failure { reason, detail }) = result {
        counters.failed(reason, &detail);
    }
}

async fn open(shared: &Shared, socket: Socket, mut permit: HandshakePermit) -> Result<(Box<Relay>, Lease), Failure> {
    let deadline = Instant::now() + shared.handshake_timeout;
    let client = tokio::select! {
        accepted = accept(shared, socket, deadline) => accepted?,
        () = permit.evicted() => {
            return Err(failure(FailureReason::TooManyHandshakes, "too many local handshakes are under way"));
        }
    };
    drop(permit);
    shared.counters.local_handshakes.fetch_add(1, Ordering::Relaxed);
    if client.endpoint.session.common().is_some_and(|tls| tls.handshake_kind() == Some(HandshakeKind::Resumed)) {
        shared.counters.local_resumptions.fetch_add(1, Ordering::Relaxed);
    }
    let deadline = Instant::now() + shared.server_timeout();
    let lease = timeout_at(deadline, shared.epochs.lease()).await.map_err(no_certificate)?;
    let server = timeout_at(deadline, connect(shared, &lease, &client.offer)).await.map_err(server_timed_out)?;
    let server = server.inspect_err(|failure| {
        if failure.reason == FailureReason::LocalHandshake {
            shared.forget_protocol(&client.offer);
        }
    })?;
    shared.counters.server_handshakes.fetch_add(1, Ordering::Relaxed);
    let negotiated = server.session.common().and_then(|tls| tls.alpn_protocol()).map(<[u8]>::to_vec);
    if client.negotiated_locally.is_some_and(|negotiated_locally| negotiated_locally != negotiated) {
        shared.forget_protocol(&client.offer);
        let detail = "the API server negotiated a different application protocol than before";
        return Err(failure(FailureReason::ProtocolChanged, detail));
    }
    let request_tracker = RequestTracker::new(negotiated.as_deref());
    Ok((Box::new(Relay::new(client.endpoint, server, request_tracker)), lease))
}

fn client_timed_out(_: Elapsed) -> Failure {
    failure(FailureReason::LocalHandshakeTimeout, "a local client did not finish its handshake in time")
}

fn no_certificate(_: Elapsed) -> Failure {
    failure(FailureReason::NoCertificate, "there is no valid certificate for the API server yet")
}

fn server_timed_out(_: Elapsed) -> Failure {
    failure(FailureReason::ServerHandshake, "no API server completed a handshake in time")
}

fn disconnected(error: io::Error) -> Failure {
    failure(FailureReason::LocalHandshake, error)
}

/// Authenticates the client. A timeout is reported as the client's or the API server's, depending on which was waited
/// for.
async fn accept(shared: &Shared, mut socket: Socket, deadline: Instant) -> Result<Client, Failure> {
    if matches!(socket, Socket::Unix(_)) {
        return timeout_at(deadline, accept_plain(socket)).await.map_err(client_timed_out)?;
    }
    let (incoming, offer) = timeout_at(deadline, client_hello(&mut socket)).await.map_err(client_timed_out)??;
    let known = shared.cached_protocol(&offer);
    let is_new = known.is_none() && !offer.is_empty();
    let learned = match known {
        Some(known) => Ok(known),
        None => learn_protocol(shared, &offer, deadline).await,
    };
    if learned.as_ref().is_err_and(|failure| failure.reason == FailureReason::LocalHandshake) {
        let _ = timeout_at(deadline, socket.write_all(&NO_APPLICATION_PROTOCOL)).await;
    }
    let negotiated_locally = learned?;
    let config = shared.local.for_protocol(negotiated_locally.as_deref());
    let broken = |error: rustls::Error| failure(FailureReason::LocalHandshake, error);
    let mut session = Session::server(config, incoming).map_err(broken)?;
    let handshake = timeout_at(deadline, session.handshake(&mut socket, None)).await.map_err(client_timed_out)?;
    handshake.map_err(|error| match error {
        HandshakeError::Io(error) => disconnected(error),
        HandshakeError::Tls(rustls::Error::NoCertificatesPresented) => {
            failure(FailureReason::LocalCertificateMissing, "refused a local client without a certificate")
        }
        HandshakeError::Tls(rustls::Error::InvalidCertificate(_)) => failure(
            FailureReason::LocalCertificateUnknown,
            "refused a local client whose certificate is not this boot's",
        ),
        HandshakeError::Tls(rustls::Error::AlertReceived(AlertDescription::UnknownCA)) => failure(
            FailureReason::LocalHandshake,
            "a local client does not trust this boot's CA: restart it so that it rereads its kubeconfig",
        ),
        HandshakeError::Tls(error) => broken(error),
        HandshakeError::KeyBusy => failure(FailureReason::KeyUnavailable, "the key is busy"),
    })?;
    // Only for authenticated clients: others could evict the useful entries with unusual offers.
    if is_new {
        shared.cache_protocol(&offer, negotiated_locally.as_deref());
    }
    Ok(Client { endpoint: Endpoint { socket, session }, offer, negotiated_locally: Some(negotiated_locally) })
}

/// Reads the ClientHello; returns its bytes and the application protocols in it.
async fn client_hello(socket: &mut Socket) -> Result<(Vec<u8>, Protocols), Failure> {
    let mut incoming = Vec::new();
    let mut acceptor = Acceptor::default();
    loop {
        let known = incoming.len();
        incoming.reserve(2048);
        if socket.read_buf(&mut incoming).await.map_err(disconnected)? == 0 {
            return Err(disconnected(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut new = &incoming[known..];
        while !new.is_empty() {
            acceptor.read_tls(&mut new).map_err(disconnected)?;
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let offer = hello.alpn().map(|offer| offer.map(<[u8]>::to_vec).collect()).unwrap_or_default();
                return Ok((incoming, offer));
            }
            Ok(None) => {}
            Err((error, mut alert)) => {
                let mut bytes = Vec::new();
                let _ = alert.write_all(&mut bytes);
                let _ = socket.write_all(&bytes).await;
                return Err(failure(FailureReason::LocalHandshake, error));
            }
        }
    }
}

/// Accepts a unix socket's client, which the kernel has authenticated. Its first bytes tell which protocol it uses.
async fn accept_plain(mut socket: Socket) -> Result<Client, Failure> {
    let mut first = Vec::with_capacity(1024);
    loop {
        let read = socket.read_buf(&mut first).await;
        if read.map_err(|error| failure(FailureReason::LocalHandshake, error))? == 0 {
            let detail = "a local client closed its connection without sending anything";
            return Err(failure(FailureReason::LocalHandshake, detail));
        }
        let compared = first.len().min(HTTP2_PREFACE.len());
        let http2 = first[..compared] == HTTP2_PREFACE[..compared];
        if http2 && compared < HTTP2_PREFACE.len() {
            continue;
        }
        let offer = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let session = Session::plain(first);
        return Ok(Client { endpoint: Endpoint { socket, session }, offer, negotiated_locally: None });
    }
}

/// The protocol that the API server negotiates for this offer, learned without presenting the certificate.
async fn learn_protocol(shared: &Shared, offer: &Protocols, deadline: Instant) -> Result<Option<Vec<u8>>, Failure> {
    if offer.is_empty() {
        return Ok(None);
    }
    let upstream = timeout_at(deadline, shared.epochs.upstream()).await.map_err(no_certificate)?;
    let mut config = upstream.tls().clone();
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols.clone_from(offer);
    config.client_auth_cert_resolver = std::sync::Arc::new(NoCertificate);
    let config = std::sync::Arc::new(config);
    let begin = |name| Session::client(config.clone(), name);
    let endpoint = timeout_at(deadline, connect_to(shared, &upstream, &begin)).await.map_err(server_timed_out)??;
    Ok(endpoint.session.common().and_then(|tls| tls.alpn_protocol()).map(<[u8]>::to_vec))
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _: &[&[u8]],
        _: &[rustls::SignatureScheme],
    ) -> Option<std::sync::Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// Connects to an API server with the lease's certificate.
async fn connect(shared: &Shared, lease: &Lease, offer: &Protocols) -> Result<Endpoint, Failure> {
    let config = lease.active.client_config(offer);
    let begin = |name| Session::client(config.clone(), name);
    connect_to(shared, &lease.active.epoch.upstream, &begin).await
}

type NewSession<'a> = dyn Fn(ServerName<'static>) -> Result<Session, rustls::Error> + Sync + 'a;

/// Connects to an API server, trying the next when one fails.
async fn connect_to(shared: &Shared, upstream: &super::Upstream, begin: &NewSession<'_>) -> Result<Endpoint, Failure> {
    let mut tried = Vec::new();
    loop {
        let connected = upstream.connect(&tried, shared.connect_timeout).await;
        let (stream, server) = connected.map_err(|error| failure(FailureReason::ServerUnreachable, error))?;
        tried.push(server);
        let at = stream.peer_addr().ok();
        let mut socket = Socket::Tcp(stream);
        let broken = |error: &dyn std::fmt::Display| {
            failure(FailureReason::ServerHandshake, format!("{}: {error}", upstream.authority(server)))
        };
        let mut session = begin(upstream.name(server).clone()).map_err(|error| broken(&error))?;
        let handshake = session.handshake(&mut socket, Some((&shared.signing, shared.signing_deadline)));
        // Created before the wait: if the caller gives up first, the server counts as failed.
        let trial = upstream.trial(server, at);
        // A server that does not answer must not use up the time for the others.
        let timeout = match upstream.has_others(&tried) {
            true => shared.connect_timeout.min(shared.handshake_timeout / 2),
            false => shared.server_handshake_timeout(),
        };
        let failed = match tokio::time::timeout(timeout, handshake).await {
            Ok(Ok(())) => {
                trial.passed();
                return Ok(Endpoint { socket, session });
            }
            Ok(Err(HandshakeError::KeyBusy)) => {
                trial.passed();
                return Err(failure(
                    FailureReason::KeyUnavailable,
                    "too many other handshakes are waiting for the key",
                ));
            }
            // Not the server's fault, and the next server would need the same key.
            Ok(Err(HandshakeError::Tls(rustls::Error::Other(error)))) => {
                trial.passed();
                return Err(failure(FailureReason::KeyUnavailable, error));
            }
            // The other servers would reject the offer too.
            Ok(Err(HandshakeError::Tls(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)))) => {
                trial.passed();
                let detail = "a local client offers no application protocol that the API server supports";
                return Err(failure(FailureReason::LocalHandshake, detail));
            }
            Ok(Err(error)) => broken(&error),
            Err(_) => broken(&"the handshake timed out"),
        };
        drop(trial);
        if !upstream.has_others(&tried) {
            return Err(failed);
        }
    }
}

/// Relays until both sides have closed, the connection is idle for too long, or the epoch closes.
async fn run(shared: &Shared, mut relay: Box<Relay>, lease: Lease) -> Result<(), Failure> {
    let mut stage = lease.active.stage();
    let mut drained = false;
    let (mut seen, mut silent_since) = (relay.activity, Instant::now());
    let mut next_check = silent_since + shared.idle_timeout;
    loop {
        let at = *stage.borrow_and_update();
        match at {
            Stage::Draining if !drained => {
                drained = true;
                relay.drain();
                next_check = next_check.min(Instant::now() + DRAINED_IDLE_TIMEOUT);
            }
            Stage::Current | Stage::Draining => {}
            Stage::Closed => {
                close(&mut relay).await;
                return if relay.is_idle() {
                    Ok(())
                } else {
                    Err(failure(
                        FailureReason::CutAtEnd,
                        "the drain time was over, or the certificate about to expire, with a request outstanding",
                    ))
                };
            }
        }
        tokio::select! {
            biased;
            result = poll_fn(|cx| relay.poll(cx, &shared.counters.copied)) => {
                // A client that has closed its side may disconnect before it receives the server's close.
                let over = relay.is_idle() && relay.client_has_closed();
                return if over { Ok(()) } else { result.map_err(|error| failure(FailureReason::Broken, error)) };
            }
            _ = stage.changed() => {}
            () = tokio::time::sleep_until(next_check) => {
                let (drained_and_idle, half_closed) = (drained && relay.is_idle(), relay.is_half_closed());
                let timeout = match (drained_and_idle, half_closed) {
                    (true, disconnected) if disconnected || relay.is_announced() => DRAINED_IDLE_TIMEOUT,
                    (true, _) => UNANNOUNCED_IDLE_TIMEOUT.min(shared.idle_timeout),
                    (_, true) => HALF_CLOSED_TIMEOUT.min(shared.idle_timeout),
                    _ => shared.idle_timeout,
                };
                let now = Instant::now();
                if relay.activity != seen {
                    (seen, silent_since) = (relay.activity, now);
                } else if now.duration_since(silent_since) >= timeout {
                    close(&mut relay).await;
                    return if drained_and_idle || half_closed {
                        Ok(())
                    } else {
                        Err(failure(FailureReason::IdleTimeout, "the connection was idle for too long"))
                    };
                }
                let interval =
                    if drained { DRAINED_IDLE_TIMEOUT } else { HALF_CLOSED_TIMEOUT.min(shared.idle_timeout) };
                next_check = now + interval;
            }
        }
    }
}

async fn close(relay: &mut Relay) {
    poll_fn(|cx| {
        relay.close(cx);
        Poll::Ready(())
    })
    .await;
}
