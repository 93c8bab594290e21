//! What an operator asks for while the agent runs.

use pintle_agent_core::Event;
use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::{Agent, Command, Migration};
use crate::config;
use crate::keys::CALL_DEADLINE;

impl Agent {
    /// Does what was asked for; the event is what it means for the rotation.
    pub(super) async fn handle_command(&mut self, command: Command) -> Event {
        match command {
            Command::Rotate => Event::RotationRequested,
            Command::Migrate { to, dry_run, reply } => {
                let migration = self.migrate(&to, dry_run).await;
                let begins = !dry_run && migration.as_ref().is_ok_and(|migration| migration.moves);
                let _ = reply.send(migration);
                // Asked for by a person, it begins also where rotation is off.
                if begins { Event::RotationRequested } else { Event::PolicyChanged }
            }
        }
    }

    /// Has new keys made in `to`. What is in use stays in use until its successor is proven.
    async fn migrate(&mut self, to: &str, dry_run: bool) -> Result<Migration, BackendError> {
        // A device that does not answer would only keep the rotation waiting.
        self.ports.keyring.backend(to)?.call(CALL_DEADLINE, |backend| backend.list()).await?;
        let from = self.state.held().map(|held| held.key().clone());
        let moves = from.as_ref().is_none_or(|key| key.backend != to);
        if !dry_run {
            config::migration::save(self.ports.files.as_ref(), &self.config, to).map_err(|error| {
                let detail = format!("the migration cannot be written down: {error}");
                BackendError::new(BackendErrorKind::Unavailable, detail)
                    .with_hint(format!("make room in {}", self.config.node.state_dir.display()))
            })?;
            to.clone_into(&mut self.config.backend);
            to.clone_into(&mut self.policy.backend);
        }
        Ok(Migration { from, algorithm: self.policy.algorithm, moves })
    }
}
