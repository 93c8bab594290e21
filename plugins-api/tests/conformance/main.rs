//! The conformance suite passes an honest backend and catches each way of lying.

mod device;
mod lie;

use device::{Device, OPERATORS_KEY};
use lie::{LIES, Lie};
use pintle_plugins_api::conformance::{self, Harness, Outcome, Report};
use pintle_plugins_api::{BackendError, KeyAlgorithm, KeyBackend, KeyId};

#[test]
fn honest_backend_passes_every_check() {
    let report = report_of(None);
    report.assert_passed();
    for row in &report.rows {
        assert_eq!(row.outcome, Outcome::Passed, "{}", row.name);
    }
}

#[test]
fn every_lie_is_caught_by_the_check_that_is_meant_for_it() {
    for (lie, check) in LIES {
        let report = report_of(Some(*lie));
        let failed: Vec<_> = report.failures().map(|row| row.name.as_str()).collect();
        assert!(failed.iter().any(|name| name.starts_with(check)), "{lie:?} was not caught by {check:?}\n{report}");
    }
}

#[test]
fn throwaway_keys_are_deleted_whatever_fails() {
    // All but the lies that are about deleting or listing, and those whose device is lost for good.
    for (lie, _) in LIES.iter().filter(|(lie, _)| !lie.leaves_keys()) {
        let device = Device::new(Some(*lie));
        conformance::run(&mut device.clone());
        let left: Vec<_> = device.store().keys.keys().filter(|id| id.as_bytes() != OPERATORS_KEY).cloned().collect();
        assert_eq!(left, [], "{lie:?}");
    }
}

#[test]
fn what_a_harness_cannot_arrange_is_skipped_with_a_reason() {
    struct Plain(Device);
    impl Harness for Plain {
        fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError> {
            self.0.open()
        }

        fn algorithms(&self) -> Vec<KeyAlgorithm> {
            vec![KeyAlgorithm::Ed25519]
        }
    }
    let device = Device::new(Some(Lie::OnlyEd25519));
    let report = conformance::run(&mut Plain(device.clone()));
    report.assert_passed();
    let skipped = report.rows.iter().filter(|row| matches!(&row.outcome, Outcome::Skipped(why) if !why.is_empty()));
    assert_eq!(skipped.count(), 4, "{report}");
    let ids: Vec<_> = device.store().keys.keys().cloned().collect();
    assert_eq!(ids.iter().map(KeyId::as_bytes).collect::<Vec<_>>(), [OPERATORS_KEY]);
}

fn report_of(lie: Option<Lie>) -> Report {
    conformance::run(&mut Device::new(lie))
}
