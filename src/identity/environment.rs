//! What changes without an event of its own, and is therefore looked at now and then.

use std::io;
use std::time::Duration;

use pintle_agent_core::issued::Leaf;
use pintle_agent_core::rotation::{ApiFailure, Authority, PublishError};
use pintle_agent_core::{Credential, Event, Phase};

use super::Agent;
use super::pair::{check_or_restore_key, is_lost, leaf_key_of, read_hint, restore_key, write_hint, write_pair};
use super::recovery::NotAdopted;
use crate::config::BackendConfiguration;
use crate::consumers::kubeconfig::Kubeconfig;
use crate::telemetry;

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
    /// What is wrong with the current pair.
    pair: Option<Trouble>,
    /// What is wrong with the kubeconfig.
    kubeconfig: Option<Trouble>,
}

/// Something on disk that others need, and that the agent could not put right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trouble {
    /// The file.
    pub(super) path: String,
    /// What is wrong with it.
    pub(super) reason: String,
    /// What a person can do about it.
    pub(super) hint: String,
}

impl Probe {
    /// It was asked just now.
    pub(super) fn done(&mut self, now: Duration) {
        self.last = Some(now);
    }

    /// What others need and do not have.
    pub(super) fn trouble(&self) -> Option<&Trouble> {
        self.pair.as_ref().or(self.kubeconfig.as_ref())
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
        let Some(_) = self.state.held() else {
            return Event::Woke;
        };
        if let Some(event) = self.check_files().await {
            return event;
        }
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

    /// Whether what others read is there: the current pair, its key, and the kubeconfig that names it. What is missing is
    /// written again; what cannot be is told, and looked at again.
    pub(super) async fn check_files(&mut self) -> Option<Event> {
        let held = self.state.held().cloned()?;
        // While another pair is published, that is the current one, or will be.
        let is_settled = !matches!(self.state.phase(), Phase::Publishing { .. } | Phase::Restoring { .. });
        let mut event = None;
        if is_settled && self.state.held_is_good(self.now()) && self.unfinished.is_none() {
            match self.check_pair(&held).await {
                Ok(replaced) => {
                    event = replaced;
                    self.note_trouble(|probe| &mut probe.pair, None);
                }
                Err(trouble) => self.note_trouble(|probe| &mut probe.pair, Some(trouble)),
            }
        }
        let unwritten = self.ensure_kubeconfig().err().map(|reason| Trouble {
            path: self.config.kubeconfig.display().to_string(),
            reason,
            hint: "make room, or make its directory writable".to_owned(),
        });
        self.note_trouble(|probe| &mut probe.kubeconfig, unwritten);
        event
    }

    /// Notes what is wrong, and tells it once.
    fn note_trouble(&mut self, of: impl Fn(&mut Probe) -> &mut Option<Trouble>, found: Option<Trouble>) {
        let known = of(&mut self.probe);
        if *known != found {
            known.clone_from(&found);
            if let Some(Trouble { path, reason, hint: instead }) = found {
                self.telemetry.emit(telemetry::Event::DiskUnusable { path, reason, instead });
            }
        }
    }

    /// Whether the current pair is the held credential's. One that is gone or torn is written again; one that something
    /// else wrote is taken over, if it can be used (case C46).
    async fn check_pair(&self, held: &Credential) -> Result<Option<Event>, Trouble> {
        let current = self.pairs.current();
        let trouble = |reason: String, hint: String| Trouble { path: current.display().to_string(), reason, hint };
        let found = match self.pairs.pairs().into_iter().next() {
            Some(Ok(pair)) if self.pairs.is_current(&pair.path) => Some(pair),
            Some(Err(unreadable))
                if unreadable.error.kind() == io::ErrorKind::PermissionDenied
                    && self.pairs.is_current(&unreadable.path) =>
            {
                // Others may well read it (case C38).
                let hint = read_hint(&self.pairs, &unreadable.path, &unreadable.error);
                return Err(trouble(unreadable.error.to_string(), hint));
            }
            _ => None,
        };
        let known = found.and_then(|pair| {
            let (public_key, leaf) = (leaf_key_of(&pair.content).ok()?, Leaf::of(&pair.content).ok()?);
            Some((pair, public_key, leaf))
        });
        let Some((pair, public_key, leaf)) = known else {
            // Somebody removed or tore the pair, or the file system it was on is another (case C10).
            if self.pairs.obstacle().is_some() {
                let reason = "it is neither a link nor a regular file, and may belong to another program".to_owned();
                return Err(trouble(reason, write_hint(&self.pairs)));
            }
            return match write_pair(&self.ports, &self.pairs, &self.telemetry, held).await {
                Ok(()) => Ok(None),
                Err(PublishError::Disk { detail, hint }) => Err(trouble(detail, hint)),
                Err(PublishError::Backend(error)) => {
                    Err(trouble(error.to_string(), error.hint.clone().unwrap_or_default()))
                }
            };
        };
        if leaf.fingerprint == *held.fingerprint() {
            let backend = self.config.node.backends.get(&held.key().backend);
            if matches!(backend, Some(BackendConfiguration::File { .. })) {
                // A key file that somebody deleted is missed before it is needed (case C52).
                let _ = check_or_restore_key(&self.ports.keyring, &self.pairs, &self.telemetry, held).await;
            }
            return Ok(None);
        }
        let recovery = self.recovery();
        match recovery.adopt(&pair, &public_key, &self.state).await {
            Ok(adopted) => {
                recovery.adopted(&pair, &adopted);
                Ok(Some(Event::PairReplaced(adopted)))
            }
            Err(NotAdopted::BackendMissing(missing)) => {
                let missing = missing.keeps(&pair.path);
                Err(trouble(missing.reason, missing.hint))
            }
            Err(NotAdopted::Unusable(reason)) => Err(trouble(
                format!("something else wrote it, and it cannot be used: {reason}"),
                "find out what writes there; pintle rotate puts a new pair in its place".to_owned(),
            )),
        }
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

    /// Whether the backend says that the key in use is gone for good (case C26), and no pair on disk holds it either (case
    /// C52). A signature shows it, where the public half alone may still be on record.
    pub(super) async fn held_key_is_lost(&self) -> bool {
        let Some(held) = self.state.held() else {
            return false;
        };
        let signed = self.ports.keyring.try_key(held.key()).await;
        signed.is_err_and(|error| is_lost(&error)) && !self.restore_key(held).await
    }

    async fn held_key_is_back(&self) -> bool {
        match self.state.held() {
            Some(held) => self.ports.keyring.try_key(held.key()).await.is_ok() || self.restore_key(held).await,
            None => false,
        }
    }

    /// Writes the kubelet's kubeconfig where there is none.
    pub(super) fn ensure_kubeconfig(&self) -> Result<(), String> {
        let path = &self.config.kubeconfig;
        // What cannot be seen may well be there.
        let missing = self.ports.files.metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
        if !missing || !self.config.owns_kubeconfig {
            return Ok(());
        }
        // Without any of them, the API server's address is not known, and nothing could be written.
        let kept = self.config.cluster_kubeconfig();
        let Some(cluster) =
            self.config.bootstrap_kubeconfig.iter().chain([&kept]).find(|path| self.ports.files.exists(path))
        else {
            return Ok(());
        };
        let (pair, files) = (self.pairs.current(), self.ports.files.as_ref());
        let written = Kubeconfig::for_cluster_of(files, cluster).and_then(|mut kubeconfig| {
            kubeconfig.use_files(&pair, &pair)?;
            kubeconfig.write(files, path, None)
        });
        written.map_err(|error| format!("the kubeconfig {} cannot be written: {error}", path.display()))?;
        self.telemetry.emit(telemetry::Event::KubeconfigWritten { path: path.display().to_string() });
        Ok(())
    }

    async fn restore_key(&self, held: &Credential) -> bool {
        restore_key(&self.ports.keyring, &self.pairs, &self.telemetry, held).await
    }
}
