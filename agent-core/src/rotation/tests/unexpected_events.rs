//! Every event in every phase: those that do not belong there change nothing.

use super::*;

/// Every kind of event, and the numbers of the phases to which it belongs.
fn events() -> Vec<(Event, &'static [usize])> {
    const ALL: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 7];
    let failed = |authority, failure| Event::ApiFailed { authority, failure };
    let text = String::new;
    let mut events: Vec<(Event, &[usize])> = vec![
        (Event::Woke, &[]),
        (Event::RotationRequested, ALL),
        (Event::LocalChange, &[]),
        (Event::PolicyChanged, &[]),
        (Event::TemplateChanged, &[]),
        (Event::AddressesMissing, &[]),
        (Event::PairReplaced(FoundPair { credential: credential(7), key_is_ours: false }), ALL),
        (Event::BackendFound, &[]),
        (Event::HeldKeyFound, &[]),
        (Event::HeldRefused { key_lost: false }, ALL),
        (Event::HeldRefused { key_lost: true }, ALL),
        (Event::Generated(public_key(5)), &[1]),
        (Event::Submitted(request()), &[2]),
        (Event::NameTaken, &[2]),
        (Event::Published, &[PUBLISHING, RESTORING]),
        (Event::PublishFailed(PublishError::Disk { detail: text(), hint: text() }), &[PUBLISHING, RESTORING]),
        (Event::Proven, &[PROVING]),
        (retired(&[9]), &[RETIRING]),
        (retire_failed(), &[RETIRING]),
    ];
    for kind in BackendErrorKind::ALL {
        events.push((Event::GenerateFailed(error(kind)), &[1]));
        events.push((Event::SigningFailed(error(kind)), &[2]));
        events.push((Event::ProofKeyFailed(error(kind)), &[PROVING]));
        events.push((Event::PublishFailed(PublishError::Backend(error(kind))), &[PUBLISHING, RESTORING]));
    }
    for authority in [Authority::Held, Authority::Bootstrap, Authority::Issued] {
        for failure in [
            ApiFailure::Unreachable(text()),
            ApiFailure::Unauthorized(text()),
            ApiFailure::Forbidden(text()),
            ApiFailure::Throttled { detail: text(), retry_after: None },
            ApiFailure::Throttled { detail: text(), retry_after: Some(Duration::MAX) },
            ApiFailure::Invalid(text()),
            ApiFailure::Server(text()),
            ApiFailure::NoCredential(text()),
        ] {
            let phases: &[usize] = if authority == Authority::Issued { &[PROVING] } else { &[2, 3] };
            events.push((failed(authority, failure), phases));
        }
    }
    for observation in [
        Observation::Pending,
        Observation::Issued(Ok(credential(2))),
        Observation::Issued(Err(Rejection::OtherKey)),
        Observation::Issued(Err(Rejection::NotYetValid(NOW + DAY))),
        Observation::Issued(Err(Rejection::Untrusted(text()))),
        Observation::Denied(text()),
        Observation::Failed(text()),
        Observation::Gone,
    ] {
        events.push((Event::Observed(observation), &[3]));
    }
    events
}

#[test]
fn unexpected_events_repeat_the_action_of_the_phase_and_none_panics() {
    for (number, phase) in phases().into_iter().enumerate() {
        let before = in_phase(phase);
        let repeated = now(before.clone(), Event::Woke);
        for (event, belongs_to) in events() {
            let after = now(before.clone(), event.clone());
            if !belongs_to.contains(&number) {
                assert_eq!(after, repeated, "{event:?} in {}", before.phase.name());
            }
            // At the ends of time, without anything held, and with counters that are full.
            for clock in [UnixTime::from_milliseconds(i64::MIN), UnixTime::from_milliseconds(i64::MAX)] {
                at(before.clone(), event.clone(), clock);
                at(State { held: None, ..before.clone() }, event.clone(), clock);
                at(State { held_unproven: true, ..before.clone() }, event.clone(), clock);
                at(State { discarded: u32::MAX, last_slot: u64::MAX, ..before.clone() }, event.clone(), clock);
            }
        }
    }
}
