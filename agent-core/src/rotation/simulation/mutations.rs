//! Steps with one thing wrong each: a simulation that does not notice them would prove nothing.

use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::*;

/// Each is `step` with one thing wrong, and the promise for which the simulation must catch it.
fn mutations() -> Vec<(&'static str, &'static [Promise], Step)> {
    let mut mutations = of_keys();
    mutations.extend(of_requests());
    mutations.extend(of_proofs());
    mutations.extend(of_wishes());
    mutations
}

fn of_keys() -> Vec<(&'static str, &'static [Promise], Step)> {
    vec![
        ("retires the key in use", &[Promise::KeysInUseLive], |state, event, now, policy| {
            let (mut state, action) = step(state, event, now, policy);
            match action {
                Action::Retire { .. } => {
                    state.retiring = state.held.iter().map(|held| held.key().clone()).collect();
                    (state.clone(), Action::Retire { keys: state.retiring })
                }
                action => (state, action),
            }
        }),
        ("makes a new key for every attempt", &[Promise::TwoKeys], |state, event, now, policy| {
            let (mut state, action) = step(state, event, now, policy);
            match (&state.phase, action) {
                (Phase::Requesting { next }, Action::Wait { .. }) if next.attempt > 1 => {
                    let key = state.choose_key(policy);
                    state.phase = Phase::Generating { key: key.clone() };
                    (state, Action::Generate { key, algorithm: policy.algorithm })
                }
                (_, action) => (state, action),
            }
        }),
        ("never retires", &[Promise::TwoKeys], |mut state, event, now, policy| {
            state.retiring.clear();
            step(state, event, now, policy)
        }),
        (
            "insists on destroying what cannot be destroyed",
            &[Promise::Liveness, Promise::WishesAreHeard],
            |state, event, now, policy| {
                let insists = matches!(state.phase, Phase::Retiring { .. })
                    && !state.retiring.is_empty()
                    && !state.held_unproven
                    && !matches!(event, Event::Retired { .. });
                let insists = insists || matches!(&event, Event::Retired { failed, .. } if !failed.is_empty());
                let before = state.clone();
                let (next, action) = step(state, event, now, policy);
                if insists && !matches!(next.phase, Phase::Retiring { .. }) {
                    let back_off = Action::Wait { until: Some(now + Policy::LOCAL_RETRY), waiting: Waiting::BackOff };
                    return (State { phase: Phase::RETIRING, ..before }, back_off);
                }
                (next, action)
            },
        ),
        ("insists on an id that somebody else's key has", &[Promise::Liveness], |state, event, now, policy| {
            match (event, &state.phase) {
                (Event::GenerateFailed(error), Phase::Generating { .. })
                    if error.kind == BackendErrorKind::Conflict =>
                {
                    let unavailable = BackendError::new(BackendErrorKind::Unavailable, error.detail);
                    step(state, Event::GenerateFailed(unavailable), now, policy)
                }
                (event, _) => step(state, event, now, policy),
            }
        }),
        ("destroys somebody else's key", &[Promise::OnlyOurKeysDie], |mut state, event, now, policy| {
            if let (Event::GenerateFailed(error), Phase::Generating { key }) = (&event, &state.phase)
                && error.kind == BackendErrorKind::Conflict
            {
                state.retiring.push(key.clone());
            }
            step(state, event, now, policy)
        }),
        (
            "destroys the key of a pair that something else wrote",
            &[Promise::OnlyOurKeysDie],
            |mut state, event, now, policy| {
                state.foreign.clear();
                step(state, event, now, policy)
            },
        ),
        ("signs with a lost candidate for ever (C32)", &[Promise::Liveness], |state, event, now, policy| {
            let event = match event {
                Event::SigningFailed(error)
                    if matches!(error.kind, BackendErrorKind::KeyLost | BackendErrorKind::NotFound) =>
                {
                    Event::SigningFailed(BackendError::new(BackendErrorKind::Unavailable, error.detail))
                }
                event => event,
            };
            step(state, event, now, policy)
        }),
        (
            "makes a lost candidate again without end (C32)",
            &[Promise::Liveness, Promise::CurrentWorks],
            |state, event, now, policy| {
                let event = match event {
                    Event::PublishFailed(PublishError::Backend(_)) => {
                        Event::PublishFailed(PublishError::Disk { detail: String::new(), hint: String::new() })
                    }
                    event => event,
                };
                step(state, event, now, policy)
            },
        ),
        ("destroys the old key with a lost candidate", &[Promise::KeysInUseLive], |mut state, event, now, policy| {
            let lost = matches!(&event, Event::ProofKeyFailed(error) if error.kind == BackendErrorKind::NotFound);
            if let Some(held) = &state.held
                && lost
            {
                state.retiring.push(held.key().clone());
            }
            step(state, event, now, policy)
        }),
        (
            "does not notice that the key is lost (C26)",
            &[Promise::CurrentWorks, Promise::Liveness],
            |mut state, event, now, policy| {
                state.held_key_lost = false;
                let event = if matches!(event, Event::HeldRefused { .. }) { Event::Woke } else { event };
                step(state, event, now, policy)
            },
        ),
    ]
}

fn of_requests() -> Vec<(&'static str, &'static [Promise], Step)> {
    vec![
        ("requests again while a request stands", &[Promise::OneRequest], |mut state, event, now, policy| {
            if let (Event::ApiFailed { .. }, Phase::Awaiting { next, .. }) = (&event, &state.phase) {
                let next = Candidate { attempt: next.attempt + 1, ..next.clone() };
                state.phase = Phase::Requesting { next };
            }
            step(state, event, now, policy)
        }),
        ("gives up after a refusal", &[Promise::Liveness, Promise::CurrentWorks], |state, event, now, policy| {
            let refused = matches!(event, Event::Observed(Observation::Denied(_)));
            let (state, action) = step(state, event, now, policy);
            if refused {
                (state, Action::Wait { until: Some(now + DAY * 365), waiting: Waiting::BackOff })
            } else {
                (state, action)
            }
        }),
        ("asks for what was refused again (C28)", &[Promise::Liveness], |state, event, now, policy| {
            let (mut state, action) = step(state, event, now, policy);
            match &mut state.phase {
                Phase::Requesting { next } => next.attempt = 1,
                _ => return (state, action),
            }
            (state, action)
        }),
        (
            "asks a signer that issues what has expired without waiting (C50)",
            &[Promise::RequestRate],
            |mut state, event, now, policy| {
                let expired = matches!(&event, Event::Observed(Observation::Issued(Err(crate::Rejection::Expired(_)))));
                if expired {
                    state = step(state, event, now, policy).0;
                    state.back_off = None;
                    return step(state, Event::Woke, now, policy);
                }
                step(state, event, now, policy)
            },
        ),
        ("rotates too late", &[Promise::Liveness], |state, event, now, policy| {
            let late = Policy { rotate: false, ..policy.clone() };
            let end = state.held.as_ref().map(Credential::not_after);
            let policy = if end.is_some_and(|end| now < end + RECOVERY) { &late } else { policy };
            let (state, action) = step(state, event, now, policy);
            match action {
                Action::Wait { until: Some(until), waiting: Waiting::RotationOff } => {
                    (state, Action::Wait { until: Some(until + RECOVERY * 4), waiting: Waiting::RotationOff })
                }
                action => (state, action),
            }
        }),
        (
            "enrols again after a key loss that shows in the middle of a rotation (C26)",
            &[Promise::KeyLossPolicy],
            |state, event, now, policy| {
                let in_the_middle = state.phase != Phase::Holding;
                let enrols = policy.enrol_after_key_loss || in_the_middle;
                let enrols = Policy { enrol_after_key_loss: enrols, ..policy.clone() };
                step(state, event, now, &enrols)
            },
        ),
        (
            "gives up a certificate for one refusal when there is no bootstrap credential",
            &[Promise::Liveness, Promise::CurrentWorks],
            |state, event, now, policy| {
                let refused = state.held_refused
                    && matches!(event, Event::ApiFailed { failure: ApiFailure::NoCredential(_), .. });
                let (mut state, action) = step(state, event, now, policy);
                state.held_refused |= refused;
                (state, action)
            },
        ),
        (
            "never turns to the bootstrap credential before the certificate expires (C07)",
            &[Promise::CurrentWorks],
            |mut state, event, now, policy| {
                state.held_refused = false;
                let event = if event == (Event::HeldRefused { key_lost: false }) { Event::Woke } else { event };
                step(state, event, now, policy)
            },
        ),
    ]
}

fn of_proofs() -> Vec<(&'static str, &'static [Promise], Step)> {
    vec![
        ("publishes before proving (C31)", &[Promise::ProvenBeforePublished], |state, event, now, policy| {
            let (mut state, action) = step(state, event, now, policy);
            if let Phase::Proving { next, issued, refusals: 0, .. } = state.phase.clone() {
                state.phase = Phase::Publishing { next, issued: issued.clone(), proven: false };
                return (state, Action::Publish { credential: issued });
            }
            (state, action)
        }),
        ("publishes what was refused (C31)", &[Promise::ProvenBeforePublished], |state, event, now, policy| {
            let refused = matches!(
                (&event, &state.phase),
                (
                    Event::ApiFailed { authority: Authority::Issued, failure: ApiFailure::Unauthorized(_) },
                    Phase::Proving { .. }
                )
            );
            let event = if refused { Event::Proven } else { event };
            step(state, event, now, policy)
        }),
        (
            "gives up the old key when the new certificate is refused (C31)",
            &[Promise::KeysInUseLive],
            |mut state, event, now, policy| {
                let refused = matches!(
                    (&event, &state.phase),
                    (
                        Event::ApiFailed { authority: Authority::Issued, failure: ApiFailure::Unauthorized(_) },
                        Phase::Retiring { .. }
                    )
                );
                if refused && state.held_unproven {
                    state.drop_previous();
                    (state.held_unproven, state.held_refused) = (false, true);
                }
                step(state, event, now, policy)
            },
        ),
        (
            "never publishes again what worked (C31)",
            &[Promise::CurrentWorks, Promise::Liveness],
            |state, event, now, policy| {
                let (mut state, action) = step(state, event, now, policy);
                if let Phase::Restoring { .. } = state.phase {
                    return (state, Action::Wait { until: Some(now + Policy::LOCAL_RETRY), waiting: Waiting::BackOff });
                }
                state.rejections = None;
                (state, action)
            },
        ),
        (
            "destroys old keys before the new certificate is proven",
            &[Promise::KeysInUseLive],
            |state, event, now, policy| {
                let (mut state, action) = step(state, event, now, policy);
                if let (Action::Prove { .. }, Phase::Retiring { .. }, true) =
                    (&action, &state.phase, state.held_unproven)
                {
                    state.held_unproven = false;
                    state.drop_previous();
                    let keys = state.retiring.clone();
                    return (state, Action::Retire { keys });
                }
                (state, action)
            },
        ),
        (
            "takes a refusal of what was issued for one of the held one",
            &[Promise::ProvenBeforePublished],
            |state, event, now, policy| {
                let refused = matches!(
                    &event,
                    Event::ApiFailed { authority: Authority::Issued, failure: ApiFailure::Unauthorized(_) }
                );
                let (mut state, action) = step(state, event, now, policy);
                if refused && let Phase::Proving { next, issued, .. } = state.phase.clone() {
                    state.phase = Phase::Publishing { next, issued, proven: false };
                }
                (state, action)
            },
        ),
    ]
}

fn of_wishes() -> Vec<(&'static str, &'static [Promise], Step)> {
    vec![
        ("forgets what is asked for while old keys wait", &[Promise::WishesAreHeard], |state, event, now, policy| {
            let waits = matches!(state.phase, Phase::Retiring { .. });
            let event = if waits && event == Event::RotationRequested { Event::Woke } else { event };
            step(state, event, now, policy)
        }),
        ("ignores that new keys go elsewhere (C34)", &[Promise::WishesAreHeard], |state, event, now, policy| {
            let held = state.held.as_ref().map_or(policy.backend.clone(), |held| held.key().backend.clone());
            step(state, event, now, &Policy { backend: held, ..policy.clone() })
        }),
        ("ignores that another template is wanted", &[Promise::WishesAreHeard], |state, event, now, policy| {
            let held = state.held_template.clone().or(policy.template.clone());
            step(state, event, now, &Policy { template: held, ..policy.clone() })
        }),
        (
            "makes no key elsewhere before the one in a dead device is made (C34)",
            &[Promise::Liveness, Promise::WishesAreHeard],
            |state, event, now, policy| {
                let backend = state.phase.next_key().map_or(policy.backend.clone(), |key| key.backend.clone());
                step(state, event, now, &Policy { backend, ..policy.clone() })
            },
        ),
    ]
}

#[test]
fn every_mutation_of_step_is_caught_for_what_it_breaks() {
    let mut missed = Vec::new();
    for (name, promises, mutation) in mutations() {
        match lives(400, 20, mutation) {
            Err((_, violation)) if promises.contains(&violation.promise) => {}
            Err((seed, violation)) => missed.push(format!("a step that {name} is caught in {seed} for {violation}")),
            Ok(_) => missed.push(format!("nobody notices a step that {name}")),
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
