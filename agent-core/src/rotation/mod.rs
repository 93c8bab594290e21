//! The state machine: what happened goes in, the one thing to do next comes out.
//!
//! # Flow
//! [`Phase::Holding`] until the rotation is due → [`Phase::Generating`] a key → [`Phase::Requesting`] a certificate for
//! it → [`Phase::Awaiting`] the signer → [`Phase::Proving`] to the API server what came back, before anybody else has
//! it → [`Phase::Publishing`] it → [`Phase::Retiring`] the old key → holding again.
//!
//! # Guarantees
//! - Total: any event in any state yields an action; an event that does not belong to the phase repeats its action.
//! - A certificate that the API server has not accepted is published only where none that is good is held, or the held
//!   one is about to expire, and the API server has not refused it. What was in use before is then kept, and published
//!   again if the API server refuses the new one.
//! - The key of the held credential is destroyed only after its successor is published and the API server has accepted
//!   it, or after it has expired or been lost.
//! - A candidate whose key is lost, or that the configuration no longer wants, is let go, and the held one untouched.
//! - At most two keys (in use, and next), beside those that their devices do not destroy, and one live
//!   CertificateSigningRequest.
//! - Only keys in the state are ever destroyed, and of these none that something else made.
//!
//! # Assumptions
//! The state is saved before the action is performed, and repeating an action is harmless.

mod action;
mod event;
mod failure;
mod next;
mod phase;
mod recovery;
#[cfg(test)]
pub(crate) mod simulation;
mod state;
pub mod v1;

pub use action::{Action, Authority, Waiting};
pub use event::{ApiFailure, Event, FoundPair, Observation, PublishError};
pub use phase::{BackOff, Candidate, Phase, SubmittedRequest};
pub use recovery::Found;
pub use state::State;

use pintle_plugins_api::{BackendError, BackendErrorKind};

use crate::{Policy, UnixTime};
use failure::{api_failed, candidate_failed, observed, proof_failed, request_again};
use next::next_action;

/// Takes one step: `event` happened, and it is `now`.
pub fn step(mut state: State, event: Event, now: UnixTime, policy: &Policy) -> (State, Action) {
    apply_event(&mut state, event, now, policy);
    let action = next_action(&mut state, now, policy);
    (state, action)
}

/// Whether the configuration still wants this candidate. Where it does not know what to ask for, it wants what it has
/// asked for.
fn is_wanted(next: &Candidate, policy: &Policy) -> bool {
    let template_is_wanted = policy.template.as_ref().is_none_or(|wanted| *wanted == next.template);
    next.key.backend == policy.backend && template_is_wanted
}

/// Lets the event change the state, if it belongs to the phase.
fn apply_event(state: &mut State, event: Event, now: UnixTime, policy: &Policy) {
    match (event, &state.phase) {
        (Event::RotationRequested, _) => {
            // Until the next certificate is in use. One that is in use already, while old keys are still to be destroyed,
            // is what somebody wants to be rid of.
            state.rotation_requested = true;
            end_back_off(state, now);
            // What the API server has refused is not tried again by a person who has just fixed the signer.
            if let Phase::Proving { next, refusals: 1.., .. } = &state.phase {
                let next = Candidate { attempt: next.attempt.saturating_add(1), ..next.clone() };
                state.enter(Phase::Requesting { next });
            }
        }
        // What has changed is in the policy; whatever is being waited out may be mended by it.
        (Event::PolicyChanged | Event::TemplateChanged | Event::AddressesMissing, _) => end_back_off(state, now),
        (Event::PairReplaced(found), _) => state.replace_pair(found, now, policy),
        (Event::LocalChange, _) => {
            state.back_off = state.back_off.take().filter(|back_off| !back_off.local && !back_off.bootstrap);
        }
        (
            Event::BackendFound,
            Phase::Generating { .. }
            | Phase::Requesting { .. }
            | Phase::Proving { .. }
            | Phase::Publishing { .. }
            | Phase::Restoring { .. }
            | Phase::Retiring { .. },
        ) => {
            if let Some(back_off) = &mut state.back_off {
                back_off.until = now;
            }
        }
        (Event::HeldKeyFound, _) => (state.held_key_lost, state.held_refused) = (false, false),
        (Event::HeldRefused { key_lost }, _) => held_refused(state, key_lost, now),
        (Event::Generated(public_key), Phase::Generating { key }) => {
            // Without a template the key waits for one.
            if let Some(template) = policy.template.clone() {
                let next = Candidate { key: key.clone(), public_key, template, attempt: 1 };
                state.enter(Phase::Requesting { next });
            }
        }
        (Event::GenerateFailed(error), Phase::Generating { .. })
        | (Event::SigningFailed(error), Phase::Requesting { .. })
        | (Event::ProofKeyFailed(error), Phase::Proving { .. }) => {
            let is_let_go = candidate_failed(state, &error, now, policy);
            if !is_let_go {
                state.fail(now, policy, error, None);
            }
        }
        (Event::Submitted(request), Phase::Requesting { next }) => {
            let next = next.clone();
            state.enter(Phase::Awaiting { next, request });
        }
        (Event::NameTaken, Phase::Requesting { next }) => {
            let next = next.clone();
            let taken = "the request's name is taken by another's".to_owned();
            request_again(state, next, taken, false, now, policy);
        }
        (
            Event::ApiFailed { authority: authority @ (Authority::Held | Authority::Bootstrap), failure },
            Phase::Requesting { .. } | Phase::Awaiting { .. },
        ) => api_failed(state, authority, failure, now, policy),
        (Event::Observed(observation), Phase::Awaiting { next, .. }) => {
            let next = next.clone();
            observed(state, next, observation, now, policy);
        }
        (Event::Proven, Phase::Proving { next, issued, .. }) => {
            let (next, issued) = (next.clone(), issued.clone());
            state.enter(Phase::Publishing { next, issued, proven: true });
        }
        (Event::ApiFailed { authority: Authority::Issued, failure }, Phase::Proving { .. }) => {
            proof_failed(state, failure, now, policy);
        }
        (Event::Published, Phase::Publishing { next, issued, proven }) => {
            let (next, issued, proven) = (next.clone(), issued.clone(), *proven);
            state.install(&next, issued, proven, now);
        }
        (Event::PublishFailed(error), Phase::Publishing { .. }) => {
            if let PublishError::Backend(error) = &error
                && candidate_failed(state, error, now, policy)
            {
                return;
            }
            state.fail_locally(now, policy, error);
        }
        (Event::Published, Phase::Restoring { dropped, reason, .. }) => {
            let (dropped, reason) = (dropped.key().clone(), reason.clone());
            state.enter(Phase::RETIRING);
            state.retire_key(dropped);
            state.fail(now, policy, reason, None);
        }
        (Event::PublishFailed(error), Phase::Restoring { .. }) => {
            if let PublishError::Backend(error) = &error {
                state.held_key_lost |= held_key_is_gone(state, error);
            }
            state.fail_locally(now, policy, error);
        }
        (Event::Proven, Phase::Retiring { .. }) if state.held_unproven => {
            state.held_is_proven();
            state.enter(Phase::RETIRING);
        }
        (Event::ApiFailed { authority: Authority::Issued, failure }, Phase::Retiring { .. }) if state.held_unproven => {
            proof_failed(state, failure, now, policy);
        }
        (Event::ProofKeyFailed(error), Phase::Retiring { .. }) if state.held_unproven => {
            if held_key_is_gone(state, &error) {
                held_refused(state, true, now);
            } else {
                state.fail(now, policy, error, None);
            }
        }
        (Event::Retired { destroyed, mut failed }, Phase::Retiring { refusals, .. }) => {
            let refusals = *refusals;
            state.retiring.retain(|key| !destroyed.contains(key));
            if failed.is_empty() {
                state.enter(Phase::RETIRING);
            } else {
                state.phase = Phase::Retiring { attempted: true, refusals };
                let first = failed.swap_remove(0);
                state.fail(now, policy, first, None);
            }
        }
        // Woke, and whatever does not belong to the phase.
        _ => {}
    }
}

/// Whatever is being waited out is tried at once. How often a key could not be destroyed still counts.
fn end_back_off(state: &mut State, now: UnixTime) {
    match &mut state.back_off {
        Some(back_off) if matches!(state.phase, Phase::Retiring { .. }) => back_off.until = now,
        _ => state.back_off = None,
    }
}

/// Whether the backend has lost the held credential's key. Where another key has its name now, that is not ours to destroy.
fn held_key_is_gone(state: &mut State, error: &BackendError) -> bool {
    match (error.kind, &state.held) {
        (BackendErrorKind::Conflict, Some(held)) => {
            let key = held.key().clone();
            state.disown(key);
            true
        }
        (kind, _) => matches!(kind, BackendErrorKind::NotFound | BackendErrorKind::KeyLost),
    }
}

/// The API server refused the held credential, or its key is lost.
fn held_refused(state: &mut State, key_lost: bool, now: UnixTime) {
    if state.held.is_none() {
        return;
    }
    if state.held_unproven {
        // Whether the API server accepts it is what proving finds out by itself.
        if !key_lost || state.restore_previous("the backend has lost the key of the certificate in use", true, now) {
            return;
        }
        state.held_unproven = false;
    }
    state.held_refused = true;
    state.held_key_lost |= key_lost;
}

#[cfg(test)]
mod tests;
