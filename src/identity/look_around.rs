//! What changes without an event of its own, and is therefore looked at now and then.

use std::time::Duration;

use pintle_agent_core::issued::Leaf;
use pintle_agent_core::rotation::{ApiFailure, Authority};
use pintle_agent_core::{Credential, Event, Phase};
use pintle_plugins_api::BackendErrorKind;

use super::Agent;
use super::pair::{leaf_key_of, write_pair};
use super::recovery::Recovery;

/// Whether the API server still accepts the certificate in use is asked this often. A rotation would come too late to
/// notice that the authority was replaced (case C07).
const PROBE_INTERVAL: Duration = Duration::from_secs(600);

/// A device that did not answer is asked this often whether it does again, while something waits for it: a rotation may
/// otherwise stand still for ten minutes after a cable was plugged in again.
const DEVICE_INTERVAL: Duration = Duration::from_secs(30);
/// How long it may take to answer that.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);

/// When the API server was last asked whether it accepts the certificate in use; not yet by this process at first, so
/// that a restart looks soon.
#[derive(Default)]
pub(super) struct Probe {
    last: Option<Duration>,
    device: Option<Duration>,
}

impl Probe {
    /// It was asked just now.
    pub(super) fn done(&mut self, now: Duration) {
        self.last = Some(now);
    }

    fn is_due(&self, now: Duration) -> bool {
        self.last.is_none_or(|last| now - last >= PROBE_INTERVAL)
    }
}

impl Agent {
    /// Whether the pair is still on disk, the API server still accepts the certificate in use, and its key is where it
    /// should be.
    pub(super) async fn observe_environment(&mut self) -> Event {
        if self.bootstrap_changed() {
            return Event::LocalChange;
        }
        let _ = self.update_proxy().await;
        if self.device_is_back().await {
            return Event::BackendFound;
        }
        let Some(held) = self.state.held().cloned() else {
            return Event::Woke;
        };
        if self.state.held_key_is_lost() {
            return if self.held_key_is_back().await { Event::HeldKeyFound } else { Event::Woke };
        }
        // Retiring can take long, where a device refuses to destroy a key.
        if !matches!(self.state.phase(), Phase::Holding | Phase::Retiring { .. })
            || self.state.held_is_unproven()
            || self.state.authority(self.now()) != Authority::Held
        {
            return Event::Woke;
        }
        if let Some(event) = self.check_pair(&held).await {
            return event;
        }
        if !self.probe.is_due(self.ports.clock.monotonic()) {
            return Event::Woke;
        }
        self.probe.done(self.ports.clock.monotonic());
        let Ok(api) = self.api(Authority::Held).await else {
            return Event::Woke;
        };
        match api.who_am_i().await {
            Ok(_) => Event::Woke,
            Err(ApiFailure::Unauthorized(_)) => Event::HeldRefused { key_lost: false },
            Err(_) if self.held_key_is_lost().await => Event::HeldRefused { key_lost: true },
            Err(_) => Event::Woke,
        }
    }

    /// Whether the current pair is the held credential's. One that is gone or torn is written again; one that something
    /// else wrote is taken over, if it can be used (case C46).
    async fn check_pair(&self, held: &Credential) -> Option<Event> {
        let pair = match self.pairs.read_current() {
            Ok(pair) => leaf_key_of(&pair).ok().zip(Leaf::of(&pair).ok()),
            Err(_) => None,
        };
        let Some((public_key, leaf)) = pair else {
            // Somebody removed or tore the pair, or the file system it was on is another (case C10). What cannot be
            // written is tried again at the next look.
            let _ = write_pair(&self.ports, &self.pairs, &self.telemetry, held).await;
            return None;
        };
        if leaf.fingerprint == *held.fingerprint() {
            return None;
        }
        let found = self.pairs.pairs().into_iter().next()?.ok()?;
        let recovery = Recovery {
            config: &self.config,
            policy: &self.policy,
            template: &self.template,
            ports: &self.ports,
            telemetry: &self.telemetry,
            pairs: &self.pairs,
        };
        let adopted = recovery.adopt(&found, &public_key, &self.state).await.ok()?;
        recovery.adopted(&found, &adopted);
        Some(Event::PairReplaced(adopted))
    }

    /// Whether something waits for a device that did not answer, and it answers again.
    async fn device_is_back(&mut self) -> bool {
        let down: Vec<_> =
            self.ports.keyring.health().filter(|(_, error)| error.is_some()).map(|(name, _)| name.to_owned()).collect();
        let asked = self.probe.device.is_some_and(|last| self.ports.clock.monotonic() - last < DEVICE_INTERVAL);
        if self.state.back_off().is_none() || down.is_empty() || asked {
            return false;
        }
        self.probe.device = Some(self.ports.clock.monotonic());
        for name in down {
            let Ok(backend) = self.ports.keyring.backend(&name) else { continue };
            if backend.call(DEVICE_DEADLINE, |backend| backend.list()).await.is_ok() {
                return true;
            }
        }
        false
    }

    /// Whether the backend says that the key in use is gone for good (case C26). A signature shows it, where the public
    /// half alone may still be on record.
    pub(super) async fn held_key_is_lost(&self) -> bool {
        let Some(held) = self.state.held() else {
            return false;
        };
        let signed = self.ports.keyring.try_key(held.key()).await;
        signed.is_err_and(|error| matches!(error.kind, BackendErrorKind::KeyLost | BackendErrorKind::NotFound))
    }

    async fn held_key_is_back(&self) -> bool {
        match self.state.held() {
            Some(held) => self.ports.keyring.try_key(held.key()).await.is_ok(),
            None => false,
        }
    }
}
