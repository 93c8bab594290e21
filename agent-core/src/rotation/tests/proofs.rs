//! Prove, then publish (case C31).

use super::*;

fn unauthorized() -> Event {
    Event::ApiFailed { authority: Authority::Issued, failure: ApiFailure::Unauthorized("401".to_owned()) }
}

fn unreachable() -> Event {
    Event::ApiFailed { authority: Authority::Issued, failure: ApiFailure::Unreachable("down".to_owned()) }
}

/// Refuses as often as the API server is asked.
fn refused_for_good(mut state: State, mut clock: UnixTime) -> (State, Action, UnixTime) {
    for attempt in 1..PROOF_ATTEMPTS {
        let (next, action) = at(state, unauthorized(), clock);
        assert!(next.failures() >= attempt);
        clock = back_off(&action);
        let (next, action) = at(next, Event::Woke, clock);
        assert!(matches!(action, Action::Prove { .. }));
        state = next;
    }
    let (state, action) = at(state, unauthorized(), clock);
    (state, action, clock)
}

#[test]
fn what_the_api_server_refuses_is_not_published_and_costs_no_key() {
    let (state, action, clock) = refused_for_good(in_phase(phases()[PROVING].clone()), NOW);
    assert_eq!((state.held.as_ref(), state.keys()), (Some(&credential(1)), vec![&key(1), &key(2)]));
    assert_eq!(state.authority(clock), Authority::Held, "it says nothing about the held one");
    assert_eq!(state.phase, Phase::Requesting { next: candidate(2, 2) });
    assert!(back_off(&action).since(clock) >= Policy::BACK_OFF_CAP / 2, "backed off hard");
    let reason = &state.back_off.as_ref().expect("it failed").reason;
    assert!(reason.contains("the API server refuses what the signer issued"), "{reason}");
    // Once more, and it is the same.
    let (state, _) = at(state, Event::Woke, back_off(&action));
    let (state, _) = at(state, Event::Submitted(request()), back_off(&action));
    let (state, _) = at(state, Event::Observed(Observation::Issued(Ok(credential(2)))), back_off(&action));
    let (state, again, clock) = refused_for_good(state, back_off(&action));
    assert!(back_off(&again).since(clock) >= Policy::BACK_OFF_CAP / 2);
    assert_eq!(state.phase, Phase::Requesting { next: candidate(2, 3) });
}

#[test]
fn a_person_who_has_fixed_the_signer_gets_another_certificate_at_once() {
    let (state, action) = now(in_phase(phases()[PROVING].clone()), unauthorized());
    back_off(&action);
    let (_, action) = now(state, Event::RotationRequested);
    assert_eq!(action, Action::Submit { next: candidate(2, 2), authority: Authority::Held });
    let (state, action, _) = refused_for_good(in_phase(phases()[PROVING].clone()), NOW);
    back_off(&action);
    let (_, action) = now(state, Event::RotationRequested);
    assert_eq!(action, Action::Submit { next: candidate(2, 2), authority: Authority::Held });
}

#[test]
fn without_a_good_credential_a_refused_one_is_not_published_either() {
    for held in [None, Some(credential(1))] {
        let before = State { held, held_refused: true, ..in_phase(phases()[PROVING].clone()) };
        let (state, _, _) = refused_for_good(before.clone(), NOW);
        assert_eq!((state.held, state.retiring), (before.held, Vec::new()));
    }
}

#[test]
fn while_the_api_server_does_not_answer_the_held_one_stays_until_it_is_about_to_expire() {
    let (mut state, mut clock) = (in_phase(phases()[PROVING].clone()), NOW);
    for _ in 0..20 {
        let (next, action) = at(state, unreachable(), clock);
        clock = back_off(&action);
        let (next, action) = at(next, Event::Woke, clock);
        assert_eq!(action, Action::Prove { credential: credential(2) });
        state = next;
    }
    let last_call = Window::of(&credential(1)).closes.max(credential(1).not_after() - Policy::FILE_CONSUMER_DELAY * 2);
    let before = last_call - Duration::from_secs(1);
    assert_eq!(at(state.clone(), Event::Woke, before).1, Action::Prove { credential: credential(2) });
    let (state, action) = at(state, Event::Woke, last_call);
    assert_eq!(action, Action::Publish { credential: credential(2) });
    assert!(matches!(state.phase, Phase::Publishing { proven: false, .. }));
    let refused_once = in_phase(proving(1, true));
    assert_eq!(at(refused_once, Event::Woke, last_call).1, Action::Prove { credential: credential(2) });
}

#[test]
fn where_nothing_good_is_held_no_answer_is_reason_enough_to_publish() {
    let nothing = State { held: None, ..in_phase(phases()[PROVING].clone()) };
    let refused = State { held_refused: true, ..in_phase(phases()[PROVING].clone()) };
    let lost = State { held_key_lost: true, ..in_phase(phases()[PROVING].clone()) };
    for before in [nothing, refused, lost] {
        assert_eq!(now(before, unreachable()).1, Action::Publish { credential: credential(2) });
    }
    let (state, _) = now(in_phase(phases()[PROVING].clone()), unreachable());
    let shorter = Credential::simulated(1, NOW, NOW + DAY).with_key(key(1));
    let expired = State { held: Some(shorter), ..state };
    assert_eq!(at(expired, Event::Woke, NOW + DAY).1, Action::Publish { credential: credential(2) });
}

#[test]
fn what_was_in_use_before_stays_until_what_is_published_unproven_is_proven() {
    let state = unproven();
    assert_eq!(state.keys(), [&key(2), &key(1)]);
    let (state, action) = now(state, Event::Woke);
    assert_eq!(action, Action::Prove { credential: credential(2) });
    let (state, action) = now(state, unreachable());
    let (state, _) = after_back_off(state, &action);
    assert_eq!((state.keys(), state.retiring.len()), (vec![&key(2), &key(1)], 0));
    let (state, action) = now(state, Event::Proven);
    assert_eq!(action, Action::Retire { keys: vec![key(1)] });
    assert!(!state.held_is_unproven());
}

#[test]
fn what_was_in_use_before_is_published_again_when_its_successor_is_refused() {
    let (state, action, clock) = refused_for_good(unproven(), NOW);
    assert_eq!(action, Action::Publish { credential: credential(1) }, "and at once");
    assert_eq!(state.keys(), [&key(1), &key(2)]);
    let full = PublishError::Disk { detail: "no space left on device".to_owned(), hint: String::new() };
    let (state, _) = at(state, Event::PublishFailed(full), clock);
    assert!(state.retiring.is_empty(), "what is on disk is not destroyed");
    let (state, action) = at(state, Event::Published, clock);
    assert_eq!((state.held.as_ref(), state.retiring()), (Some(&credential(1)), &[key(2)][..]));
    let (_, action) = at(state, Event::Woke, back_off(&action));
    assert_eq!(action, Action::Retire { keys: vec![key(2)] });
}

#[test]
fn what_was_in_use_before_is_published_again_when_its_successors_key_is_lost() {
    for event in [Event::ProofKeyFailed(error(BackendErrorKind::KeyLost)), Event::HeldRefused { key_lost: true }] {
        let (state, action) = now(unproven(), event);
        assert_eq!(action, Action::Publish { credential: credential(1) });
        assert!(state.held_is_good(NOW));
    }
}

#[test]
fn what_was_to_be_published_again_and_expires_is_left() {
    let (state, _, _) = refused_for_good(unproven(), NOW);
    let (state, _) = at(state, Event::Woke, credential(1).not_after());
    assert_eq!((state.held.as_ref(), state.retiring()), (Some(&credential(2)), &[key(1)][..]));
}

/// An API server may be away for as long as a certificate lives.
#[test]
fn what_is_never_proven_is_replaced_when_its_time_has_come() {
    let (state, action) = at(unproven(), Event::Woke, Window::of(&credential(2)).deadline);
    assert_eq!(action, Action::Retire { keys: vec![key(1)] });
    let (_, action) = at(state, retired(&[1]), Window::of(&credential(2)).deadline);
    assert_eq!(action, Action::Generate { key: key(3), algorithm: policy().algorithm });
}

/// Case C50: a life that is shorter than the way to the API server.
#[test]
fn what_expires_before_it_is_proven_or_published_is_requested_again_with_a_wait() {
    let longer = Credential::simulated(1, NOW, NOW + DAY * 60).with_key(key(1)).installed(NOW);
    for (phase, name) in [(PROVING, "requesting"), (PUBLISHING, "restoring")] {
        let held = State { held: Some(longer.clone()), ..in_phase(phases()[phase].clone()) };
        let (state, action) = at(held, Event::Woke, NOW + DAY * 30);
        assert_eq!(state.phase.name(), name);
        assert!(state.back_off.is_some_and(|back_off| back_off.hint.contains("--cluster-signing-duration")));
        back_off(&action);
    }
}

/// Case C50.
#[test]
fn the_same_rejection_twice_in_a_row_is_backed_off_hard() {
    for rejection in [
        Rejection::Expired(NOW),
        Rejection::Missing("a name".to_owned()),
        Rejection::Untrusted("issuer".to_owned()),
        Rejection::OtherSubject { requested: String::new(), issued: String::new() },
        Rejection::Unreadable("bytes".to_owned()),
    ] {
        let rejected = || Event::Observed(Observation::Issued(Err(rejection.clone())));
        let (state, action) = now(awaiting(), rejected());
        assert!(back_off(&action).since(NOW) < Policy::BACK_OFF_CAP / 4, "the first may be an accident");
        let hint = &state.back_off.as_ref().expect("it failed").hint;
        assert_eq!(hint, rejection.hint());
        let again = State { phase: awaiting().phase, back_off: None, ..state.clone() };
        let (_, action) = now(again, rejected());
        assert!(back_off(&action).since(NOW) >= Policy::BACK_OFF_CAP / 2, "{rejection:?}");
        let other = Event::Observed(Observation::Denied("no".to_owned()));
        let (_, action) = now(State { phase: awaiting().phase, back_off: None, ..state }, other);
        assert!(back_off(&action).since(NOW) < Policy::BACK_OFF_CAP / 4, "another answer is another matter");
    }
}
