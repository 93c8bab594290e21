//! Generations of the identity: the certificate that new connections speak as, and the older ones that still have some.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pintle_agent_core::{Credential, UnixTime};
use pintle_plugins_api::BackendError;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use super::upstream::Upstream;
use crate::keys::{HeldCertificate, Keyring, certified_key_within};
use crate::world::clock::{Clock, SystemClock, now};

/// A certificate that connections to the API server speak as, and where that server is.
#[derive(Clone)]
pub struct Generation {
    /// The leaf's serial number, by which people know it; another authority may have given the same one.
    pub serial: String,
    /// The leaf's notAfter: no connection outlives it.
    pub not_after: UnixTime,
    /// The chain, and the key wherever it is.
    pub certificate: Arc<CertifiedKey>,
    /// The API servers.
    pub upstream: Arc<Upstream>,
}

impl Generation {
    /// The generation of this credential. A signature that the key's backend does not give within `signing_deadline`
    /// fails its handshake.
    ///
    /// # Errors
    /// If no such backend is configured.
    pub fn new(
        credential: &Credential,
        keyring: &Keyring,
        signing_deadline: Duration,
        upstream: Arc<Upstream>,
    ) -> Result<Self, BackendError> {
        Ok(Self {
            serial: credential.serial().to_owned(),
            not_after: credential.not_after(),
            certificate: certified_key_within(credential, keyring, signing_deadline)?,
            upstream,
        })
    }

    /// Whether it speaks as this credential.
    pub fn is_of(&self, credential: &Credential) -> bool {
        self.leaf().is_some_and(|leaf| credential.chain().first().is_some_and(|held| held == leaf.as_ref()))
    }

    fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.certificate.cert.first()
    }
}

/// Where a generation is in its life, as its connections see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// New connections speak as it.
    Current,
    /// Another has taken its place: clients are told to move over.
    Draining,
    /// It is over, whatever is under way.
    Ended,
}

/// The application protocols that a client offers, in its order (RFC 7301).
pub(super) type Protocols = Vec<Vec<u8>>;
/// How many different offers are remembered: clients of an API server make two or three.
const REMEMBERED_OFFERS: usize = 16;

/// A generation at work.
pub(super) struct Epoch {
    pub(super) generation: Generation,
    stage: watch::Sender<Stage>,
    open: watch::Sender<u64>,
    /// One TLS configuration for each offer of application protocols.
    configurations: Mutex<Vec<(Protocols, Arc<ClientConfig>)>>,
}

impl Epoch {
    /// How to speak TLS as this generation. No session is ever resumed: it would speak as the certificate of its first
    /// handshake.
    pub(super) fn client_config(&self, offer: &Protocols) -> Arc<ClientConfig> {
        let mut known = lock(&self.configurations);
        if let Some((_, config)) = known.iter().find(|(protocols, _)| protocols == offer) {
            return Arc::clone(config);
        }
        let mut config = self.generation.upstream.tls().clone();
        config.client_auth_cert_resolver = Arc::new(HeldCertificate(Arc::clone(&self.generation.certificate)));
        config.resumption = Resumption::disabled();
        config.alpn_protocols.clone_from(offer);
        let config = Arc::new(config);
        if known.len() < REMEMBERED_OFFERS {
            known.push((offer.clone(), Arc::clone(&config)));
        }
        config
    }

    /// The same certificate, towards the same API servers.
    fn is(&self, generation: &Generation) -> bool {
        self.generation.leaf() == generation.leaf() && Arc::ptr_eq(&self.generation.upstream, &generation.upstream)
    }

    fn has_ended(&self) -> bool {
        *self.stage.borrow() == Stage::Ended
    }

    pub(super) fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }
}

/// A connection's share in a generation: while there is one, the generation's key is needed.
pub(super) struct Lease {
    pub(super) epoch: Arc<Epoch>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.epoch.open.send_modify(|open| *open -= 1);
    }
}

#[derive(Default)]
struct Inner {
    current: Option<Arc<Epoch>>,
    earlier: Vec<Arc<Epoch>>,
}

/// All generations that matter.
pub(super) struct Generations {
    inner: Mutex<Inner>,
    /// Told at each swap.
    swapped: watch::Sender<()>,
    drain: Duration,
}

impl Generations {
    pub(super) fn new(drain: Duration) -> Self {
        Self { inner: Mutex::default(), swapped: watch::Sender::new(()), drain }
    }

    /// Makes this the generation of new connections; those of the one before are moved over. False if it already is, and
    /// has not ended: it does so for good, even where the clock that said so is set back.
    pub(super) fn swap(&self, generation: Generation) -> bool {
        let mut inner = lock(&self.inner);
        if inner.current.as_ref().is_some_and(|current| current.is(&generation) && !current.has_ended()) {
            return false;
        }
        let end = last_moment(&generation);
        let epoch = Arc::new(Epoch {
            generation,
            stage: watch::Sender::new(Stage::Current),
            open: watch::Sender::new(0),
            configurations: Mutex::default(),
        });
        tokio::spawn(keep_time(Arc::clone(&epoch), end, self.drain));
        if let Some(before) = inner.current.replace(epoch) {
            before.stage.send_if_modified(|stage| {
                let advanced = *stage < Stage::Draining;
                *stage = (*stage).max(Stage::Draining);
                advanced
            });
            inner.earlier.push(before);
        }
        inner.earlier.retain(|epoch| *epoch.open.borrow() > 0);
        drop(inner);
        self.swapped.send_replace(());
        true
    }

    /// A share in the current generation, once there is one that has not ended.
    pub(super) async fn lease(&self) -> Lease {
        let mut swapped = self.swapped.subscribe();
        loop {
            if let Some(lease) = self.lease_now() {
                return lease;
            }
            // The sender lives as long as we do.
            let _ = swapped.changed().await;
        }
    }

    fn lease_now(&self) -> Option<Lease> {
        // Under the lock, so that a generation that was swapped out gets no more connections.
        let inner = lock(&self.inner);
        let epoch = inner.current.as_ref().filter(|epoch| !epoch.has_ended())?;
        epoch.open.send_modify(|open| *open += 1);
        Some(Lease { epoch: Arc::clone(epoch) })
    }

    /// Where the API servers are, as of now.
    pub(super) async fn upstream(&self) -> Arc<Upstream> {
        let mut swapped = self.swapped.subscribe();
        loop {
            if let Some(current) = &lock(&self.inner).current {
                return Arc::clone(&current.generation.upstream);
            }
            let _ = swapped.changed().await;
        }
    }

    /// Returns once no connection speaks as this generation, and none will.
    pub(super) async fn wait_until_unused(&self, serial: &str) {
        let mut swapped = self.swapped.subscribe();
        loop {
            let (current, in_use) = {
                let inner = lock(&self.inner);
                let is_it = |epoch: &&Arc<Epoch>| epoch.generation.serial == serial;
                let in_use = inner.earlier.iter().filter(is_it).find(|epoch| *epoch.open.borrow() > 0);
                (inner.current.as_ref().is_some_and(|current| is_it(&current)), in_use.map(Arc::clone))
            };
            match in_use {
                _ if current => {
                    let _ = swapped.changed().await;
                }
                None => return,
                Some(epoch) => {
                    let _ = epoch.open.subscribe().wait_for(|open| *open == 0).await;
                }
            }
        }
    }

    /// Returns once no connection speaks as an earlier generation.
    pub(super) async fn wait_until_only_current(&self) {
        loop {
            let earlier = lock(&self.inner).earlier.iter().find(|epoch| *epoch.open.borrow() > 0).map(Arc::clone);
            let Some(earlier) = earlier else { return };
            let _ = earlier.open.subscribe().wait_for(|open| *open == 0).await;
        }
    }

    /// The current generation, unless it has ended.
    pub(super) fn current(&self) -> Option<Generation> {
        let inner = lock(&self.inner);
        inner.current.as_ref().filter(|current| !current.has_ended()).map(|current| current.generation.clone())
    }

    /// The serial number of the current generation.
    pub(super) fn serial(&self) -> Option<String> {
        lock(&self.inner).current.as_ref().map(|current| current.generation.serial.clone())
    }

    /// Open connections by serial number.
    pub(super) fn open_connections(&self) -> BTreeMap<String, u64> {
        let inner = lock(&self.inner);
        let mut open = BTreeMap::new();
        for epoch in inner.earlier.iter().chain(&inner.current) {
            let count = *epoch.open.borrow();
            if count > 0 {
                *open.entry(epoch.generation.serial.clone()).or_default() += count;
            }
        }
        open
    }

    /// Ends every connection.
    pub(super) fn end(&self) {
        let inner = lock(&self.inner);
        for epoch in inner.earlier.iter().chain(&inner.current) {
            epoch.stage.send_replace(Stage::Ended);
        }
    }
}

/// When the last connections of a generation are closed: shortly before the API server would refuse their requests.
fn last_moment(generation: &Generation) -> UnixTime {
    let life = generation.not_after.since(now());
    generation.not_after - (life / 10).min(Duration::from_secs(10))
}

/// Ends a generation with its certificate, or with the time to drain after another took its place.
async fn keep_time(epoch: Arc<Epoch>, mut end: UnixTime, drain: Duration) {
    let (clock, mut stage) = (SystemClock::new(), epoch.stage());
    loop {
        match *stage.borrow_and_update() {
            Stage::Current => {}
            Stage::Draining => end = end.min(now() + drain),
            Stage::Ended => return,
        }
        tokio::select! {
            _ = stage.changed() => {}
            () = wait_until(&clock, end) => {
                epoch.stage.send_replace(Stage::Ended);
                return;
            }
        }
    }
}

async fn wait_until(clock: &dyn Clock, end: UnixTime) {
    while now() < end {
        clock.sleep_until(Some(end)).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::PrivateKeyDer;
    use rustls::{ClientConfig, RootCertStore};

    use super::super::upstream::Endpoints;
    use super::*;

    fn generation(not_after: UnixTime, upstream: &Arc<Upstream>) -> Generation {
        let key = rcgen::KeyPair::generate().expect("a key");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).expect("a key");
        let leaf = CertificateDer::from(b"A1".to_vec());
        let certificate = Arc::new(CertifiedKey::new(vec![leaf], key));
        Generation { serial: "A1".to_owned(), not_after, certificate, upstream: Arc::clone(upstream) }
    }

    fn upstream() -> Arc<Upstream> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let tls = tls.expect("versions").with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        let servers = ["https://192.0.2.1:6443".parse().expect("a URL")];
        let endpoints = Endpoints { servers: &servers, tls_server_name: None, proxy_for: &|_| None };
        Arc::new(Upstream::new(&endpoints, tls).expect("an upstream"))
    }

    #[tokio::test]
    async fn a_certificate_that_had_ended_by_a_wrong_clock_serves_again() {
        let (generations, upstream) = (Generations::new(Duration::from_secs(60)), upstream());
        // As it looks while the clock is ahead.
        assert!(generations.swap(generation(now() - Duration::from_secs(10), &upstream)));
        while generations.current().is_some() {
            tokio::task::yield_now().await;
        }
        let good = generation(now() + Duration::from_secs(3600), &upstream);
        assert!(generations.swap(good.clone()));
        assert!(generations.lease_now().is_some());
        assert!(!generations.swap(good), "it is the current one");
    }

    #[tokio::test]
    async fn the_same_certificate_towards_another_api_server_is_unused_when_all_its_connections_have_ended() {
        let generations = Arc::new(Generations::new(Duration::from_secs(60)));
        let mut leases = Vec::new();
        for _ in 0..2 {
            let good = generation(now() + Duration::from_secs(3600), &upstream());
            assert!(generations.swap(good));
            leases.push(generations.lease_now().expect("it is good"));
        }
        assert_eq!(*leases[0].epoch.stage.borrow(), Stage::Draining);
        let next = generation(now() + Duration::from_secs(3600), &upstream());
        generations.swap(Generation { serial: "B2".to_owned(), ..next });
        while let Some(lease) = leases.pop() {
            let waiting = tokio::time::timeout(Duration::from_millis(10), generations.wait_until_unused("A1")).await;
            assert!(waiting.is_err());
            drop(lease);
        }
        generations.wait_until_unused("A1").await;
    }
}
