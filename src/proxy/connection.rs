//! The life of one connection: who is it, whom does it want, copy, and end without anybody noticing.
//!
//! # Flow
//! 1. The ClientHello is read for the application protocols that the client offers.
//! 2. The local handshake is finished with the protocol that the API server settles on for such an offer. That is
//!    remembered once the client has shown who it is; where it is not known yet, it is found out by a handshake with the API server *without* a client
//!    certificate. So the key never signs for anybody who has not shown the local certificate: a local user without it
//!    can neither use the identity nor keep a slow key device busy.
//! 3. A lease of the current generation is taken, and the API server is connected to as that certificate, with the
//!    same offer; should it settle on something else now, the connection is closed and the memory is forgotten.
//! 4. Octets are copied until both sides have ended, or the generation has.

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
use super::admission::Place;
use super::conversation::Conversation;
use super::generation::{Lease, Protocols, Stage};
use super::relay::{Endpoint, Relay};
use super::session::{HandshakeError, Session};
use super::socket::Socket;
use crate::telemetry::FailureReason;

/// Once a client knows that it is to use another connection, this much silence is enough to close the one it has.
const QUIET: Duration = Duration::from_secs(5);
/// HTTP/1.1 has no words for a client that asks for nothing, and it may be about to. client-go closes a connection that
/// was silent for 90 s by itself (net/http's IdleConnTimeout); whoever closes it earlier may do so at the very moment at
/// which a request is on its way, and a POST is lost then (RFC 9112, section 9.5).
const UNTOLD_QUIET: Duration = Duration::from_secs(100);
/// With one side at its end and nothing coming from the other, a connection is over.
const LINGER: Duration = Duration::from_secs(60);
/// A client of a unix socket that speaks HTTP/2 begins with these (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0";
/// The record of a fatal alert, no_application_protocol (RFC 7301, section 3.2; RFC 8446, section 6).
const NO_APPLICATION_PROTOCOL: [u8; 7] = [21, 3, 3, 0, 2, 2, 120];

struct Failure {
    reason: FailureReason,
    detail: String,
}

fn failure(reason: FailureReason, detail: impl ToString) -> Failure {
    Failure { reason, detail: detail.to_string() }
}

/// A client that has shown who it is, and what it offers to speak.
struct Client {
    endpoint: Endpoint,
    offer: Protocols,
    /// What it was promised; on a unix socket nothing is.
    promised: Option<Option<Vec<u8>>>,
}

/// Serves a connection from beginning to end.
pub(super) async fn serve(shared: &Shared, socket: Socket, place: Place) {
    let counters = &shared.counters;
    counters.accepted.fetch_add(1, Ordering::Relaxed);
    // In a box, so that a connection that is open costs no memory for having been opened.
    let opened = Box::pin(open(shared, socket, place)).await;
    let result = match opened {
        Ok((relay, lease)) => run(shared, relay, lease).await,
        Err(failure) => Err(failure),
    };
    if let Err(Failure { reason, detail }) = result {
        counters.failed(reason, &detail);
    }
}

async fn open(shared: &Shared, socket: Socket, mut place: Place) -> Result<(Box<Relay>, Lease), Failure> {
    let deadline = Instant::now() + shared.handshake_timeout;
    let client = tokio::select! {
        accepted = accept(shared, socket, deadline) => accepted?,
        () = place.evicted() => {
            return Err(failure(FailureReason::TooManyHandshakes, "too many local handshakes are under way"));
        }
    };
    drop(place);
    shared.counters.local_handshakes.fetch_add(1, Ordering::Relaxed);
    if client.endpoint.session.common().is_some_and(|tls| tls.handshake_kind() == Some(HandshakeKind::Resumed)) {
        shared.counters.local_resumptions.fetch_add(1, Ordering::Relaxed);
    }
    let deadline = Instant::now() + shared.server_timeout();
    let lease = timeout_at(deadline, shared.generations.lease()).await.map_err(no_certificate)?;
    let server = timeout_at(deadline, connect(shared, &lease, &client.offer)).await.map_err(no_server)?;
    let server = server.inspect_err(|failure| {
        if failure.reason == FailureReason::LocalHandshake {
            shared.forget_protocol(&client.offer);
        }
    })?;
    shared.counters.server_handshakes.fetch_add(1, Ordering::Relaxed);
    let settled = server.session.common().and_then(|tls| tls.alpn_protocol()).map(<[u8]>::to_vec);
    if client.promised.is_some_and(|promised| promised != settled) {
        shared.forget_protocol(&client.offer);
        return Err(failure(FailureReason::ProtocolChanged, "the API server settled on another protocol than before"));
    }
    let conversation = Conversation::new(settled.as_deref());
    Ok((Box::new(Relay::new(client.endpoint, server, conversation)), lease))
}

fn no_client(_: Elapsed) -> Failure {
    failure(FailureReason::LocalHandshakeTimeout, "a local client did not finish its handshake in time")
}

fn no_certificate(_: Elapsed) -> Failure {
    failure(FailureReason::NoCertificate, "there is no certificate to speak with")
}

fn no_server(_: Elapsed) -> Failure {
    failure(FailureReason::ServerHandshake, "no API server came through a handshake in time")
}

fn gone(error: io::Error) -> Failure {
    failure(FailureReason::LocalHandshake, error)
}

/// The local side. Who has not done their part by the deadline is told apart: the client, or an API server.
async fn accept(shared: &Shared, mut socket: Socket, deadline: Instant) -> Result<Client, Failure> {
    if matches!(socket, Socket::Unix(_)) {
        return timeout_at(deadline, accept_plain(socket)).await.map_err(no_client)?;
    }
    let (incoming, offer) = timeout_at(deadline, client_hello(&mut socket)).await.map_err(no_client)??;
    let known = shared.known_protocol(&offer);
    let is_new = known.is_none() && !offer.is_empty();
    let learned = match known {
        Some(known) => Ok(known),
        None => learn_protocol(shared, &offer, deadline).await,
    };
    if learned.as_ref().is_err_and(|failure| failure.reason == FailureReason::LocalHandshake) {
        let _ = timeout_at(deadline, socket.write_all(&NO_APPLICATION_PROTOCOL)).await;
    }
    let promised = learned?;
    let config = shared.local.settling_on(promised.as_deref());
    let broken = |error: rustls::Error| failure(FailureReason::LocalHandshake, error);
    let mut session = Session::server(config, incoming).map_err(broken)?;
    let handshake = timeout_at(deadline, session.handshake(&mut socket, None)).await.map_err(no_client)?;
    handshake.map_err(|error| match error {
        HandshakeError::Io(error) => gone(error),
        HandshakeError::Tls(rustls::Error::NoCertificatesPresented) => {
            failure(FailureReason::LocalCertificateMissing, "a local client without a certificate was refused")
        }
        HandshakeError::Tls(rustls::Error::InvalidCertificate(_)) => failure(
            FailureReason::LocalCertificateUnknown,
            "a local client with another certificate than this boot's was refused",
        ),
        HandshakeError::Tls(rustls::Error::AlertReceived(AlertDescription::UnknownCA)) => failure(
            FailureReason::LocalHandshake,
            "a local client does not know this boot's authority: it must read its kubeconfig anew",
        ),
        HandshakeError::Tls(error) => broken(error),
        HandshakeError::KeyBusy => failure(FailureReason::KeyUnavailable, "the key is busy"),
    })?;
    // Not of anybody else: with odd offers, they would push out the ones that matter.
    if is_new {
        shared.remember_protocol(&offer, promised.as_deref());
    }
    Ok(Client { endpoint: Endpoint { socket, session }, offer, promised: Some(promised) })
}

/// The octets of the ClientHello, and the application protocols in it.
async fn client_hello(socket: &mut Socket) -> Result<(Vec<u8>, Protocols), Failure> {
    let mut incoming = Vec::new();
    let mut acceptor = Acceptor::default();
    loop {
        let known = incoming.len();
        incoming.reserve(2048);
        if socket.read_buf(&mut incoming).await.map_err(gone)? == 0 {
            return Err(gone(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut new = &incoming[known..];
        while !new.is_empty() {
            acceptor.read_tls(&mut new).map_err(gone)?;
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

/// A unix socket's peer, which the kernel has vouched for, says what it speaks by speaking.
async fn accept_plain(mut socket: Socket) -> Result<Client, Failure> {
    let mut first = Vec::with_capacity(1024);
    loop {
        let read = socket.read_buf(&mut first).await;
        if read.map_err(|error| failure(FailureReason::LocalHandshake, error))? == 0 {
            return Err(failure(FailureReason::LocalHandshake, "a local client said nothing"));
        }
        let compared = first.len().min(HTTP2_PREFACE.len());
        let http2 = first[..compared] == HTTP2_PREFACE[..compared];
        if http2 && compared < HTTP2_PREFACE.len() {
            continue;
        }
        let offer = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let session = Session::plain(first);
        return Ok(Client { endpoint: Endpoint { socket, session }, offer, promised: None });
    }
}

/// What the API server settles on for this offer, asked without showing or using the identity.
async fn learn_protocol(shared: &Shared, offer: &Protocols, deadline: Instant) -> Result<Option<Vec<u8>>, Failure> {
    if offer.is_empty() {
        return Ok(None);
    }
    let upstream = timeout_at(deadline, shared.generations.upstream()).await.map_err(no_certificate)?;
    let mut config = upstream.tls().clone();
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols.clone_from(offer);
    config.client_auth_cert_resolver = std::sync::Arc::new(NoCertificate);
    let config = std::sync::Arc::new(config);
    let begin = |name| Session::client(config.clone(), name);
    let endpoint = timeout_at(deadline, connect_to(shared, &upstream, &begin)).await.map_err(no_server)??;
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

/// The API server's side, as the lease's certificate.
async fn connect(shared: &Shared, lease: &Lease, offer: &Protocols) -> Result<Endpoint, Failure> {
    let config = lease.epoch.client_config(offer);
    let begin = |name| Session::client(config.clone(), name);
    connect_to(shared, &lease.epoch.generation.upstream, &begin).await
}

type Begin<'a> = dyn Fn(ServerName<'static>) -> Result<Session, rustls::Error> + Sync + 'a;

/// Connects to an API server, and to another if that one fails.
async fn connect_to(shared: &Shared, upstream: &super::Upstream, begin: &Begin<'_>) -> Result<Endpoint, Failure> {
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
        // Whoever waits for all this may give up first: a server that has not come through by then has failed.
        let trial = upstream.trial(server, at);
        // One that says nothing must not use up the time of the others.
        let patience = match upstream.has_others(&tried) {
            true => shared.connect_timeout.min(shared.handshake_timeout / 2),
            false => shared.server_handshake_timeout(),
        };
        let failed = match tokio::time::timeout(patience, handshake).await {
            Ok(Ok(())) => {
                trial.passed();
                return Ok(Endpoint { socket, session });
            }
            Ok(Err(HandshakeError::KeyBusy)) => {
                trial.passed();
                return Err(failure(FailureReason::KeyUnavailable, "the key is busy with other handshakes"));
            }
            // The server has done nothing wrong, and the next one would need the same key.
            Ok(Err(HandshakeError::Tls(rustls::Error::Other(error)))) => {
                trial.passed();
                return Err(failure(FailureReason::KeyUnavailable, error));
            }
            // Nor would another server take what the client offers.
            Ok(Err(HandshakeError::Tls(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)))) => {
                trial.passed();
                let detail = "a local client offers no application protocol that the API server speaks";
                return Err(failure(FailureReason::LocalHandshake, detail));
            }
            Ok(Err(error)) => broken(&error),
            Err(_) => broken(&"no handshake in time"),
        };
        drop(trial);
        if !upstream.has_others(&tried) {
            return Err(failed);
        }
    }
}

/// Copies until the end.
async fn run(shared: &Shared, mut relay: Box<Relay>, lease: Lease) -> Result<(), Failure> {
    let mut stage = lease.epoch.stage();
    let mut drained = false;
    let (mut seen, mut silent_since) = (relay.activity, Instant::now());
    let mut next_look = silent_since + shared.idle_timeout;
    loop {
        let at = *stage.borrow_and_update();
        match at {
            Stage::Draining if !drained => {
                drained = true;
                relay.drain();
                next_look = next_look.min(Instant::now() + QUIET);
            }
            Stage::Current | Stage::Draining => {}
            Stage::Ended => {
                close(&mut relay).await;
                return if relay.is_idle() {
                    Ok(())
                } else {
                    Err(failure(
                        FailureReason::CutAtEnd,
                        "the drain time, or the certificate, ended with a request under way",
                    ))
                };
            }
        }
        tokio::select! {
            biased;
            result = poll_fn(|cx| relay.poll(cx, &shared.counters.volume)) => {
                // A client that has taken its leave may be gone before it is told that the server has, too.
                let over = relay.is_idle() && relay.client_has_closed();
                return if over { Ok(()) } else { result.map_err(|error| failure(FailureReason::Broken, error)) };
            }
            _ = stage.changed() => {}
            () = tokio::time::sleep_until(next_look) => {
                let (moved_over, half_closed) = (drained && relay.is_idle(), relay.is_half_closed());
                let patience = match (moved_over, half_closed) {
                    (true, gone) if gone || relay.is_told() => QUIET,
                    (true, _) => UNTOLD_QUIET.min(shared.idle_timeout),
                    (_, true) => LINGER.min(shared.idle_timeout),
                    _ => shared.idle_timeout,
                };
                let now = Instant::now();
                if relay.activity != seen {
                    (seen, silent_since) = (relay.activity, now);
                } else if now.duration_since(silent_since) >= patience {
                    close(&mut relay).await;
                    return if moved_over || half_closed {
                        Ok(())
                    } else {
                        Err(failure(FailureReason::IdleTimeout, "nothing came for long"))
                    };
                }
                next_look = now + if drained { QUIET } else { LINGER.min(shared.idle_timeout) };
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
