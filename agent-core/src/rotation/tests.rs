//! One transition at a time.

use std::time::Duration;

use pintle_plugins_api::BackendError;

use super::failure::PROOF_ATTEMPTS;
use super::simulation::{policy, public_key, template};
use super::*;
use crate::policy::Window;
use crate::{Credential, KeyName, Rejection};

const DAY: Duration = Duration::from_secs(86_400);
const NOW: UnixTime = UnixTime::from_seconds(1_800_000_000);

fn key(slot: u64) -> KeyName {
    KeyName { backend: policy().backend, id: policy().key_prefix.key_id(slot) }
}

fn candidate(slot: u64, attempt: u32) -> Candidate {
    Candidate { key: key(slot), public_key: public_key(slot), template: template(0), attempt }
}

fn request() -> SubmittedRequest {
    SubmittedRequest { name: "pintle-worker-1-0".to_owned(), uid: "7".to_owned() }
}

/// A certificate of thirty days for the key of this slot, just installed.
fn credential(slot: u64) -> Credential {
    Credential::simulated(slot, NOW - Duration::from_secs(300), NOW + DAY * 30).with_key(key(slot)).installed(NOW)
}

fn holding(held: Credential) -> State {
    State { held: Some(held), held_template: Some(template(0)), last_slot: 1, ..State::new("5e1f09ac".to_owned()) }
}

fn proving(refusals: u32, unanswered: bool) -> Phase {
    Phase::Proving { next: candidate(2, 1), issued: credential(2), refusals, unanswered }
}

/// Holding the credential of slot 1, in this phase of getting that of slot 2.
fn in_phase(phase: Phase) -> State {
    let last_slot = if phase == Phase::Holding { 1 } else { 2 };
    let retiring = if matches!(phase, Phase::Retiring { .. }) { vec![key(9)] } else { Vec::new() };
    State { phase, last_slot, retiring, ..holding(credential(1)) }
}

const PROVING: usize = 4;
const PUBLISHING: usize = 5;
const RESTORING: usize = 6;
const RETIRING: usize = 7;

fn phases() -> [Phase; 8] {
    [
        Phase::Holding,
        Phase::Generating { key: key(2) },
        Phase::Requesting { next: candidate(2, 1) },
        Phase::Awaiting { next: candidate(2, 1), request: request() },
        proving(0, false),
        Phase::Publishing { next: candidate(2, 1), issued: credential(2), proven: true },
        Phase::Restoring { dropped: credential(2), reason: "refused".to_owned(), key_lost: false },
        Phase::RETIRING,
    ]
}

/// The credential of slot 2 is published unproven, and that of slot 1 is kept.
fn unproven() -> State {
    let publishing = Phase::Publishing { next: candidate(2, 1), issued: credential(2), proven: false };
    now(in_phase(publishing), Event::Published).0
}

fn awaiting() -> State {
    in_phase(phases()[3].clone())
}

fn error(kind: BackendErrorKind) -> BackendError {
    BackendError::new(kind, "device")
}

fn held_failed(failure: ApiFailure) -> Event {
    Event::ApiFailed { authority: Authority::Held, failure }
}

fn bootstrap_failed(failure: ApiFailure) -> Event {
    Event::ApiFailed { authority: Authority::Bootstrap, failure }
}

fn at(state: State, event: Event, now: UnixTime) -> (State, Action) {
    step(state, event, now, &policy())
}

fn now(state: State, event: Event) -> (State, Action) {
    at(state, event, NOW)
}

fn retired(slots: &[u64]) -> Event {
    Event::Retired { destroyed: slots.iter().map(|slot| key(*slot)).collect(), failed: Vec::new() }
}

fn retire_failed() -> Event {
    Event::Retired { destroyed: Vec::new(), failed: vec![error(BackendErrorKind::Unavailable)] }
}

/// The end of the back-off that the action waits for.
fn back_off(action: &Action) -> UnixTime {
    match action {
        Action::Wait { until: Some(until), waiting: Waiting::BackOff } => *until,
        other => panic!("no back-off but {other:?}"),
    }
}

/// What is done once the back-off is over.
fn after_back_off(state: State, action: &Action) -> (State, Action) {
    let until = back_off(action);
    assert!(until > NOW);
    at(state, Event::Woke, until)
}

#[test]
fn enrolment_goes_from_nothing_to_holding() {
    let (state, action) = now(State::default(), Event::Woke);
    assert_eq!(action, Action::Generate { key: key(1), algorithm: policy().algorithm });
    let (state, action) = now(state, Event::Generated(public_key(1)));
    assert_eq!(action, Action::Submit { next: candidate(1, 1), authority: Authority::Bootstrap });
    let (state, action) = now(state, Event::Submitted(request()));
    let observe = Action::Observe { next: candidate(1, 1), request: request(), authority: Authority::Bootstrap };
    assert_eq!(action, observe);
    let (state, action) = now(state, Event::Observed(Observation::Pending));
    assert_eq!(action, observe);
    let (state, action) = now(state, Event::Observed(Observation::Issued(Ok(credential(1)))));
    assert_eq!((action, state.held.as_ref()), (Action::Prove { credential: credential(1) }, None));
    let (state, action) = now(state, Event::Proven);
    assert_eq!(action, Action::Publish { credential: credential(1) });
    let (state, action) = now(state, Event::Published);
    assert_eq!(state.held.as_ref(), Some(&credential(1)));
    let until = Some(Window::of(&credential(1)).deadline);
    assert_eq!((action, state.phase), (Action::Wait { until, waiting: Waiting::UntilRotation }, Phase::Holding));
}

#[test]
fn rotation_keeps_the_old_key_until_the_new_one_is_proven() {
    let deadline = Window::of(&credential(1)).deadline;
    let (state, action) = at(in_phase(Phase::Holding), Event::Woke, deadline);
    assert_eq!(action, Action::Generate { key: key(2), algorithm: policy().algorithm });
    let (state, action) = at(state, Event::Generated(public_key(2)), deadline);
    assert_eq!(action, Action::Submit { next: candidate(2, 1), authority: Authority::Held });
    assert_eq!(state.keys(), [&key(1), &key(2)]);
    let (state, _) = at(state, Event::Submitted(request()), deadline);
    let (state, _) = at(state, Event::Observed(Observation::Issued(Ok(credential(2)))), deadline);
    let (state, action) = at(state, Event::Proven, deadline);
    assert_eq!((action, state.keys()), (Action::Publish { credential: credential(2) }, vec![&key(1), &key(2)]));
    let (state, action) = at(state, Event::Published, deadline);
    assert_eq!((action, state.keys()), (Action::Retire { keys: vec![key(1)] }, vec![&key(2), &key(1)]));
    let (state, action) = at(state, retire_failed(), deadline);
    let (state, action) = at(state, Event::Woke, back_off(&action));
    assert_eq!(action, Action::Retire { keys: vec![key(1)] });
    let (state, _) = at(state, retired(&[1]), deadline);
    assert_eq!((&state.phase, state.keys()), (&Phase::Holding, vec![&key(2)]));
}

/// Case C06.
#[test]
fn not_yet_valid_waits_and_requests_nothing_new() {
    let early = || Event::Observed(Observation::Issued(Err(Rejection::NotYetValid(NOW + DAY))));
    let (mut state, mut clock) = (awaiting(), NOW);
    for _ in 0..5 {
        let (next, action) = at(state, early(), clock);
        assert_eq!(next.phase, awaiting().phase);
        clock = back_off(&action);
        state = next;
    }
    let (_, action) = at(state, Event::Woke, clock);
    assert_eq!(action, Action::Observe { next: candidate(2, 1), request: request(), authority: Authority::Held });
}

#[test]
fn rotation_off_holds_until_the_end_and_then_enrols() {
    let off = Policy { rotate: false, ..policy() };
    let end = NOW + DAY * 30;
    let (state, action) = step(in_phase(Phase::Holding), Event::Woke, NOW + DAY * 29, &off);
    assert_eq!(action, Action::Wait { until: Some(end), waiting: Waiting::RotationOff });
    let (_, action) = step(state, Event::Woke, end, &off);
    assert_eq!(action, Action::Generate { key: key(2), algorithm: off.algorithm });
}

#[test]
fn requested_rotation_begins_at_once_and_ends_a_back_off() {
    let (_, action) = now(in_phase(Phase::Holding), Event::RotationRequested);
    assert_eq!(action, Action::Generate { key: key(2), algorithm: policy().algorithm });
    let (state, _) = now(awaiting(), held_failed(ApiFailure::Server("500".to_owned())));
    let (state, action) = now(state, Event::RotationRequested);
    assert_eq!(action, Action::Observe { next: candidate(2, 1), request: request(), authority: Authority::Held });
    let (state, _) = now(state, Event::Observed(Observation::Issued(Ok(credential(2)))));
    let (state, _) = now(state, Event::Proven);
    let (state, _) = now(state, Event::Published);
    assert!(!state.rotation_requested, "the rotation that went on is the one that was asked for");
}

/// Old keys wait for the last connections that use them, which takes as long as the proxy lets these drain.
#[test]
fn rotation_requested_while_old_keys_wait_follows_when_they_are_destroyed() {
    let of_proven = (in_phase(Phase::RETIRING), vec![retired(&[9])]);
    let of_unproven = (unproven(), vec![Event::Proven, retired(&[1])]);
    for (before, then) in [of_proven, of_unproven] {
        let (mut state, mut action) = now(before.clone(), Event::RotationRequested);
        assert_eq!(action, now(before, Event::Woke).1, "what is under way is ended first");
        for event in then {
            // Also after a restart in between.
            (state, _) = now(state, Event::Woke);
            (state, action) = now(state, event);
        }
        assert_eq!(action, Action::Generate { key: key(3), algorithm: policy().algorithm });
        let publishing = Phase::Publishing { next: candidate(3, 1), issued: credential(3), proven: true };
        let publishing = State { phase: publishing, ..state };
        let (state, _) = now(publishing, Event::Published);
        assert!(!state.rotation_requested, "and one rotation is enough");
    }
}

#[test]
fn key_in_another_backend_is_rotated_at_once() {
    let token = Policy { backend: "token".to_owned(), ..policy() };
    let (_, action) = step(in_phase(Phase::Holding), Event::Woke, NOW, &token);
    let key = KeyName { backend: "token".to_owned(), id: key(2).id };
    assert_eq!(action, Action::Generate { key, algorithm: token.algorithm });
}

#[test]
fn published_twice_never_destroys_its_own_key() {
    let publishing = phases()[PUBLISHING].clone();
    let adopted = State { held: Some(credential(2)), retiring: vec![key(2), key(1)], ..in_phase(publishing) };
    let (state, _) = now(adopted, Event::Published);
    assert_eq!(state.retiring, [key(1)]);
}

/// Case C29.
#[test]
fn full_disk_keeps_what_was_issued() {
    let full = PublishError::Disk { detail: "no space left on device".to_owned(), hint: "make room".to_owned() };
    let (state, action) = now(in_phase(phases()[PUBLISHING].clone()), Event::PublishFailed(full));
    assert!(back_off(&action).since(NOW) <= Policy::LOCAL_RETRY);
    assert!(state.back_off.as_ref().is_some_and(|back_off| back_off.hint == "make room"));
    assert_eq!(now(state, Event::LocalChange).1, Action::Publish { credential: credential(2) });
}

/// Cases C14 and C23: after a restart the journal goes on where it was, whatever else is gone.
#[test]
fn restart_repeats_the_action_of_the_phase() {
    for phase in phases() {
        let (state, action) = now(in_phase(phase), Event::Woke);
        assert_eq!(now(state.clone(), Event::Woke), (state, action));
    }
}

/// Case C05.
#[test]
fn clock_set_back_does_not_stretch_a_wait() {
    let (state, action) = now(awaiting(), held_failed(ApiFailure::Server("500".to_owned())));
    back_off(&action);
    let (_, action) = at(state, Event::Woke, NOW - DAY * 365);
    assert_eq!(action, Action::Observe { next: candidate(2, 1), request: request(), authority: Authority::Held });
}

#[test]
fn what_others_say_of_a_failure_is_one_line() {
    let denied = Event::Observed(Observation::Denied("no\nREADY=1\u{1b}[2J".to_owned()));
    let (state, _) = step(awaiting(), denied, NOW, &policy());
    let reason = state.back_off.expect("it failed").reason;
    assert!(reason.ends_with("no\\nREADY=1\\u{1b}[2J"), "{reason}");
}

#[test]
fn a_name_that_is_taken_is_left_for_the_next_one() {
    let requesting = in_phase(Phase::Requesting { next: candidate(2, 1) });
    let (state, action) = step(requesting, Event::NameTaken, NOW, &policy());
    assert_eq!(state.phase, Phase::Requesting { next: candidate(2, 2) });
    assert!(matches!(action, Action::Wait { waiting: Waiting::BackOff, .. }));
    let (unchanged, _) = step(awaiting(), Event::NameTaken, NOW, &policy());
    assert_eq!(unchanged, awaiting());
}

#[test]
fn another_bootstrap_credential_does_not_wait_for_what_failed_with_the_last_one() {
    let asking = State { held: None, ..in_phase(phases()[2].clone()) };
    let submit = Action::Submit { next: candidate(2, 1), authority: Authority::Bootstrap };
    let failed = |failure| now(asking.clone(), Event::ApiFailed { authority: Authority::Bootstrap, failure }).0;
    for failure in [ApiFailure::Unauthorized("401".to_owned()), ApiFailure::Unreachable("refused".to_owned())] {
        assert_eq!(now(failed(failure), Event::LocalChange).1, submit);
    }
    let retry_after = Some(Duration::from_secs(30));
    let throttled = failed(ApiFailure::Throttled { detail: "429".to_owned(), retry_after });
    back_off(&now(throttled, Event::LocalChange).1);
}

mod candidates;
mod failures;
mod journal;
mod proofs;
mod unexpected_events;
