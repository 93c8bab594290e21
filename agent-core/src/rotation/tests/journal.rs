//! The state as it is journalled, and as version 1 journalled it.

use super::*;
use crate::rotation::v1::StateV1;

const PEM: &str = include_str!("leaf.pem");

fn v1(phase: &str) -> State {
    let text = format!(
        r#"{{"held": {{"key": {{"backend": "file", "id": "worker-1_client_1"}}, "chain": {PEM:?},
            "installed_at": 1800000000000}},
        "phase": {phase}, "last_slot": 2, "back_off": {{"failures": 3, "until": 1800000001000, "reason": "r", "hint": "h",
        "local": false}}, "held_refused": false, "held_key_lost": true, "rotation_requested": true, "discarded": 4,
        "retiring": [{{"backend": "token", "id": "worker-1_client_0"}}]}}"#
    );
    let state: StateV1 = serde_json::from_str(&text).expect("a state of version 1");
    state.upgraded(&template(0))
}

#[test]
fn every_phase_of_version_1_goes_on_where_it_was() {
    let key = r#"{"backend": "file", "id": "worker-1_client_2"}"#;
    let public_key = serde_json::to_string(&public_key(2)).expect("a public key");
    let next = format!(r#"{{"key": {key}, "public_key": {public_key}, "attempt": 3}}"#);
    let issued = format!(r#"{{"key": {key}, "chain": {PEM:?}, "installed_at": 1800000000000}}"#);
    let request = r#"{"name": "csr", "uid": "7"}"#;
    for (phase, name) in [
        (r#""holding""#.to_owned(), "holding"),
        (format!(r#"{{"generating": {{"key": {key}}}}}"#), "generating"),
        (format!(r#"{{"requesting": {{"next": {next}}}}}"#), "requesting"),
        (format!(r#"{{"awaiting": {{"next": {next}, "request": {request}}}}}"#), "awaiting"),
        (format!(r#"{{"publishing": {{"next": {next}, "issued": {issued}}}}}"#), "publishing"),
        (r#""proving""#.to_owned(), "retiring"),
        (r#""retiring""#.to_owned(), "retiring"),
    ] {
        let state = v1(&phase);
        assert_eq!(state.phase.name(), name);
        assert_eq!((state.last_slot, state.discarded, state.retiring.len()), (2, 4, 1));
        assert_eq!((state.held_key_lost, state.rotation_requested), (true, true));
        assert_eq!(state.held_unproven, phase.contains("proving"), "it was published and not proven");
        assert!(state.held_template == Some(template(0)) && state.held.is_some());
        assert!(state.phase.next_key().is_none_or(|key| key.id.to_string() == "worker-1_client_2"), "{state:?}");
        if let Phase::Requesting { next } | Phase::Awaiting { next, .. } | Phase::Publishing { next, .. } = &state.phase
        {
            assert_eq!((next.attempt, &next.template), (3, &template(0)));
        }
        // And as of now it is saved and loaded as it is.
        let text = serde_json::to_string(&state).expect("saved");
        assert_eq!(serde_json::from_str::<State>(&text).expect("loaded"), state);
        now(state, Event::Woke);
    }
}

/// In version 1 proving came after publishing, and the old key was on the list.
#[test]
fn what_version_1_published_unproven_is_proven_before_a_key_is_destroyed() {
    let state = State { held_key_lost: false, rotation_requested: false, back_off: None, ..v1(r#""proving""#) };
    let held = state.held.clone().expect("a credential");
    let moment = held.not_before() + Duration::from_secs(1);
    let (state, action) = at(State { held: Some(held.clone().installed(moment)), ..state }, Event::Woke, moment);
    assert_eq!(action, Action::Prove { credential: held.installed(moment) });
    let (_, action) = at(state, Event::Proven, moment);
    assert!(matches!(action, Action::Retire { keys } if keys.len() == 1));
}
