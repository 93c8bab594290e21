//! Proving a new certificate: the API server must accept it before anybody else is given it.

use pintle_agent_core::rotation::{ApiFailure, Authority};
use pintle_agent_core::{Credential, Event};

use super::Agent;
use crate::kubernetes::port::Caller;
use crate::telemetry;

impl Agent {
    /// Asks the API server something with this credential, over a new connection.
    pub(super) async fn prove(&mut self, credential: &Credential) -> Event {
        let caller = Caller::Certificate(credential.clone());
        // A new connection: an API server verifies the certificate when one is made.
        self.ports.api.forget(&caller);
        let proof = async { self.ports.api.connect(&caller).await?.who_am_i().await };
        let failure = match proof.await {
            Ok(user) => {
                let serial = credential.serial().to_owned();
                self.telemetry.emit(telemetry::Event::IdentityProven { user: user.unwrap_or_default(), serial });
                self.probe.done(self.ports.clock.monotonic());
                return Event::Proven;
            }
            Err(failure) => failure,
        };
        self.ports.api.forget(&caller);
        // A handshake that the key did not sign looks like a server that cannot be reached.
        if !matches!(failure, ApiFailure::Unauthorized(_)) {
            let signed = match self.check_key_of(credential).await {
                Ok(()) => self.ports.keyring.try_key(credential.key()).await,
                Err(error) => Err(error),
            };
            if let Err(error) = signed {
                return Event::ProofKeyFailed(error);
            }
        }
        Event::ApiFailed { authority: Authority::Issued, failure }
    }
}
