//! Retiring old keys: each is destroyed once no connection through the credential proxy uses it any more.

use std::sync::Arc;

use pintle_agent_core::{Event, KeyName};
use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::Agent;
use crate::telemetry;

/// Why no key is destroyed yet.
enum StillSpeaks {
    /// Something else is to be looked at first.
    Meanwhile(Event),
    /// The proxy cannot be made to speak as the credential in use, so it may go on using an old key.
    AsAnother(BackendError),
}

impl Agent {
    /// Destroys these keys, each by itself, and removes the pairs that are not kept.
    pub(super) async fn retire(&mut self, keys: Vec<KeyName>) -> Event {
        // A key is destroyed when its last connection has ended; the proxy sees to it that this comes.
        match self.await_last_connections().await {
            Ok(()) => {}
            Err(StillSpeaks::Meanwhile(event)) => return event,
            Err(StillSpeaks::AsAnother(error)) => return Event::Retired { destroyed: Vec::new(), failed: vec![error] },
        }
        let (mut destroyed, mut failed) = (Vec::new(), Vec::new());
        for key in keys {
            match self.ports.keyring.delete(&key).await {
                Ok(()) => destroyed.push(key),
                Err(BackendError { kind, detail, hint }) => {
                    let detail = format!("the old key {key} cannot be destroyed: {detail}");
                    failed.push(BackendError { kind, detail, hint });
                }
            }
        }
        match self.pairs.prune(self.config.keep_pairs) {
            Ok(pairs) if !destroyed.is_empty() => {
                let keys = destroyed.iter().map(ToString::to_string).collect();
                self.telemetry.emit(telemetry::Event::KeysRetired { keys, pairs });
            }
            Ok(_) => {}
            Err(error) => {
                let directory = self.config.cert_dir.display();
                let detail = format!("old pairs in {directory} cannot be removed: {error}");
                let error = BackendError::new(BackendErrorKind::Unavailable, detail);
                failed.push(error.with_hint(format!("make {directory} writable")));
            }
        }
        Event::Retired { destroyed, failed }
    }

    /// Has the proxy speak as the held credential, if it does not yet. One that is yet to be proven waits for that, where
    /// there is another to speak as. What fails is told by the proxy's status, and tried again when the agent looks
    /// around.
    pub(super) async fn update_proxy(&self) -> Result<(), String> {
        match (&self.ports.proxy, self.state.trusted()) {
            (Some(proxy), Some(held)) if !held.has_expired(self.now()) => proxy.speak_as(held).await,
            _ => Ok(()),
        }
    }

    /// Waits a while until no connection through the proxy speaks as an earlier certificate.
    async fn await_last_connections(&mut self) -> Result<(), StillSpeaks> {
        let updated = self.update_proxy().await;
        let Some(proxy) = self.ports.proxy.clone() else { return Ok(()) };
        if let Some(held) = self.state.held()
            && !proxy.is_free_of_others(held)
        {
            let detail = match updated {
                Err(trouble) => format!("the credential proxy still uses an old key: {trouble}"),
                Ok(()) => "the credential proxy still uses an old key".to_owned(),
            };
            let error = BackendError::new(BackendErrorKind::Unavailable, detail);
            return Err(StillSpeaks::AsAnother(error.with_hint("see PROXY in pintle status -o wide")));
        }
        let clock = Arc::clone(&self.ports.clock);
        tokio::select! {
            biased;
            () = proxy.wait_until_only_current() => Ok(()),
            Some(command) = self.commands.recv() => Err(StillSpeaks::Meanwhile(self.handle_command(command).await)),
            // Something else may have to be looked at meanwhile, the watchdog for one.
            () = clock.sleep_until(None) => Err(StillSpeaks::Meanwhile(self.observe_environment().await)),
        }
    }
}
