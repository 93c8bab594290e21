//! Steps with one thing wrong each: a simulation that does not notice them would prove nothing.

use pintle_plugins_api::{BackendError, BackendErrorKind};

use super::*;

/// Each is `step` with one thing wrong; the simulation must notice all of them.
#[test]
fn every_mutation_of_step_is_caught() {
    let mutations: [(&str, Step); 16] = [
        ("retires the key in use", |state, event, now, policy| {
            let (mut state, action) = step(state, event, now, policy);
            match action {
                Action::Retire { .. } => {
                    state.retiring = state.held.iter().map(|held| held.key().clone()).collect();
                    (state.clone(), Action::Retire { keys: state.retiring })
                }
                action => (state, action),
            }
        }),
        ("makes a new key for every attempt", |state, event, now, policy| {
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
        ("never retires", |mut state, event, now, policy| {
            state.retiring.clear();
            step(state, event, now, policy)
        }),
        ("rotates too late", |state, event, now, policy| {
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
        ("requests again while a request stands", |mut state, event, now, policy| {
            if let (Event::ApiFailed { .. }, Phase::Awaiting { next, .. }) = (&event, &state.phase) {
                let next = Candidate { attempt: next.attempt + 1, ..next.clone() };
                state.phase = Phase::Requesting { next };
            }
            step(state, event, now, policy)
        }),
        ("gives up after a refusal", |state, event, now, policy| {
            let refused = matches!(event, Event::Observed(Observation::Denied(_)));
            let (state, action) = step(state, event, now, policy);
            if refused {
                (state, Action::Wait { until: Some(now + DAY * 365), waiting: Waiting::BackOff })
            } else {
                (state, action)
            }
        }),
        ("retires before the new key is proven", |state, event, now, policy| {
            let published = matches!((&event, &state.phase), (Event::Published, Phase::Publishing { .. }));
            let (mut state, action) = step(state, event, now, policy);
            if published && state.phase == Phase::Proving && !state.retiring.is_empty() {
                state.phase = Phase::Retiring;
                let keys = state.retiring.clone();
                return (state, Action::Retire { keys });
            }
            (state, action)
        }),
        ("asks for what was refused again (C28)", |state, event, now, policy| {
            let (mut state, action) = step(state, event, now, policy);
            match &mut state.phase {
                Phase::Requesting { next } => next.attempt = 1,
                _ => return (state, action),
            }
            (state, action)
        }),
        ("does not notice that the key is lost (C26)", |mut state, event, now, policy| {
            state.held_key_lost = false;
            let event = if matches!(event, Event::HeldRefused { .. }) { Event::Woke } else { event };
            step(state, event, now, policy)
        }),
        ("enrols again after a key loss that shows in the middle of a rotation (C26)", |state, event, now, policy| {
            let enrols = Policy { enrol_after_key_loss: state.phase != Phase::Holding, ..policy.clone() };
            step(state, event, now, &enrols)
        }),
        (
            "gives up a certificate for one refusal when there is no bootstrap credential",
            |state, event, now, policy| {
                let refused = state.held_refused
                    && matches!(event, Event::ApiFailed { failure: ApiFailure::NoCredential(_), .. });
                let (mut state, action) = step(state, event, now, policy);
                state.held_refused |= refused;
                (state, action)
            },
        ),
        ("insists on destroying what cannot be destroyed", |state, event, now, policy| {
            let insists = state.phase == Phase::Retiring && !state.retiring.is_empty() && event != Event::Retired;
            let before = state.clone();
            let (next, action) = step(state, event, now, policy);
            if insists && next.phase != Phase::Retiring {
                return (before, Action::Wait { until: Some(now + Policy::LOCAL_RETRY), waiting: Waiting::BackOff });
            }
            (next, action)
        }),
        ("never turns to the bootstrap credential before the end (C07)", |mut state, event, now, policy| {
            state.held_refused = false;
            let event = if event == (Event::HeldRefused { key_lost: false }) { Event::Woke } else { event };
            step(state, event, now, policy)
        }),
        ("insists on an id that somebody else's key has", |state, event, now, policy| match (event, &state.phase) {
            (Event::GenerateFailed(error), Phase::Generating { .. }) if error.kind == BackendErrorKind::Conflict => {
                let unavailable = BackendError::new(BackendErrorKind::Unavailable, error.detail);
                step(state, Event::GenerateFailed(unavailable), now, policy)
            }
            (event, _) => step(state, event, now, policy),
        }),
        ("forgets what is asked for while old keys wait", |state, event, now, policy| {
            let waits = matches!(state.phase, Phase::Proving | Phase::Retiring);
            let event = if waits && event == Event::RotationRequested { Event::Woke } else { event };
            step(state, event, now, policy)
        }),
        ("destroys somebody else's key", |mut state, event, now, policy| {
            if let (Event::GenerateFailed(error), Phase::Generating { key }) = (&event, &state.phase)
                && error.kind == BackendErrorKind::Conflict
            {
                state.retiring.push(key.clone());
            }
            step(state, event, now, policy)
        }),
    ];
    for (name, mutation) in mutations {
        assert!(lives(200, 20, mutation).is_err(), "nobody notices a step that {name}");
    }
}
