//! What follows from what failed.

use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::{ApiFailure, Authority, Candidate, Observation, Phase, PublishError, State, is_wanted};
use crate::{Policy, Rejection, UnixTime};

/// The API server is asked this often whether it accepts a certificate that it refuses. One that is merely late to load
/// an authority, as kube-apiserver reads its files once a minute, has done so by then.
pub(super) const PROOF_ATTEMPTS: u32 = 6;

/// With this many keys of a backend that could not be destroyed, it is the device that fails, and not a key: others are
/// not added to them without need.
const KEYS_LEFT_IN_A_DEVICE: usize = 16;

/// What failed, and what a person can do about it.
pub(super) struct Failure {
    pub(super) reason: String,
    pub(super) hint: String,
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self { reason, hint: String::new() }
    }
}

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Self {
        Self { reason: error.to_string(), hint: error.hint.unwrap_or_default() }
    }
}

impl From<ApiFailure> for Failure {
    fn from(failure: ApiFailure) -> Self {
        Self { reason: failure.to_string(), hint: failure.hint().to_owned() }
    }
}

impl From<Rejection> for Failure {
    fn from(rejection: Rejection) -> Self {
        Self { reason: rejection.to_string(), hint: rejection.hint().to_owned() }
    }
}

impl From<PublishError> for Failure {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Backend(error) => error.into(),
            PublishError::Disk { detail, hint } => Self { reason: detail, hint },
        }
    }
}

/// The backend failed with the candidate's key. What no waiting can mend costs the key; `true` if that was so.
pub(super) fn candidate_failed(state: &mut State, error: &BackendError, now: UnixTime, policy: &Policy) -> bool {
    let Some(key) = state.phase.next_key().cloned() else { return false };
    let unwanted = match &state.phase {
        Phase::Proving { next, .. } | Phase::Publishing { next, .. } => !is_wanted(next, policy),
        _ => false,
    };
    let reason = error.to_string();
    let left = state.retiring.iter().filter(|retiring| retiring.backend == key.backend).count();
    match error.kind {
        BackendErrorKind::Conflict => {
            // Somebody else's key has this id; it is not ours to destroy.
            state.disown(key);
            state.let_candidate_go(&reason, true, now);
        }
        BackendErrorKind::NotFound | BackendErrorKind::KeyLost => {
            state.let_candidate_go(&reason, true, now);
            if left >= KEYS_LEFT_IN_A_DEVICE {
                state.retiring.retain(|retiring| *retiring != key);
            }
        }
        BackendErrorKind::Corrupt if may_be_replaced(state, left, now) => state.let_candidate_go(&reason, false, now),
        // Its device may be gone for good, for which the configuration has changed (case C34).
        _ if unwanted => state.let_candidate_go(&reason, false, now),
        _ => return false,
    }
    state.fail(now, policy, error.clone(), None);
    true
}

/// Whether another key takes the place of one that makes no sense. Where that is perhaps the published one, and there is
/// no other to publish, a person may still mend it.
fn may_be_replaced(state: &State, left_in_the_device: usize, now: UnixTime) -> bool {
    match state.phase {
        Phase::Generating { .. } => left_in_the_device < KEYS_LEFT_IN_A_DEVICE,
        Phase::Publishing { .. } => state.held_can_be_restored(now),
        _ => true,
    }
}

/// Whether the key in use is elsewhere than keys are to be.
fn held_is_to_move(state: &State, policy: &Policy) -> bool {
    state.held.as_ref().is_some_and(|held| held.key().backend != policy.backend)
}

/// The API server did not do what was asked as the held or the bootstrap credential.
pub(super) fn api_failed(state: &mut State, authority: Authority, failure: ApiFailure, now: UnixTime, policy: &Policy) {
    // A server that asks to be left alone is left alone, whoever asks.
    let bootstrap = authority == Authority::Bootstrap && !matches!(failure, ApiFailure::Throttled { .. });
    match failure {
        ApiFailure::Unauthorized(_) if authority == Authority::Held => {
            // Unexpired, but the API server does not take it, for instance because its authority was replaced: there may
            // be a bootstrap credential that it takes.
            let first = !state.held_refused;
            state.held_refused = true;
            if !first {
                state.fail(now, policy, failure, None);
            }
        }
        // The backend of the key in use does not answer, and is not where keys are to be any more: the device may be gone
        // for good (case C34). There may be a bootstrap credential.
        ApiFailure::NoCredential(_) if authority == Authority::Held && held_is_to_move(state, policy) => {
            state.held_refused = true;
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
            // Bootstrap tokens expire soon after a node has joined, so both are tried in turn.
            state.held_refused = false;
            state.fail(now, policy, failure, None);
        }
        ApiFailure::Throttled { retry_after, .. } => state.fail(now, policy, failure, retry_after),
        _ => state.fail(now, policy, failure, None),
    }
    if let Some(back_off) = &mut state.back_off {
        back_off.bootstrap = bootstrap;
    }
}

/// The API server was asked as what was issued, and did not accept it or did not answer.
pub(super) fn proof_failed(state: &mut State, failure: ApiFailure, now: UnixTime, policy: &Policy) {
    let retry_after = match failure {
        ApiFailure::Throttled { retry_after, .. } => retry_after,
        _ => None,
    };
    let is_refusal = matches!(failure, ApiFailure::Unauthorized(_));
    let refused = Failure {
        reason: format!("the API server refuses what the signer issued: {failure}"),
        hint:
            "check that --cluster-signing-cert-file of kube-controller-manager is an authority in --client-ca-file of \
               kube-apiserver"
                .to_owned(),
    };
    match &mut state.phase {
        Phase::Proving { refusals, next, .. } if is_refusal => {
            *refusals = refusals.saturating_add(1);
            if *refusals < PROOF_ATTEMPTS {
                return state.fail(now, policy, refused, None);
            }
            let next = next.clone();
            state.count_rejection("refused proof");
            request_again(state, next, refused, true, now, policy);
        }
        Phase::Proving { unanswered, .. } => {
            *unanswered = true;
            state.fail(now, policy, failure, retry_after);
        }
        Phase::Retiring { refusals, .. } if is_refusal => {
            *refusals = refusals.saturating_add(1);
            if *refusals < PROOF_ATTEMPTS {
                return state.fail(now, policy, refused, None);
            }
            if state.restore_previous(&refused.reason, false, now) {
                return;
            }
            // What was in use before has expired, so nothing works; the bootstrap credential may.
            state.drop_previous();
            (state.held_refused, state.held_unproven) = (true, false);
            state.discarded = state.discarded.saturating_add(1);
            state.enter(Phase::RETIRING);
            state.fail(now, policy, refused, None);
        }
        _ => state.fail(now, policy, failure, retry_after),
    }
}

/// A signer, an approver or a cleaner has touched the request.
pub(super) fn observed(state: &mut State, next: Candidate, seen: Observation, now: UnixTime, policy: &Policy) {
    let refusal: Failure = match seen {
        Observation::Pending => {
            state.back_off = None;
            return;
        }
        Observation::Issued(Ok(issued)) => {
            state.enter(Phase::Proving { next, issued, refusals: 0, unanswered: false });
            return;
        }
        Observation::Issued(Err(rejection)) => return rejected(state, next, rejection, now, policy),
        Observation::Denied(detail) => format!("the request was denied: {detail}").into(),
        Observation::Failed(detail) => format!("the signer failed: {detail}").into(),
        Observation::Gone => "the request was deleted before a certificate was issued".to_owned().into(),
    };
    request_again(state, next, refusal, false, now, policy);
}

/// What was issued cannot be used.
pub(super) fn rejected(state: &mut State, next: Candidate, rejection: Rejection, now: UnixTime, policy: &Policy) {
    match rejection {
        Rejection::NotYetValid(begin) if is_wanted(&next, policy) => {
            // It is a good certificate, only not now: whoever's clock is off, it is looked at again, and nothing new is
            // requested.
            state.fail(now, policy, rejection, None);
            if let Some(back_off) = &mut state.back_off {
                back_off.until = back_off.until.max(begin.min(now + Policy::LOCAL_RETRY));
            }
        }
        Rejection::OtherKey => {
            // This key's request was answered with somebody else's certificate: nothing can be trusted about it, so the
            // key goes too, and before the next one is made.
            let again = state.count_rejection(rejection.kind()) > 1;
            state.let_candidate_go("the certificate is for another public key", false, now);
            if again { state.fail_hard(now, policy, rejection) } else { state.fail(now, policy, rejection, None) }
        }
        rejection => {
            let again = state.count_rejection(rejection.kind()) > 1;
            request_again(state, next, rejection, again, now, policy);
        }
    }
}

/// The same key is requested again under the next name, unless the configuration no longer wants it, or its pair is
/// perhaps published already.
pub(super) fn request_again(
    state: &mut State,
    next: Candidate,
    refusal: impl Into<Failure>,
    hard: bool,
    now: UnixTime,
    policy: &Policy,
) {
    let refusal = refusal.into();
    if !is_wanted(&next, policy) || matches!(state.phase, Phase::Publishing { .. }) {
        state.let_candidate_go(&refusal.reason, false, now);
        return if hard { state.fail_hard(now, policy, refusal) } else { state.fail(now, policy, refusal, None) };
    }
    if hard {
        state.fail_hard(now, policy, refusal)
    } else {
        state.fail(now, policy, refusal, None)
    }
    if let Some(back_off) = &mut state.back_off {
        back_off.failures = back_off.failures.max(next.attempt);
    }
    let next = Candidate { attempt: next.attempt.saturating_add(1), ..next };
    state.phase = Phase::Requesting { next };
}
