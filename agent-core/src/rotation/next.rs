//! The one thing to do next. Phases that time or the configuration alone ends are ended here.

use super::failure::rejected;
use super::{Action, Phase, State, Waiting, is_wanted};
use crate::policy::Window;
use crate::{Credential, Policy, Rejection, UnixTime};

/// As many keys may be let go for another configuration before the next one waits: a configuration that changes all the
/// time must not flood the API server.
const CHANGES_OF_MIND: u32 = 3;

pub(super) fn next_action(state: &mut State, now: UnixTime, policy: &Policy) -> Action {
    leave_outlived_phase(state, now, policy);
    if waits_for_lost_key(state, policy) {
        return Action::Wait { until: held_expiry(state, now), waiting: Waiting::KeyLost };
    }
    if let Some(until) = state.back_off_until(now, policy) {
        return Action::Wait { until: Some(until), waiting: Waiting::BackOff };
    }
    if state.phase == Phase::Holding {
        let (until, waiting) = match due(state, now, policy) {
            Due::Now if policy.template.is_none() => (held_expiry(state, now), Waiting::AddressesMissing),
            Due::Now => {
                let key = state.choose_key(policy);
                state.phase = Phase::Generating { key: key.clone() };
                return Action::Generate { key, algorithm: policy.algorithm };
            }
            Due::At(until) => (Some(until), Waiting::UntilRotation),
            Due::AtExpiry(until) => (Some(until), Waiting::RotationOff),
        };
        return Action::Wait { until, waiting };
    }
    let authority = state.authority(now);
    match &state.phase {
        Phase::Holding => Action::Wait { until: None, waiting: Waiting::UntilRotation },
        Phase::Generating { .. } if policy.template.is_none() => {
            Action::Wait { until: held_expiry(state, now), waiting: Waiting::AddressesMissing }
        }
        Phase::Generating { key } => Action::Generate { key: key.clone(), algorithm: policy.algorithm },
        Phase::Requesting { next } => Action::Submit { next: next.clone(), authority },
        Phase::Awaiting { next, request } => {
            Action::Observe { next: next.clone(), request: request.clone(), authority }
        }
        Phase::Proving { issued, .. } => Action::Prove { credential: issued.clone() },
        Phase::Publishing { issued, .. } => Action::Publish { credential: issued.clone() },
        Phase::Restoring { dropped, .. } => {
            Action::Publish { credential: state.held.as_ref().unwrap_or(dropped).clone() }
        }
        Phase::Retiring { .. } => match &state.held {
            Some(held) if state.held_unproven => Action::Prove { credential: held.clone() },
            _ => Action::Retire { keys: state.retiring.clone() },
        },
    }
}

/// When the held credential expires, if it has not yet.
fn held_expiry(state: &State, now: UnixTime) -> Option<UnixTime> {
    state.held.as_ref().map(Credential::not_after).filter(|expiry| *expiry > now)
}

/// Whether the key in use is lost, and nobody has allowed to enrol again for that (case C26). It may be back at any
/// time; until then nothing new is made or asked for, in whichever phase it went. What has been issued by then was asked
/// for by the key in use, and takes its place.
fn waits_for_lost_key(state: &State, policy: &Policy) -> bool {
    let asks = matches!(
        state.phase,
        Phase::Holding
            | Phase::Generating { .. }
            | Phase::Requesting { .. }
            | Phase::Awaiting { .. }
            | Phase::Restoring { .. }
    );
    state.held_key_lost && !policy.enrol_after_key_loss && asks
}

/// When the next rotation is due.
enum Due {
    Now,
    At(UnixTime),
    /// Not before there is no certificate any more: rotation is off.
    AtExpiry(UnixTime),
}

fn due(state: &State, now: UnixTime, policy: &Policy) -> Due {
    let Some(held) = state.held.as_ref().filter(|_| state.held_is_good(now)) else {
        return Due::Now;
    };
    if state.rotation_requested {
        return Due::Now;
    }
    if !policy.rotate {
        return Due::AtExpiry(held.not_after());
    }
    let template_is_wanted = match (&state.held_template, &policy.template) {
        (Some(held), Some(wanted)) => held.names_the_same(wanted),
        _ => true,
    };
    let deadline = Window::of(held).deadline;
    if now >= deadline || held.key().backend != policy.backend || !template_is_wanted {
        Due::Now
    } else {
        Due::At(deadline)
    }
}

/// Leaves a phase that time, or a change of the configuration, ends.
fn leave_outlived_phase(state: &mut State, now: UnixTime, policy: &Policy) {
    leave_unwanted_candidate(state, now, policy);
    match &state.phase {
        Phase::Proving { next, issued, .. } | Phase::Publishing { next, issued, .. } if issued.has_expired(now) => {
            // A signer with very short lives would otherwise be asked again at once, for ever.
            let (next, rejection) = (next.clone(), Rejection::Expired(issued.not_after()));
            rejected(state, next, rejection, now, policy);
        }
        Phase::Proving { next, issued, refusals: 0, unanswered: true } if may_publish_unproven(state, now) => {
            let (next, issued) = (next.clone(), issued.clone());
            state.enter(Phase::Publishing { next, issued, proven: false });
        }
        Phase::Restoring { dropped, key_lost: true, .. } if !state.held_can_be_restored(now) => {
            // Neither is of any use.
            let dropped = dropped.key().clone();
            state.enter(Phase::RETIRING);
            state.retire_key(dropped);
        }
        Phase::Restoring { dropped, .. } if !state.held_can_be_restored(now) && !waits_for_lost_key(state, policy) => {
            // What was to be published again is of no use any more, and what is published stays.
            let dropped = dropped.clone();
            let old = state.held.replace(dropped);
            (state.held_refused, state.held_key_lost) = (true, false);
            state.enter(Phase::RETIRING);
            if let Some(old) = old {
                state.retire_key(old.key().clone());
            }
        }
        _ => {}
    }
    leave_retiring(state, now, policy);
}

/// A key that is yet to be requested, and that the configuration no longer wants, goes at once. Once a request stands at
/// the API server, that goes first: there is one live request.
fn leave_unwanted_candidate(state: &mut State, now: UnixTime, policy: &Policy) {
    let unwanted = match &state.phase {
        Phase::Generating { key } => key.backend != policy.backend,
        Phase::Requesting { next } => !is_wanted(next, policy),
        _ => false,
    };
    if unwanted {
        state.let_candidate_go("", false, now);
        if state.discarded > CHANGES_OF_MIND {
            let reason = "the configuration has changed again before a certificate was issued".to_owned();
            state.fail(now, policy, reason, None);
        }
    }
}

/// Whether what was issued is published although the API server has not answered whether it accepts it: where nothing
/// better is in use, or what is in use will be worth nothing in a few minutes.
fn may_publish_unproven(state: &State, now: UnixTime) -> bool {
    match &state.held {
        Some(held) if state.held_is_good(now) => {
            let last_call = held.not_after() - Policy::FILE_CONSUMER_DELAY * 2;
            now >= Window::of(held).closes.max(last_call)
        }
        _ => true,
    }
}

/// Retiring begins where keys are left from before, and ends when they are destroyed; or when a rotation is due, and some
/// could not be destroyed: these stay on the list. Keeping the identity alive comes before tidiness, and a certificate
/// that could never be proven is replaced when its own time has come.
fn leave_retiring(state: &mut State, now: UnixTime, policy: &Policy) {
    if let Phase::Retiring { .. } = state.phase
        && state.held_unproven
    {
        if state.previous.as_ref().is_some_and(|previous| previous.credential.has_expired(now)) {
            state.drop_previous();
        }
        let outlived = state.held.as_ref().is_none_or(|held| now >= Window::of(held).deadline);
        if !outlived {
            return;
        }
        state.held_unproven = false;
        state.drop_previous();
    }
    let is_due = matches!(due(state, now, policy), Due::Now);
    match state.phase {
        Phase::Retiring { .. } if state.retiring.is_empty() && state.back_off_until(now, policy).is_none() => {
            state.enter(Phase::Holding)
        }
        Phase::Retiring { attempted: true, .. } if is_due => state.enter(Phase::Holding),
        Phase::Holding if !is_due && !state.retiring.is_empty() => state.enter(Phase::RETIRING),
        _ => {}
    }
}
