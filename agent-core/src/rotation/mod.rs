//! The state machine: what happened goes in, the one thing to do next comes out.
//!
//! # Flow
//! [`Phase::Holding`] until the rotation is due → [`Phase::Generating`] a key → [`Phase::Requesting`] a certificate for
//! it → [`Phase::Awaiting`] the signer → [`Phase::Publishing`] what came back → [`Phase::Proving`] that the API server
//! knows the new identity → [`Phase::Retiring`] the old key → holding again.
//!
//! # Guarantees
//! - Total: any event in any state yields an action; an event that does not belong to the phase repeats its action.
//! - At most two keys (in use, and next) and one live CertificateSigningRequest.
//! - The key of the held credential is destroyed only after its successor is published and the API server has accepted
//!   it, or after it has ended or been refused for good.
//!
//! # Assumptions
//! The state is saved before the action is performed, and repeating an action is harmless.

mod action;
mod event;
#[cfg(test)]
pub(crate) mod simulation;
mod state;

pub use action::{Action, Authority, Waiting};
pub use event::{ApiFailure, Event, Observation};
pub use state::{BackOff, Candidate, Phase, State, SubmittedRequest};

use pintle_plugins_api::BackendErrorKind;

use crate::policy::Window;
use crate::{Credential, Policy, Rejection, UnixTime};

/// Takes one step: `event` happened, and it is `now`.
pub fn step(mut state: State, event: Event, now: UnixTime, policy: &Policy) -> (State, Action) {
    happen(&mut state, event, now, policy);
    let action = next_action(&mut state, now, policy);
    (state, action)
}

/// Lets the event change the state, if it belongs to the phase.
fn happen(state: &mut State, event: Event, now: UnixTime, policy: &Policy) {
    match (event, &state.phase) {
        (Event::RotationRequested, _) => {
            // Until the next certificate is in use. One that is in use already, while old keys are still to be destroyed,
            // is what somebody wants to be rid of.
            state.rotation_requested = true;
            // Somebody asks for it now: whatever is being waited out is tried at once. How often a key could not be
            // destroyed still counts.
            match &mut state.back_off {
                Some(back_off) if state.phase == Phase::Retiring => back_off.until = now,
                _ => state.back_off = None,
            }
        }
        (Event::LocalChange, _) => {
            state.back_off = state.back_off.take().filter(|back_off| !back_off.local && !back_off.bootstrap);
        }
        (
            Event::BackendFound,
            Phase::Generating { .. } | Phase::Requesting { .. } | Phase::Publishing { .. } | Phase::Retiring,
        ) => {
            if let Some(back_off) = &mut state.back_off {
                back_off.until = now;
            }
        }
        (Event::HeldKeyFound, _) => (state.held_key_lost, state.held_refused) = (false, false),
        (Event::HeldRefused { key_lost }, _) => {
            // Whether the API server takes it is what proving finds out by itself.
            state.held_refused |= state.held.is_some() && state.phase != Phase::Proving;
            state.held_key_lost |= key_lost && state.held.is_some();
        }
        (Event::Generated(public_key), Phase::Generating { key }) => {
            let next = Candidate { key: key.clone(), public_key, attempt: 1 };
            state.enter(Phase::Requesting { next });
        }
        (Event::GenerateFailed(error), Phase::Generating { .. }) => {
            if error.kind == BackendErrorKind::Conflict {
                // Somebody else's key has this id; it is not ours to destroy.
                let key = state.choose_key(policy);
                state.phase = Phase::Generating { key };
            }
            state.fail(now, policy, error, None);
        }
        (Event::SigningFailed(error), Phase::Requesting { next }) => {
            if matches!(error.kind, BackendErrorKind::NotFound | BackendErrorKind::KeyLost) {
                state.phase = Phase::Generating { key: next.key.clone() };
                state.discarded = state.discarded.saturating_add(1);
            }
            state.fail(now, policy, error, None);
        }
        (Event::Submitted(request), Phase::Requesting { next }) => {
            let next = next.clone();
            state.enter(Phase::Awaiting { next, request });
        }
        (Event::NameTaken, Phase::Requesting { next }) => {
            let next = next.clone();
            refused(state, next, "the request's name is taken by another's".to_owned(), now, policy);
        }
        (
            Event::ApiFailed { authority, failure },
            Phase::Requesting { .. } | Phase::Awaiting { .. } | Phase::Proving,
        ) => {
            // A server that asks to be left alone is left alone, whoever asks.
            let bootstrap = authority == Authority::Bootstrap && !matches!(failure, ApiFailure::Throttled { .. });
            api_failed(state, authority, failure, now, policy);
            if let Some(back_off) = &mut state.back_off {
                back_off.bootstrap = bootstrap;
            }
        }
        (Event::Observed(observation), Phase::Awaiting { next, .. }) => {
            let next = next.clone();
            observed(state, next, observation, now, policy);
        }
        (Event::Published, Phase::Publishing { issued, .. }) => {
            let held = issued.clone().installed(now);
            // A certificate that was published and adopted from disk before the journal knew of it has the same key.
            let key = held.key().clone();
            if let Some(old) = state.held.replace(held).filter(|old| *old.key() != key) {
                state.retiring.push(old.key().clone());
            }
            state.retiring.retain(|retiring| *retiring != key);
            (state.held_refused, state.held_key_lost, state.rotation_requested) = (false, false, false);
            state.proof_refusals = 0;
            state.enter(Phase::Proving);
        }
        (Event::PublishFailed { detail, key_lost }, Phase::Publishing { next, .. }) => {
            if key_lost {
                state.phase = Phase::Generating { key: next.key.clone() };
                state.discarded = state.discarded.saturating_add(1);
            }
            state.fail_locally(now, policy, detail);
        }
        (Event::Proven, Phase::Proving) => {
            state.discarded = 0;
            state.enter(Phase::Retiring);
        }
        (Event::Retired, Phase::Retiring) => {
            state.retiring.clear();
            state.enter(Phase::Holding);
        }
        (Event::RetireFailed(error), Phase::Retiring) => state.fail(now, policy, error, None),
        // Woke, and whatever does not belong to the phase.
        _ => {}
    }
}

fn api_failed(state: &mut State, authority: Authority, failure: ApiFailure, now: UnixTime, policy: &Policy) {
    match failure {
        ApiFailure::Unauthorized(_) if authority == Authority::Held && state.phase != Phase::Proving => {
            // Unexpired, but the API server does not take it, for instance because its authority was replaced: there may
            // be a bootstrap credential that it takes.
            let first = !state.held_refused;
            state.held_refused = true;
            if !first {
                state.fail(now, policy, failure, None);
            }
        }
        ApiFailure::Unauthorized(_) if state.phase == Phase::Proving => {
            state.proof_refusals = state.proof_refusals.saturating_add(1);
            if state.proof_refusals < PROVE_ATTEMPTS {
                return state.fail(now, policy, failure, None);
            }
            // Signed by an authority that the API server does not know, for instance because it was replaced meanwhile.
            state.held_refused = true;
            state.discarded = state.discarded.saturating_add(1);
            state.enter(Phase::Retiring);
        }
        ApiFailure::NoCredential(_) if state.held_refused => {
            // With nothing else at hand, even a refused certificate is tried again, though no more often than anything
            // else that the API server refuses; a bootstrap credential may appear at any time.
            state.held_refused = false;
            state.fail(now, policy, failure, None);
            if let Some(back_off) = &mut state.back_off {
                back_off.local = true;
            }
        }
        ApiFailure::NoCredential(_) => state.fail_locally(now, policy, failure),
        ApiFailure::Unauthorized(_) | ApiFailure::Forbidden(_) if authority == Authority::Bootstrap => {
            // Bootstrap tokens end soon after a node has joined, so both are tried in turn.
            state.held_refused = false;
            state.fail(now, policy, failure, None);
        }
        ApiFailure::Throttled { retry_after, .. } => state.fail(now, policy, failure, retry_after),
        _ => state.fail(now, policy, failure, None),
    }
}

/// A signer, an approver or a cleaner has touched the request.
fn observed(state: &mut State, next: Candidate, observation: Observation, now: UnixTime, policy: &Policy) {
    let refusal = match observation {
        Observation::Pending => {
            state.back_off = None;
            return;
        }
        Observation::Issued(Ok(issued)) => {
            state.enter(Phase::Publishing { next, issued });
            return;
        }
        Observation::Issued(Err(rejection @ Rejection::NotYetValid(begin))) => {
            // It is a good certificate, only not now: whoever's clock is off, it is looked at again, and nothing new is
            // requested.
            state.fail(now, policy, rejection.to_string(), None);
            if let Some(back_off) = &mut state.back_off {
                back_off.until = back_off.until.max(begin.min(now + Policy::LOCAL_RETRY));
            }
            return;
        }
        Observation::Issued(Err(rejection @ Rejection::OtherKey)) => {
            // This key's request was answered with somebody else's certificate: nothing can be trusted about it, so the
            // key goes too, and before the next one is made.
            state.retiring.push(next.key);
            state.discarded = state.discarded.saturating_add(1);
            state.enter(Phase::Retiring);
            state.fail(now, policy, rejection.to_string(), None);
            return;
        }
        Observation::Issued(Err(rejection)) => rejection.to_string(),
        Observation::Denied(detail) => format!("the request was denied: {detail}"),
        Observation::Failed(detail) => format!("the signer failed: {detail}"),
        Observation::Gone => "the request was deleted before a certificate was issued".to_owned(),
    };
    refused(state, next, refusal, now, policy);
}

/// The same key is requested again, under the next name.
fn refused(state: &mut State, next: Candidate, refusal: String, now: UnixTime, policy: &Policy) {
    state.fail(now, policy, refusal, None);
    let next = Candidate { attempt: next.attempt.saturating_add(1), ..next };
    state.phase = Phase::Requesting { next };
}

/// The one thing to do next. Phases that time alone ends are ended here.
fn next_action(state: &mut State, now: UnixTime, policy: &Policy) -> Action {
    leave_outlived_phase(state, now);
    if waits_for_lost_key(state, policy) {
        let until = state.held.as_ref().map(Credential::not_after).filter(|end| *end > now);
        return Action::Wait { until, waiting: Waiting::KeyLost };
    }
    if let Some(until) = state.back_off_until(now, policy) {
        return Action::Wait { until: Some(until), waiting: Waiting::BackOff };
    }
    if state.phase == Phase::Holding {
        match due(state, now, policy) {
            Due::Now => {
                let key = state.choose_key(policy);
                state.phase = Phase::Generating { key };
            }
            Due::At(until) => return Action::Wait { until: Some(until), waiting: Waiting::UntilRotation },
            Due::AtItsEnd(until) => return Action::Wait { until: Some(until), waiting: Waiting::RotationOff },
        }
    }
    let authority = state.authority(now);
    match &state.phase {
        Phase::Holding => Action::Wait { until: None, waiting: Waiting::UntilRotation },
        Phase::Generating { key } => Action::Generate { key: key.clone(), algorithm: policy.algorithm },
        Phase::Requesting { next } => Action::Submit { next: next.clone(), authority },
        Phase::Awaiting { next, request } => {
            Action::Observe { next: next.clone(), request: request.clone(), authority }
        }
        Phase::Publishing { issued, .. } => Action::Publish { issued: issued.clone() },
        Phase::Proving => Action::Prove,
        Phase::Retiring => Action::Retire { keys: state.retiring.clone() },
    }
}

/// Whether the key in use is lost, and nobody has allowed to enrol again for that (case C26). It may be back at any
/// time; until then nothing new is made or asked for, in whichever phase it went. What has been issued by then was asked
/// for by the key in use, and takes its place.
fn waits_for_lost_key(state: &State, policy: &Policy) -> bool {
    let asks = matches!(
        state.phase,
        Phase::Holding | Phase::Generating { .. } | Phase::Requesting { .. } | Phase::Awaiting { .. }
    );
    state.held_key_lost && !policy.enrol_after_key_loss && asks
}

/// When the next rotation is due.
enum Due {
    Now,
    At(UnixTime),
    /// Not before there is no certificate any more: rotation is off.
    AtItsEnd(UnixTime),
}

fn due(state: &State, now: UnixTime, policy: &Policy) -> Due {
    let Some(held) = &state.held else {
        return Due::Now;
    };
    if held.has_ended(now) || state.held_refused || state.held_key_lost || state.rotation_requested {
        return Due::Now;
    }
    if !policy.rotate {
        return Due::AtItsEnd(held.not_after());
    }
    let deadline = Window::of(held).deadline;
    if now >= deadline || held.key().backend != policy.backend { Due::Now } else { Due::At(deadline) }
}

/// A certificate that the API server has refused this often, for some minutes, is given up: a server that is merely late
/// to load an authority has done so by then.
const PROVE_ATTEMPTS: u32 = 10;

/// So often is the destruction of an old key tried before a rotation that is due, or a new enrolment, goes ahead without
/// it. A backend that refuses this often will not do it in a few minutes' time either.
const RETIRE_ATTEMPTS: u32 = 12;

/// Leaves a phase that time alone ends: what was issued has ended before it could be published; or the key that is to be
/// proven is lost; or proving and retiring have failed until the held credential is itself due. Keeping the identity
/// alive then comes before caution and before tidiness: the old key, whose certificate is history by then, goes unproven;
/// and what could not be destroyed stays on the list, and is destroyed after the next rotation.
fn leave_outlived_phase(state: &mut State, now: UnixTime) {
    let outlived =
        |state: &State| state.failures() > 0 && state.held.as_ref().is_some_and(|held| now >= Window::of(held).closes);
    match &state.phase {
        Phase::Publishing { next, issued } if issued.has_ended(now) => {
            let next = Candidate { attempt: next.attempt.saturating_add(1), ..next.clone() };
            state.enter(Phase::Requesting { next });
        }
        Phase::Proving if state.held_key_lost || outlived(state) => state.enter(Phase::Retiring),
        Phase::Retiring
            if state.failures() >= state.discarded.saturating_add(RETIRE_ATTEMPTS)
                && (outlived(state) || state.held_refused || state.held_key_lost) =>
        {
            state.enter(Phase::Holding)
        }
        _ => {}
    }
    match state.phase {
        Phase::Retiring if state.retiring.is_empty() => state.enter(Phase::Holding),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
