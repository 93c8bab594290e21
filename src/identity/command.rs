//! What an operator asks for while the agent runs.

use pintle_agent_core::{Event, Phase};
use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::{Agent, Command, Migration};
use crate::config;
use crate::keys::{CALL_DEADLINE, inventory};

impl Agent {
    /// Does what was asked for; the event is what it means for the rotation.
    pub(super) async fn obey(&mut self, command: Command) -> Event {
        match command {
            Command::Rotate => Event::RotationRequested,
            Command::Prune { selection, dry_run, reply } => {
                let states = [&self.state];
                let inventory = inventory::prune(&self.config, &self.keyring, &states, &selection, dry_run).await;
                // Who asked may have gone away.
                let _ = reply.send(inventory);
                Event::Woke
            }
            Command::Migrate { to, dry_run, reply } => {
                let migration = self.migrate(&to, dry_run).await;
                let begins = !dry_run && migration.as_ref().is_ok_and(|migration| migration.moves);
                let _ = reply.send(migration);
                if begins { Event::RotationRequested } else { Event::Woke }
            }
        }
    }

    /// Has new keys made in `to`. What is in use stays in use until its successor is proven.
    async fn migrate(&mut self, to: &str, dry_run: bool) -> Result<Migration, BackendError> {
        // A device that does not answer would only keep the rotation waiting.
        self.keyring.backend(to)?.call(CALL_DEADLINE, |backend| backend.list()).await?;
        let from = self.state.held.as_ref().map(|held| held.key().clone());
        let moves = from.as_ref().is_none_or(|key| key.backend != to);
        if !dry_run {
            config::migration::save(&self.config, to).map_err(|error| {
                let detail = format!("the migration cannot be written down: {error}");
                BackendError::new(BackendErrorKind::Unavailable, detail)
                    .with_hint(format!("make room in {}", self.config.state_dir.display()))
            })?;
            to.clone_into(&mut self.config.backend);
            to.clone_into(&mut self.policy.backend);
            self.leave_unrequested_key(to);
        }
        Ok(Migration { from, algorithm: self.policy.algorithm, moves })
    }

    /// Gives up a key that is being made elsewhere, perhaps in a device that does not answer: it is destroyed with the
    /// old ones. Once a certificate is requested for it, it goes first.
    fn leave_unrequested_key(&mut self, to: &str) {
        let key = match &self.state.phase {
            Phase::Generating { key } => key.clone(),
            Phase::Requesting { next } => next.key.clone(),
            _ => return,
        };
        if key.backend != to {
            self.state.retiring.push(key);
            self.state.phase = Phase::Holding;
            self.state.back_off = None;
        }
    }
}
