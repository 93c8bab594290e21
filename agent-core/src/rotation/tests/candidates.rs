//! Candidates that cannot succeed, what the configuration wants, and what others do to the pair.

use super::*;

fn elsewhere() -> Policy {
    Policy { backend: "token".to_owned(), ..policy() }
}

/// What is done once the back-off is over and the let-go key is gone.
fn after_letting_go(state: State, action: &Action, slots: &[u64]) -> Action {
    let deadline = Window::of(&credential(1)).deadline;
    back_off(action);
    let (mut state, mut action) = at(state, Event::Woke, deadline);
    if let Phase::Restoring { .. } = state.phase {
        assert_eq!(action, Action::Publish { credential: credential(1) }, "the new pair is perhaps published");
        (state, action) = at(state, Event::Published, deadline);
        (state, action) = at(state, Event::Woke, back_off(&action));
    }
    if slots.is_empty() {
        return action;
    }
    assert_eq!(action, Action::Retire { keys: slots.iter().map(|slot| key(*slot)).collect() });
    at(state, retired(slots), deadline).1
}

/// Cases C26 and C32.
#[test]
fn lost_candidate_is_let_go_for_the_next_id_and_the_held_one_untouched() {
    for kind in [BackendErrorKind::KeyLost, BackendErrorKind::NotFound, BackendErrorKind::Corrupt] {
        for (phase, event) in [
            (1, Event::GenerateFailed(error(kind))),
            (2, Event::SigningFailed(error(kind))),
            (PROVING, Event::ProofKeyFailed(error(kind))),
            (PUBLISHING, Event::PublishFailed(PublishError::Backend(error(kind)))),
        ] {
            let (state, action) = now(in_phase(phases()[phase].clone()), event);
            assert_eq!((state.held.as_ref(), state.keys()), (Some(&credential(1)), vec![&key(1), &key(2)]));
            assert_eq!(state.discarded, 1, "a backend that loses every key is asked ever less often");
            let next = after_letting_go(state, &action, &[2]);
            assert_eq!(next, Action::Generate { key: key(3), algorithm: policy().algorithm });
        }
    }
}

#[test]
fn id_that_somebody_elses_key_has_taken_is_let_go_and_nothing_destroyed() {
    let conflict = || error(BackendErrorKind::Conflict);
    for (phase, event) in [
        (2, Event::SigningFailed(conflict())),
        (PROVING, Event::ProofKeyFailed(conflict())),
        (PUBLISHING, Event::PublishFailed(PublishError::Backend(conflict()))),
    ] {
        let (state, action) = now(in_phase(phases()[phase].clone()), event);
        assert!(state.retiring.is_empty());
        let next = after_letting_go(state, &action, &[]);
        assert_eq!(next, Action::Generate { key: key(3), algorithm: policy().algorithm });
    }
}

/// The pair was perhaps written before a crash: it names a key that is not the certificate's, so nobody can use it.
#[test]
fn pair_whose_id_somebody_elses_key_has_taken_gives_way_to_the_held_one() {
    let conflict = Event::PublishFailed(PublishError::Backend(error(BackendErrorKind::Conflict)));
    let (state, action) = now(in_phase(phases()[PUBLISHING].clone()), conflict);
    let until = back_off(&action);
    let (state, action) = at(state, Event::Woke, until);
    assert_eq!(action, Action::Publish { credential: credential(1) });
    let (state, _) = at(state, Event::Published, until);
    assert_eq!((state.held.as_ref(), state.keys()), (Some(&credential(1)), vec![&key(1)]), "the other is not ours");
}

/// Its key's name is another key's: what was in use before is taken back, and neither destroys what is not ours.
#[test]
fn published_unproven_whose_id_somebody_elses_key_has_taken_gives_way_too() {
    let (state, action) = now(unproven(), Event::ProofKeyFailed(error(BackendErrorKind::Conflict)));
    let Phase::Restoring { dropped, .. } = state.phase.clone() else { panic!("{action:?}") };
    let restored = state.held.clone().expect("the one before");
    assert_eq!(action, Action::Publish { credential: restored.clone() });
    let (state, _) = now(state, Event::Published);
    assert!(!state.keys().contains(&dropped.key()) && state.keys().contains(&restored.key()), "{state:?}");
}

#[test]
fn device_that_does_not_answer_or_is_locked_is_waited_for() {
    for kind in [BackendErrorKind::Unavailable, BackendErrorKind::Locked, BackendErrorKind::Unsupported] {
        for (phase, event) in [
            (1, Event::GenerateFailed(error(kind))),
            (2, Event::SigningFailed(error(kind))),
            (PROVING, Event::ProofKeyFailed(error(kind))),
            (PUBLISHING, Event::PublishFailed(PublishError::Backend(error(kind)))),
        ] {
            let before = in_phase(phases()[phase].clone());
            let (state, action) = now(before.clone(), event);
            let (state, _) = after_back_off(state, &action);
            assert_eq!(state.phase, before.phase);
        }
    }
}

/// A device that answers nonsense would otherwise fill the journal with ids.
#[test]
fn device_that_loses_every_key_and_destroys_none_is_waited_for_at_last() {
    let (mut state, mut clock) = (State::new("5e1f09ac".to_owned()), NOW);
    for _ in 0..400 {
        let (next, action) = at(state, Event::Woke, clock);
        let event = match &action {
            Action::Generate { .. } => Event::GenerateFailed(error(BackendErrorKind::Corrupt)),
            Action::Retire { .. } => retire_failed(),
            Action::Wait { until: Some(until), .. } => {
                clock = *until;
                Event::Woke
            }
            other => panic!("{other:?}"),
        };
        state = at(next, event, clock).0;
    }
    assert_eq!(state.retiring.len(), 16);
}

/// A10: each key goes independently of the others.
#[test]
fn key_that_cannot_be_destroyed_keeps_no_other_and_no_rotation() {
    let before = State { retiring: vec![key(8), key(9)], ..in_phase(Phase::RETIRING) };
    let hint = error(BackendErrorKind::Unavailable).with_hint("plug it in");
    let partly = Event::Retired { destroyed: vec![key(9)], failed: vec![hint] };
    let (state, action) = now(before, partly.clone());
    assert_eq!(state.retiring(), [key(8)]);
    assert!(state.back_off.as_ref().is_some_and(|back_off| back_off.hint == "plug it in"));
    back_off(&action);
    let (state, action) = now(state, Event::RotationRequested);
    assert_eq!(action, Action::Generate { key: key(3), algorithm: policy().algorithm });
    assert_eq!(state.retiring(), [key(8)], "it is tried again after that");
    let idle = State { phase: Phase::Holding, rotation_requested: false, ..state };
    assert_eq!(now(idle, Event::Woke).1, Action::Retire { keys: vec![key(8)] });
}

/// Case C34.
#[test]
fn candidate_elsewhere_than_configured_is_let_go_before_it_is_requested() {
    for phase in [1, 2] {
        let (state, action) = step(in_phase(phases()[phase].clone()), Event::PolicyChanged, NOW, &elsewhere());
        assert_eq!(action, Action::Retire { keys: vec![key(2)] });
        let failed = Event::Retired { destroyed: Vec::new(), failed: vec![error(BackendErrorKind::Unavailable)] };
        let (_, action) = step(state, failed, NOW, &elsewhere());
        let next = KeyName { backend: "token".to_owned(), id: key(3).id };
        assert_eq!(action, Action::Generate { key: next, algorithm: policy().algorithm }, "its device may be dead");
    }
}

/// Case C34.
#[test]
fn candidate_elsewhere_than_configured_is_finished_unless_it_fails() {
    let observe = Action::Observe { next: candidate(2, 1), request: request(), authority: Authority::Held };
    let (state, action) = step(awaiting(), Event::PolicyChanged, NOW, &elsewhere());
    assert_eq!(action, observe, "there is one live request");
    for refusal in [
        Observation::Denied("no".to_owned()),
        Observation::Gone,
        Observation::Issued(Err(Rejection::Missing("a name".to_owned()))),
        Observation::Issued(Err(Rejection::NotYetValid(NOW + DAY))),
    ] {
        let (state, _) = step(state.clone(), Event::Observed(refusal), NOW, &elsewhere());
        assert_eq!((state.phase, state.retiring), (Phase::RETIRING, vec![key(2)]));
    }
    for (phase, event) in [
        (PROVING, Event::ProofKeyFailed(error(BackendErrorKind::Unavailable))),
        (PUBLISHING, Event::PublishFailed(PublishError::Backend(error(BackendErrorKind::Locked)))),
    ] {
        let (state, _) = step(in_phase(phases()[phase].clone()), event, NOW, &elsewhere());
        assert!(matches!(state.phase, Phase::Retiring { .. } | Phase::Restoring { .. }), "{state:?}");
    }
    let (state, _) = step(in_phase(phases()[PUBLISHING].clone()), Event::Published, NOW, &elsewhere());
    let (_, action) = step(state, retired(&[1]), NOW, &elsewhere());
    let next = KeyName { backend: "token".to_owned(), id: key(3).id };
    assert_eq!(action, Action::Generate { key: next, algorithm: policy().algorithm }, "and then it moves");
}

/// Case C34: the key in use is in the dead device too.
#[test]
fn held_key_in_a_device_that_was_given_up_is_not_waited_for_where_there_is_a_bootstrap_credential() {
    let requesting = Candidate { key: KeyName { backend: "token".to_owned(), ..key(2) }, ..candidate(2, 1) };
    let state = in_phase(Phase::Requesting { next: requesting.clone() });
    let no_key = || ApiFailure::NoCredential("the device does not answer".to_owned());
    let (state, action) = step(state, held_failed(no_key()), NOW, &elsewhere());
    assert_eq!(action, Action::Submit { next: requesting.clone(), authority: Authority::Bootstrap });
    // Without one, both are tried in turn.
    let (state, action) = step(state, bootstrap_failed(no_key()), NOW, &elsewhere());
    let (state, action) = step(state, Event::Woke, back_off(&action), &elsewhere());
    assert_eq!(action, Action::Submit { next: requesting, authority: Authority::Held });
    assert!(state.retiring.is_empty(), "the device may be back");

    let (_, action) = now(awaiting(), held_failed(no_key()));
    back_off(&action);
}

#[test]
fn another_template_is_asked_for_at_once_with_another_key() {
    let other = Policy { template: Some(template(1)), ..policy() };
    let (_, action) = step(in_phase(Phase::Holding), Event::TemplateChanged, NOW, &other);
    assert_eq!(action, Action::Generate { key: key(2), algorithm: policy().algorithm });
    let (_, action) = step(in_phase(phases()[2].clone()), Event::TemplateChanged, NOW, &other);
    assert_eq!(action, Action::Retire { keys: vec![key(2)] });
    let (state, action) = step(in_phase(phases()[1].clone()), Event::Generated(public_key(2)), NOW, &other);
    let asks = matches!(&action, Action::Submit { next, .. } if next.template == template(1));
    assert!(asks, "{action:?}");
    assert!(matches!(state.phase, Phase::Requesting { next } if next.template == template(1)));
    let longer = crate::Template { expiration_seconds: Some(7200), ..template(0) };
    let (_, action) =
        step(in_phase(Phase::Holding), Event::TemplateChanged, NOW, &Policy { template: Some(longer), ..policy() });
    assert!(
        matches!(action, Action::Wait { waiting: Waiting::UntilRotation, .. }),
        "it can wait for the next rotation"
    );
}

#[test]
fn template_that_changes_all_the_time_is_asked_for_ever_less_often() {
    let mut state = in_phase(phases()[2].clone());
    for number in 1..4 {
        let wanted = Policy { template: Some(template(number)), ..policy() };
        let slot = number + 1;
        let (next, action) = step(state, Event::TemplateChanged, NOW, &wanted);
        assert_eq!(action, Action::Retire { keys: vec![key(slot)] });
        let (next, _) = step(next, retired(&[slot]), NOW, &wanted);
        state = step(next, Event::Generated(public_key(slot + 1)), NOW, &wanted).0;
        assert!(matches!(state.phase, Phase::Requesting { .. }), "{state:?}");
    }
    let wanted = Policy { template: Some(template(9)), ..policy() };
    back_off(&step(state, Event::TemplateChanged, NOW, &wanted).1);
}

/// Case C11.
#[test]
fn without_addresses_nothing_new_is_asked_for_and_status_says_so() {
    let nowhere = Policy { template: None, ..policy() };
    let deadline = Window::of(&credential(1)).deadline;
    let until = Some(credential(1).not_after());
    let missing = Action::Wait { until, waiting: Waiting::AddressesMissing };
    for phase in [0, 1] {
        let (state, action) = step(in_phase(phases()[phase].clone()), Event::AddressesMissing, deadline, &nowhere);
        assert_eq!(action, missing);
        let (_, action) = step(state, Event::TemplateChanged, deadline, &policy());
        assert_eq!(action, Action::Generate { key: key(2), algorithm: policy().algorithm });
    }
    let (_, action) = step(awaiting(), Event::AddressesMissing, NOW, &nowhere);
    assert!(matches!(action, Action::Observe { .. }), "what is asked for may still be right");
}

/// Case C46.
#[test]
fn pair_that_something_else_wrote_is_held_and_the_old_one_kept_until_it_is_proven() {
    let found = FoundPair { credential: credential(7), key_is_ours: false };
    for phase in phases() {
        let (state, action) = now(in_phase(phase.clone()), Event::PairReplaced(found.clone()));
        assert_eq!(state.held.as_ref(), Some(&credential(7)));
        assert_eq!(action, Action::Prove { credential: credential(7) }, "{phase:?}");
        let (state, action) = now(state, Event::Proven);
        let Action::Retire { keys } = &action else { panic!("{action:?}") };
        assert!(keys.contains(&key(1)) && !keys.contains(&key(7)));
        // It is not ours to destroy when it is replaced in turn.
        let publishing = Phase::Publishing { next: candidate(10, 1), issued: credential(10), proven: true };
        let (state, _) = now(State { phase: publishing, retiring: Vec::new(), ..state }, Event::Published);
        assert_eq!((state.keys(), state.foreign()), (vec![&key(10)], &[][..]));
    }
    let own = FoundPair { credential: credential(1), key_is_ours: true };
    let same = now(in_phase(Phase::Holding), Event::PairReplaced(own));
    assert_eq!(same, now(in_phase(Phase::Holding), Event::Woke));
}

#[test]
fn first_pair_that_is_found_is_held_and_nothing_is_to_be_proven() {
    let found = Found::Pair(FoundPair { credential: credential(7), key_is_ours: true });
    let state = State::recovered(None, "5e1f09ac".to_owned(), found, NOW, &policy());
    assert_eq!((state.installation(), state.last_slot()), ("5e1f09ac", 7));
    let (state, action) = now(state, Event::Woke);
    assert!(matches!(action, Action::Wait { waiting: Waiting::UntilRotation, .. }));
    assert!(!state.held_is_unproven());
}

#[test]
fn recovery_keeps_the_installation_and_lets_go_of_what_is_gone() {
    let recovered = |found| State::recovered(Some(awaiting()), "ffffffff".to_owned(), found, NOW, &policy());
    assert_eq!(recovered(Found::AsJournalled), awaiting());
    let lost = recovered(Found::KeyLost);
    assert!(lost.held_key_is_lost() && lost.phase == awaiting().phase);
    let nothing = recovered(Found::Nothing);
    assert_eq!((nothing.held(), nothing.phase(), nothing.installation()), (None, &awaiting().phase, "5e1f09ac"));
    let restored = State::recovered(Some(unproven()), String::new(), Found::KeyLost, NOW, &policy());
    assert!(matches!(restored.phase, Phase::Restoring { dropped, .. } if dropped == credential(2)));
}
