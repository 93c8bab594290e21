//! PINs that are wrong, that change, or that are the last try.

mod support;

use std::time::{Duration, Instant};

use pintle_plugins_api::{BackendErrorKind, KeyAlgorithm, KeyBackend as _, SignatureScheme};
use support::{Kind, PIN, TestToken, id, refused, when_available};

const MESSAGE: &[u8] = b"a message";
const SCHEME: SignatureScheme = SignatureScheme::EcdsaP256Sha256;
/// Which of several processes a test is.
const WORKER: &str = "PINTLE_TEST_WORKER";

fn wrong_pin(token: &TestToken) {
    token.write_pin("99999999");
    let mut backend = token.open();
    for _ in 0..5 {
        let error = refused(backend.list(), BackendErrorKind::Locked);
        assert!(error.hint.is_some() && !format!("{error:?}").contains("99999999"), "{error:?}");
        refused(backend.sign(&id("key"), SCHEME, MESSAGE), BackendErrorKind::Locked);
        refused(backend.generate(&id("key"), KeyAlgorithm::EcdsaP256), BackendErrorKind::Locked);
    }
    assert_eq!(token.logins(), 1);
    // Opening another backend does not try the PIN again.
    refused(token.open().list(), BackendErrorKind::Locked);
    assert_eq!(token.logins(), 1);
    // The same PIN written anew is, once: somebody may have changed the token.
    token.write_pin("99999999");
    let deadline = Instant::now() + Duration::from_secs(20);
    while backend.list().expect_err("refused").kind == BackendErrorKind::Unavailable {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    for _ in 0..5 {
        refused(backend.list(), BackendErrorKind::Locked);
        refused(token.open().list(), BackendErrorKind::Locked);
    }
    assert_eq!(token.logins(), 2);
    token.write_pin(PIN);
    assert_eq!(backend.list(), Ok(vec![]));
    assert_eq!(token.logins(), 3);
}

#[test]
fn c27_softhsm_is_shown_a_wrong_pin_once() {
    support::run_spied(Kind::SoftHsm, "c27_softhsm_is_shown_a_wrong_pin_once", wrong_pin);
}

/// The spy cannot listen to PKCS#11 3.2. Kryoptic locks the PIN at the tenth wrong one.
fn wrong_pin_unspied(token: &TestToken) {
    token.write_pin("99999999");
    let mut backend = token.open();
    for _ in 0..20 {
        refused(backend.list(), BackendErrorKind::Locked);
    }
    token.write_pin(PIN);
    assert_eq!(backend.list(), Ok(vec![]));
}

#[test]
fn c27_kryoptic_is_not_locked_by_a_wrong_pin() {
    support::run(Kind::Kryoptic, "c27_kryoptic_is_not_locked_by_a_wrong_pin", wrong_pin_unspied);
}

fn final_try(token: &TestToken) {
    for _ in 0..9 {
        token.refuse_login("99999999");
    }
    let mut backend = token.open();
    for _ in 0..3 {
        let error = refused(backend.list(), BackendErrorKind::Locked);
        assert!(error.detail.contains("only one more try"), "{error}");
    }
    // Somebody logs in by hand, and the token counts anew.
    token.pkcs11_tool_logged_in(&["--list-objects"]);
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Err(error) = backend.list() {
        assert!(error.kind == BackendErrorKind::Locked && Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn c27_kryoptic_is_not_given_the_last_try() {
    support::run(Kind::Kryoptic, "c27_kryoptic_is_not_given_the_last_try", final_try);
}

/// The token is given the PIN that stands in the file, and what the hint says of that case is done to the letter.
fn hint_followed(token: &TestToken) {
    const NEW: &str = "16180339";
    token.write_pin(NEW);
    let mut backend = token.open();
    let hint = refused(backend.list(), BackendErrorKind::Locked).hint.expect("a hint");
    token.pkcs11_tool_logged_in(&["--change-pin", "--new-pin", NEW]);
    let again = refused(backend.list(), BackendErrorKind::Locked);
    assert_eq!(again.hint.as_ref(), Some(&hint), "one hint, whenever it is given");
    let (_, path) = hint.rsplit_once("if the token was changed instead, touch ").expect("what to do then");
    assert!(std::process::Command::new("touch").arg(path).status().expect("touch runs").success());
    assert_eq!(when_available(|| backend.list()), vec![]);
}

#[test]
fn c27_softhsm_hint_ends_a_refusal() {
    support::run(Kind::SoftHsm, "c27_softhsm_hint_ends_a_refusal", hint_followed);
}

#[test]
fn c27_kryoptic_hint_ends_a_refusal() {
    support::run(Kind::Kryoptic, "c27_kryoptic_hint_ends_a_refusal", hint_followed);
}

fn pin_changed(token: &TestToken, test: &str) {
    const NEW: &str = "16180339";
    if std::env::var(WORKER).is_ok() {
        let mut backend = token.open();
        for _ in 0..3 {
            refused(backend.sign(&id("key"), SCHEME, MESSAGE), BackendErrorKind::Locked);
        }
        token.write_pin(NEW);
        backend.sign(&id("key"), SCHEME, MESSAGE).expect("a signature with the new PIN");
        return;
    }
    let mut backend = token.open();
    backend.generate(&id("key"), KeyAlgorithm::EcdsaP256).expect("a key");
    token.pkcs11_tool_logged_in(&["--change-pin", "--new-pin", NEW]);
    // The login that we have goes on.
    assert!(backend.sign(&id("key"), SCHEME, MESSAGE).is_ok());
    // SoftHSM remembers the old PIN for as long as it is initialised, so the rest is for another process.
    let mut worker = token.start_again(test, WORKER, "afterwards");
    assert!(worker.wait().expect("the worker ended").success());
}

#[test]
fn c27_softhsm_pin_changed() {
    support::run(Kind::SoftHsm, "c27_softhsm_pin_changed", |token| pin_changed(token, "c27_softhsm_pin_changed"));
}

#[test]
fn c27_kryoptic_pin_changed() {
    support::run(Kind::Kryoptic, "c27_kryoptic_pin_changed", |token| pin_changed(token, "c27_kryoptic_pin_changed"));
}
