//! Epochs: the certificate that new connections use, and earlier certificates that still have open connections.

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

/// A certificate for connections to the API servers, and where those servers are. A new epoch begins when either
/// changes.
#[derive(Clone)]
pub struct Epoch {
    /// The leaf's serial number, for logs and metrics. Not unique: another CA may have used the same one.
    pub serial: String,
    /// The leaf's notAfter. Every connection is closed before it.
    pub not_after: UnixTime,
    /// The chain, and a handle to the key in its backend.
    pub certificate: Arc<CertifiedKey>,
    /// The API servers, and how to verify them.
    pub upstream: Arc<Upstream>,
}

impl Epoch {
    /// An epoch with this credential. A handshake fails if the backend does not sign within `signing_deadline`.
    ///
    /// # Errors
    /// If the credential's backend is not configured.
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

    /// Whether this epoch uses the same leaf as `credential`.
    pub fn is_of(&self, credential: &Credential) -> bool {
        self.leaf().is_some_and(|leaf| credential.chain().first().is_some_and(|held| held == leaf.as_ref()))
    }

    fn leaf(&self) -> Option<&CertificateDer<'static>> {
        self.certificate.cert.first()
    }
}

/// The stage of an epoch, as its connections see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// New connections use it.
    Current,
    /// Another epoch has replaced it; clients are told to reconnect.
    Draining,
    /// All connections are closed, even those with outstanding requests.
    Closed,
}

/// The application protocols that a client offers, in its order (RFC 7301).
pub(super) type Protocols = Vec<Vec<u8>>;
/// The number of offers with a cached TLS configuration. Clients of an API server send two or three different ones.
const CACHED_OFFERS: usize = 16;

/// An epoch that connections may use.
pub(super) struct ActiveEpoch {
    pub(super) epoch: Epoch,
    stage: watch::Sender<Stage>,
    open: watch::Sender<u64>,
    /// One TLS configuration per ALPN offer.
    configurations: Mutex<Vec<(Protocols, Arc<ClientConfig>)>>,
}

impl ActiveEpoch {
    /// The TLS configuration of this epoch. Resumption is disabled: a resumed session would keep the certificate of
    /// its first handshake.
    pub(super) fn client_config(&self, offer: &Protocols) -> Arc<ClientConfig> {
        let mut known = lock(&self.configurations);
        if let Some((_, config)) = known.iter().find(|(protocols, _)| protocols == offer) {
            return Arc::clone(config);
        }
        let mut config = self.epoch.upstream.tls().clone();
        config.client_auth_cert_resolver = Arc::new(HeldCertificate(Arc::clone(&self.epoch.certificate)));
        config.resumption = Resumption::disabled();
        config.alpn_protocols.clone_from(offer);
        let config = Arc::new(config);
        if known.len() < CACHED_OFFERS {
            known.push((offer.clone(), Arc::clone(&config)));
        }
        config
    }

    fn is(&self, epoch: &Epoch) -> bool {
        self.epoch.leaf() == epoch.leaf() && Arc::ptr_eq(&self.epoch.upstream, &epoch.upstream)
    }

    fn has_closed(&self) -> bool {
        *self.stage.borrow() == Stage::Closed
    }

    pub(super) fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }
}

/// Held by each connection of an epoch. While there is one, the epoch's key is needed.
pub(super) struct Lease {
    pub(super) active: Arc<ActiveEpoch>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.active.open.send_modify(|open| *open -= 1);
    }
}

#[derive(Default)]
struct Inner {
    current: Option<Arc<ActiveEpoch>>,
    earlier: Vec<Arc<ActiveEpoch>>,
}

/// The current epoch, and the earlier ones with open connections.
pub(super) struct Epochs {
    inner: Mutex<Inner>,
    /// Notified at each swap.
    swapped: watch::Sender<()>,
    drain: Duration,
}

impl Epochs {
    pub(super) fn new(drain: Duration) -> Self {
        Self { inner: Mutex::default(), swapped: watch::Sender::new(()), drain }
    }

    /// Makes this the current epoch, and drains the previous one. Returns false if the current epoch is the same and
    /// has not expired. An expired epoch stays expired, even if the clock is set back.
    pub(super) fn swap(&self, epoch: Epoch) -> bool {
        let mut inner = lock(&self.inner);
        if inner.current.as_ref().is_some_and(|current| current.is(&epoch) && !current.has_closed()) {
            return false;
        }
        let close_at = close_time(&epoch);
        let active = Arc::new(ActiveEpoch {
            epoch,
            stage: watch::Sender::new(Stage::Current),
            open: watch::Sender::new(0),
            configurations: Mutex::default(),
        });
        tokio::spawn(close_before_expiry(Arc::clone(&active), close_at, self.drain));
        if let Some(before) = inner.current.replace(active) {
            before.stage.send_if_modified(|stage| {
                let advanced = *stage < Stage::Draining;
                *stage = (*stage).max(Stage::Draining);
                advanced
            });
            inner.earlier.push(before);
        }
        inner.earlier.retain(|active| *active.open.borrow() > 0);
        drop(inner);
        self.swapped.send_replace(());
        true
    }

    /// Returns a lease of the current epoch, waiting until there is one that has not expired.
    pub(super) async fn lease(&self) -> Lease {
        let mut swapped = self.swapped.subscribe();
        loop {
            if let Some(lease) = self.lease_now() {
                return lease;
            }
            // The sender lives as long as `self`.
            let _ = swapped.changed().await;
        }
    }

    fn lease_now(&self) -> Option<Lease> {
        // Under the lock, so that an epoch gets no new connections once it has been replaced.
        let inner = lock(&self.inner);
        let active = inner.current.as_ref().filter(|active| !active.has_closed())?;
        active.open.send_modify(|open| *open += 1);
        Some(Lease { active: Arc::clone(active) })
    }

    /// The API servers of the current epoch, waiting for the first one.
    pub(super) async fn upstream(&self) -> Arc<Upstream> {
        let mut swapped = self.swapped.subscribe();
        loop {
            if let Some(current) = &lock(&self.inner).current {
                return Arc::clone(&current.epoch.upstream);
            }
            let _ = swapped.changed().await;
        }
    }

    /// Returns once this epoch is not current and has no open connections.
    pub(super) async fn wait_until_unused(&self, serial: &str) {
        let mut swapped = self.swapped.subscribe();
        loop {
            let (current, in_use) = {
                let inner = lock(&self.inner);
                let is_it = |active: &&Arc<ActiveEpoch>| active.epoch.serial == serial;
                let in_use = inner.earlier.iter().filter(is_it).find(|active| *active.open.borrow() > 0);
                (inner.current.as_ref().is_some_and(|current| is_it(&current)), in_use.map(Arc::clone))
            };
            match in_use {
                _ if current => {
                    let _ = swapped.changed().await;
                }
                None => return,
                Some(active) => {
                    let _ = active.open.subscribe().wait_for(|open| *open == 0).await;
                }
            }
        }
    }

    /// Returns once all open connections belong to the current epoch.
    pub(super) async fn wait_until_only_current(&self) {
        loop {
            let earlier = lock(&self.inner).earlier.iter().find(|active| *active.open.borrow() > 0).map(Arc::clone);
            let Some(earlier) = earlier else { return };
            let _ = earlier.open.subscribe().wait_for(|open| *open == 0).await;
        }
    }

    /// The current epoch, unless it has expired.
    pub(super) fn current(&self) -> Option<Epoch> {
        let inner = lock(&self.inner);
        inner.current.as_ref().filter(|current| !current.has_closed()).map(|current| current.epoch.clone())
    }

    pub(super) fn serial(&self) -> Option<String> {
        lock(&self.inner).current.as_ref().map(|current| current.epoch.serial.clone())
    }

    /// Open connections by serial number.
    pub(super) fn open_connections(&self) -> BTreeMap<String, u64> {
        let inner = lock(&self.inner);
        let mut open = BTreeMap::new();
        for active in inner.earlier.iter().chain(&inner.current) {
            let count = *active.open.borrow();
            if count > 0 {
                *open.entry(active.epoch.serial.clone()).or_default() += count;
            }
        }
        open
    }

    /// Closes every connection.
    pub(super) fn close_all(&self) {
        let inner = lock(&self.inner);
        for active in inner.earlier.iter().chain(&inner.current) {
            active.stage.send_replace(Stage::Closed);
        }
    }
}

/// When to close the epoch's last connections: shortly before the API server would reject their requests.
fn close_time(epoch: &Epoch) -> UnixTime {
    let life = epoch.not_after.since(now());
    epoch.not_after - (life / 10).min(Duration::from_secs(10))
}

/// Closes an epoch when its certificate is about to expire, or when the drain time is over.
async fn close_before_expiry(active: Arc<ActiveEpoch>, mut close_at: UnixTime, drain: Duration) {
    let (clock, mut stage) = (SystemClock::new(), active.stage());
    loop {
        match *stage.borrow_and_update() {
            Stage::Current => {}
            Stage::Draining => close_at = close_at.min(now() + drain),
            Stage::Closed => return,
        }
        tokio::select! {
            _ = stage.changed() => {}
            () = wait_until(&clock, close_at) => {
                active.stage.send_replace(Stage::Closed);
                return;
            }
        }
    }
}

async fn wait_until(clock: &dyn Clock, time: UnixTime) {
    while now() < time {
        clock.sleep_until(Some(time)).await;
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

    fn epoch(not_after: UnixTime, upstream: &Arc<Upstream>) -> Epoch {
        let key = rcgen::KeyPair::generate().expect("a key");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).expect("a key");
        let leaf = CertificateDer::from(b"A1".to_vec());
        let certificate = Arc::new(CertifiedKey::new(vec![leaf], key));
        Epoch { serial: "A1".to_owned(), not_after, certificate, upstream: Arc::clone(upstream) }
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
    async fn a_certificate_that_expired_by_a_wrong_clock_is_used_again() {
        let (epochs, upstream) = (Epochs::new(Duration::from_secs(60)), upstream());
        // The certificate looks expired while the clock is ahead.
        assert!(epochs.swap(epoch(now() - Duration::from_secs(10), &upstream)));
        while epochs.current().is_some() {
            tokio::task::yield_now().await;
        }
        let good = epoch(now() + Duration::from_secs(3600), &upstream);
        assert!(epochs.swap(good.clone()));
        assert!(epochs.lease_now().is_some());
        assert!(!epochs.swap(good), "it is the current one");
    }

    #[tokio::test]
    async fn a_certificate_of_two_epochs_is_in_use_until_both_have_no_connections() {
        let epochs = Arc::new(Epochs::new(Duration::from_secs(60)));
        let mut leases = Vec::new();
        for _ in 0..2 {
            let good = epoch(now() + Duration::from_secs(3600), &upstream());
            assert!(epochs.swap(good));
            leases.push(epochs.lease_now().expect("it is good"));
        }
        assert_eq!(*leases[0].active.stage.borrow(), Stage::Draining);
        let next = epoch(now() + Duration::from_secs(3600), &upstream());
        epochs.swap(Epoch { serial: "B2".to_owned(), ..next });
        while let Some(lease) = leases.pop() {
            let waiting = tokio::time::timeout(Duration::from_millis(10), epochs.wait_until_unused("A1")).await;
            assert!(waiting.is_err());
            drop(lease);
        }
        epochs.wait_until_unused("A1").await;
    }
}
