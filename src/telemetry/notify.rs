//! The service manager: sd_notify(3).

use std::sync::Mutex;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use super::{IdentityStatus, State};

/// Tells systemd READY, STATUS and WATCHDOG; nobody where there is no systemd.
pub struct Notifier {
    progress: Mutex<Progress>,
    /// How often the watchdog must hear from us, a third of what would make it act.
    watchdog: Option<Duration>,
}

#[derive(Default)]
struct Progress {
    ready: bool,
    status: String,
    last_alive: Option<Instant>,
}

impl Notifier {
    /// As the environment (NOTIFY_SOCKET, WATCHDOG_USEC) says.
    pub fn from_environment() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 3);
        Self { progress: Mutex::default(), watchdog }
    }

    /// Ready once the credential is good; or once it is plain that it will take longer, since a boot must not hang for
    /// it.
    pub fn status(&self, identity: &IdentityStatus) {
        let mut progress = self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let text = identity.line();
        if progress.status != text {
            let _ = sd_notify::notify(&[NotifyState::Status(&text)]);
            progress.status = text;
        }
        if !progress.ready && (identity.state == State::Ready || !identity.reason.is_empty()) {
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            progress.ready = true;
        }
    }

    /// The agent is alive.
    pub fn alive(&self) {
        let Some(interval) = self.watchdog else {
            return;
        };
        let mut progress = self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if progress.last_alive.is_none_or(|last| last.elapsed() >= interval) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            progress.last_alive = Some(Instant::now());
        }
    }
}
