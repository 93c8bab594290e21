//! The credential proxy follows the identity, and old keys wait for its last connections.

use std::sync::Arc;

use pintle_agent_core::Event;
use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::Agent;

/// Why no key is destroyed yet.
pub(super) enum StillSpeaks {
    /// Something else is to be looked at first.
    Meanwhile(Event),
    /// The proxy cannot be made to speak as the credential in use, so it may go on using an old key.
    AsAnother(BackendError),
}

impl Agent {
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
    pub(super) async fn await_last_connections(&mut self) -> Result<(), StillSpeaks> {
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
