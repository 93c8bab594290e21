//! A recovery that cannot be finished yet: the current pair is good, and the device that may have its key does not answer.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use pintle_agent_core::rotation::Found;
use pintle_agent_core::{Event, Policy, State};

use super::Agent;
use super::recovery::{MissingBackend, Recovery, Standing};
use super::report::status_of;
use crate::telemetry::{self, IdentityStatus};

/// What is waited for, before anything is done.
pub(super) struct Unfinished {
    missing: MissingBackend,
    /// What was found on disk and told of.
    told: BTreeSet<(PathBuf, String)>,
    /// How often the device was asked.
    attempts: u32,
}

impl Unfinished {
    pub(super) fn new(missing: MissingBackend, told: BTreeSet<(PathBuf, String)>) -> Self {
        Self { missing, told, attempts: 1 }
    }
}

impl Agent {
    /// Waits until it is known what is held. A device may come up later than the agent, and enrolling anew meanwhile would
    /// replace a pair that others use. The event is what an operator asked for meanwhile.
    pub(super) async fn finish_recovery(&mut self) -> Option<Event> {
        let mut asked = None;
        while let Some(mut unfinished) = self.unfinished.take() {
            self.report_unfinished(&unfinished);
            let clock = Arc::clone(&self.ports.clock);
            let again = clock.now() + Policy::LOCAL_RETRY;
            let command = tokio::select! {
                biased;
                Some(command) = self.commands.recv() => Some(command),
                () = clock.sleep_until(Some(again)) => None,
            };
            if let Some(command) = command
                && let event @ Event::RotationRequested = self.handle_command(command).await
            {
                asked = Some(event);
            }
            unfinished.attempts = unfinished.attempts.saturating_add(1);
            match self.recovery().find_held(&self.state, &mut unfinished.told).await {
                Ok(Standing::Found(found)) => self.recovered(found).await,
                Ok(Standing::Unknown(missing)) => self.unfinished = Some(Unfinished { missing, ..unfinished }),
                // Only a person can change that, as at a start.
                Err(error) => {
                    let missing = MissingBackend { reason: error.detail, hint: error.hint };
                    self.unfinished = Some(Unfinished { missing, ..unfinished });
                }
            }
        }
        asked
    }

    async fn recovered(&mut self, found: Found) {
        let (now, state) = (self.now(), std::mem::take(&mut self.state));
        let installation = state.installation().to_owned();
        self.state = State::recovered(Some(state), installation, found, now, &self.policy);
        self.check_files().await;
        let _ = self.update_proxy().await;
    }

    /// Tells why nothing is done: as any failure that only something on this machine can mend, the more rarely the longer
    /// it goes on.
    fn report_unfinished(
        &mut self,
        Unfinished { missing: MissingBackend { reason, hint }, attempts, .. }: &Unfinished,
    ) {
        self.telemetry.alive();
        self.report_backends();
        let retry_at = self.now() + Policy::LOCAL_RETRY;
        if attempts.is_power_of_two() {
            self.telemetry.emit(telemetry::Event::Failed {
                phase: "recovering",
                reason: reason.clone(),
                hint: hint.clone(),
                failures: *attempts,
                retry_at: retry_at.to_string(),
            });
        }
        self.telemetry.set_status(IdentityStatus {
            state: telemetry::State::Failing,
            reason: reason.clone(),
            hint: hint.clone(),
            failures: *attempts,
            retry_at: Some(retry_at),
            ..status_of(&self.state, &self.config)
        });
    }

    /// What is needed to look for the credential on disk.
    pub(super) fn recovery(&self) -> Recovery<'_> {
        Recovery {
            config: &self.config,
            policy: &self.policy,
            template: &self.template,
            ports: &self.ports,
            telemetry: &self.telemetry,
            pairs: &self.pairs,
        }
    }
}
