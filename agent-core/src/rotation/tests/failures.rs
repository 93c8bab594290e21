//! Refusals, errors and losses, and how long each is waited for.

use super::*;

/// Cases C01 and C28.
#[test]
fn refused_means_same_key_next_attempt_and_ever_longer_waits() {
    let refusals = [
        Observation::Denied("no".to_owned()),
        Observation::Failed("no".to_owned()),
        Observation::Gone,
        Observation::Issued(Err(Rejection::Missing("a name".to_owned()))),
        Observation::Issued(Err(Rejection::Expired(NOW))),
    ];
    for refusal in refusals {
        let (state, action) = now(awaiting(), Event::Observed(refusal));
        let (_, action) = after_back_off(state, &action);
        assert_eq!(action, Action::Submit { next: candidate(2, 2), authority: Authority::Held });
    }

    let (mut state, mut clock, mut reasons) = (awaiting(), NOW, 0);
    for attempt in 2..40 {
        let (refused, action) = at(state, Event::Observed(Observation::Denied("policy".to_owned())), clock);
        assert_eq!(refused.failures(), attempt - 1, "a request that was accepted does not shorten the waits");
        reasons += u32::from(refused.back_off.as_ref().is_some_and(|back_off| back_off.reason.contains("policy")));
        clock = back_off(&action);
        let (requesting, action) = at(refused, Event::Woke, clock);
        assert_eq!(action, Action::Submit { next: candidate(2, attempt), authority: Authority::Held });
        state = at(requesting, Event::Submitted(request()), clock).0;
    }
    assert_eq!((reasons, state.keys()), (38, vec![&key(1), &key(2)]));
    assert!(clock.since(NOW) > Duration::from_secs(3600), "38 refusals took only {:?}", clock.since(NOW));
}

#[test]
fn any_other_failure_means_the_same_request_again() {
    let failures = [
        ApiFailure::Unreachable("down".to_owned()),
        ApiFailure::Forbidden("no".to_owned()),
        ApiFailure::Server("500".to_owned()),
        ApiFailure::Invalid("422".to_owned()),
    ];
    for failure in failures {
        for phase in [2, 3] {
            let before = in_phase(phases()[phase].clone());
            let (state, action) = now(before.clone(), held_failed(failure.clone()));
            assert_eq!(state.phase, before.phase);
            let (_, again) = after_back_off(state, &action);
            assert_eq!(again, now(before, Event::Woke).1);
        }
    }
}

/// Case C20.
#[test]
fn throttled_waits_as_long_as_the_server_asks_and_no_more_than_an_hour() {
    let throttled = |seconds| {
        let retry_after = Some(Duration::from_secs(seconds));
        let (_, action) =
            now(awaiting(), held_failed(ApiFailure::Throttled { detail: "busy".to_owned(), retry_after }));
        back_off(&action).since(NOW).as_secs()
    };
    assert!((30..33).contains(&throttled(30)));
    assert!((3600..3603).contains(&throttled(86_400)));
}

/// Case C07.
#[test]
fn refused_held_credential_means_bootstrap_at_once_and_then_the_held_one_again() {
    let unauthorized = ApiFailure::Unauthorized("401".to_owned());
    let (state, action) = now(in_phase(phases()[2].clone()), held_failed(unauthorized.clone()));
    assert_eq!(action, Action::Submit { next: candidate(2, 1), authority: Authority::Bootstrap });
    for refused in [unauthorized.clone(), ApiFailure::Forbidden("403".to_owned())] {
        let (state, action) = now(state.clone(), bootstrap_failed(refused));
        let (_, action) = after_back_off(state, &action);
        assert_eq!(action, Action::Submit { next: candidate(2, 1), authority: Authority::Held });
    }
    let (_, action) = now(in_phase(Phase::Holding), Event::HeldRefused { key_lost: false });
    assert_eq!(action, Action::Generate { key: key(2), algorithm: policy().algorithm });
}

/// Cases C03 and C21.
#[test]
fn without_any_credential_it_looks_again_every_ten_seconds_and_at_once_when_a_file_changes() {
    let mut state = in_phase(phases()[2].clone());
    let ended = NOW + DAY * 31;
    for _ in 0..30 {
        let missing = bootstrap_failed(ApiFailure::NoCredential("no bootstrap kubeconfig".to_owned()));
        let (next, action) = at(state, missing, ended);
        assert!(back_off(&action).since(ended) <= Policy::LOCAL_RETRY);
        assert!(next.back_off.as_ref().is_some_and(|back_off| back_off.hint.contains("--bootstrap-kubeconfig")));
        state = next;
    }
    let (_, action) = at(state, Event::LocalChange, ended);
    assert_eq!(action, Action::Submit { next: candidate(2, 1), authority: Authority::Bootstrap });
}

#[test]
fn certificate_for_another_key_costs_this_key_before_the_next_is_made() {
    let (state, action) = now(awaiting(), Event::Observed(Observation::Issued(Err(Rejection::OtherKey))));
    let (state, action) = after_back_off(state, &action);
    assert_eq!(action, Action::Retire { keys: vec![key(2)] });
    let (state, _) = now(state, retired(&[2]));
    assert_eq!(state.discarded, 1);
    let (_, action) = at(state, Event::Woke, Window::of(&credential(1)).deadline);
    assert_eq!(action, Action::Generate { key: key(3), algorithm: policy().algorithm });
}

#[test]
fn id_of_somebody_elses_key_is_passed_over() {
    let conflict = Event::GenerateFailed(error(BackendErrorKind::Conflict));
    let (state, action) = now(in_phase(phases()[1].clone()), conflict);
    assert!(state.retiring.is_empty(), "it is not ours to destroy");
    back_off(&action);
    let (_, action) = at(state, Event::Woke, Window::of(&credential(1)).deadline);
    assert_eq!(action, Action::Generate { key: key(3), algorithm: policy().algorithm });
}

/// Case C26.
#[test]
fn lost_key_in_use_enrols_again_by_policy_only() {
    let lost = Event::HeldRefused { key_lost: true };
    let waits = Policy { enrol_after_key_loss: false, ..policy() };
    let (_, action) = step(in_phase(Phase::Holding), lost.clone(), NOW, &waits);
    assert_eq!(action, Action::Wait { until: Some(NOW + DAY * 30), waiting: Waiting::KeyLost });
    // The loss may show only when the next certificate is asked for.
    for phase in [0, 1, 2, 3] {
        let before = in_phase(phases()[phase].clone());
        let (state, action) = step(before.clone(), lost.clone(), NOW, &waits);
        assert_eq!(action, Action::Wait { until: Some(NOW + DAY * 30), waiting: Waiting::KeyLost }, "{before:?}");
        let (state, _) = step(state, Event::HeldKeyFound, NOW, &waits);
        assert_eq!(state.authority(NOW), Authority::Held, "the device was restored");
        assert_eq!(state.phase, before.phase);
    }
    let (state, action) = now(in_phase(Phase::Holding), lost.clone());
    assert_eq!(action, Action::Generate { key: key(2), algorithm: policy().algorithm });
    assert_eq!(state.authority(NOW), Authority::Bootstrap);
    let (state, _) = now(State { held: None, ..unproven() }, Event::Woke);
    assert_eq!(now(state.clone(), lost).0, state, "there is nothing to lose");
}

/// Case C27.
#[test]
fn device_that_is_back_is_asked_at_once() {
    for (phase, failure) in [
        (1, Event::GenerateFailed(error(BackendErrorKind::Unavailable))),
        (2, Event::SigningFailed(error(BackendErrorKind::Unavailable))),
        (PROVING, Event::ProofKeyFailed(error(BackendErrorKind::Unavailable))),
        (RETIRING, retire_failed()),
    ] {
        let before = in_phase(phases()[phase].clone());
        let (_, repeated) = now(before.clone(), Event::Woke);
        let (state, action) = now(before, failure.clone());
        back_off(&action);
        let (state, action) = now(state, Event::BackendFound);
        assert_eq!(action, repeated);
        let (state, _) = now(state, failure);
        assert_eq!(state.failures(), 2, "a device that comes and goes is asked ever less often");
    }
    let (state, waiting) = now(awaiting(), held_failed(ApiFailure::Server("500".to_owned())));
    assert_eq!(now(state, Event::BackendFound).1, waiting, "it was not the device's fault");
}
