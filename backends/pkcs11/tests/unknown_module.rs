//! The module that nobody has tested with: SoftHSM behind a module that answers otherwise where it is told to.

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pintle_backend_pkcs11::{Configuration, Pkcs11Backend};
use pintle_plugins_api::{BackendErrorKind, KeyAlgorithm, KeyBackend, PublicKey, SignatureScheme};
use support::{Kind, TestToken, id, refused, when_available};

const SCHEME: SignatureScheme = SignatureScheme::EcdsaP256Sha256;

fn faulty_module() -> PathBuf {
    pintle_test_support::faulty_module(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

fn run(test: &str, scenario: fn(&TestToken)) {
    support::run_behind(Kind::SoftHsm, test, faulty_module, scenario);
}

fn with_a_key(token: &TestToken) -> (Pkcs11Backend, PublicKey) {
    let mut backend = token.open();
    let public_key = backend.generate(&id("key"), KeyAlgorithm::EcdsaP256).expect("a key");
    (backend, public_key)
}

#[test]
fn every_way_to_lose_a_session_is_mended_by_one_repetition() {
    run("every_way_to_lose_a_session_is_mended_by_one_repetition", |token| {
        let (mut backend, public_key) = with_a_key(token);
        for (name, code) in [
            ("CKR_GENERAL_ERROR", 0x05),
            ("CKR_FUNCTION_FAILED", 0x06),
            ("CKR_DEVICE_ERROR", 0x30),
            ("CKR_DEVICE_REMOVED", 0x32),
            ("CKR_KEY_HANDLE_INVALID", 0x60),
            ("CKR_OBJECT_HANDLE_INVALID", 0x82),
            ("CKR_OPERATION_ACTIVE", 0x90),
            ("CKR_SESSION_CLOSED", 0xB0),
            ("CKR_SESSION_HANDLE_INVALID", 0xB3),
            ("CKR_TOKEN_NOT_PRESENT", 0xE0),
            ("CKR_USER_NOT_LOGGED_IN", 0x101),
            ("CKR_CRYPTOKI_NOT_INITIALIZED", 0x190),
        ] {
            token.fault("sign-init", code, 1);
            let signature = backend.sign(&id("key"), SCHEME, b"message").expect(name);
            assert!(public_key.verifies(SCHEME, b"message", &signature), "{name}");
            // Twice is enough: a token that goes on so is unavailable, and the caller's turn to wait.
            token.fault("sign-init", code, 100);
            let error = refused(backend.sign(&id("key"), SCHEME, b"message"), BackendErrorKind::Unavailable);
            assert!(error.detail.contains(name), "{error}");
            assert_eq!(token.faults_left(), 98, "{name}");
            token.fault("none", 0, 0);
            assert!(when_available(|| backend.sign(&id("key"), SCHEME, b"message")).len() > 60, "{name}");
        }
    });
}

#[test]
fn a_code_that_a_new_session_does_not_mend_is_not_repeated() {
    run("a_code_that_a_new_session_does_not_mend_is_not_repeated", |token| {
        let (mut backend, _) = with_a_key(token);
        for (code, kind) in [
            (0x31, BackendErrorKind::Unavailable),        // CKR_DEVICE_MEMORY
            (0x02, BackendErrorKind::Unavailable),        // CKR_HOST_MEMORY
            (0x8000_0001, BackendErrorKind::Unavailable), // the vendor's own
        ] {
            token.fault("sign-init", code, 100);
            refused(backend.sign(&id("key"), SCHEME, b"message"), kind);
            assert_eq!(token.faults_left(), 99, "{code:#x}");
        }
        // No mechanism on digests, and none that hashes either.
        token.fault("sign-init", 0x70, 100);
        refused(backend.sign(&id("key"), SCHEME, b"message"), BackendErrorKind::Unsupported);
        assert_eq!(token.faults_left(), 98);
    });
}

#[test]
fn a_key_whose_generation_was_answered_with_an_error_is_found() {
    run("a_key_whose_generation_was_answered_with_an_error_is_found", |token| {
        let mut backend = token.open();
        token.fault("after-generate", 0x30, 1);
        let public_key = backend.generate(&id("key"), KeyAlgorithm::EcdsaP256).expect("a key");
        assert_eq!(backend.public_key(&id("key")), Ok(public_key), "one key, not two");
    });
}

#[test]
fn a_device_that_makes_other_keys_than_asked_is_refused_and_the_key_destroyed() {
    run("a_device_that_makes_other_keys_than_asked_is_refused_and_the_key_destroyed", |token| {
        let mut backend = token.open();
        token.fault("extractable", 0, 1);
        let error = refused(backend.generate(&id("key"), KeyAlgorithm::EcdsaP256), BackendErrorKind::Unsupported);
        assert!(error.detail.contains("CKA_EXTRACTABLE"), "{error}");
        assert_eq!(backend.list(), Ok(vec![]));
        token.fault("garbage", 0, 1);
        let error = refused(backend.generate(&id("key"), KeyAlgorithm::EcdsaP256), BackendErrorKind::Corrupt);
        assert!(error.detail.contains("does not verify"), "{error}");
        assert_eq!(backend.list(), Ok(vec![]));
        assert!(backend.generate(&id("key"), KeyAlgorithm::EcdsaP256).is_ok());
    });
}

#[test]
fn c17_an_rsa_key_that_tls_1_3_cannot_use_is_refused_and_destroyed() {
    run("c17_an_rsa_key_that_tls_1_3_cannot_use_is_refused_and_destroyed", |token| {
        let mut backend = token.open();
        // CKR_MECHANISM_INVALID, CKR_MECHANISM_PARAM_INVALID; and a signature with a salt of another length.
        for (place, code) in [("pss", 0x70), ("pss", 0x71), ("garbage", 0)] {
            token.fault(place, code, 100);
            let error = refused(backend.generate(&id("key"), KeyAlgorithm::Rsa2048), BackendErrorKind::Unsupported);
            assert!(error.detail.contains("RSASSA-PSS"), "{error}");
            assert!(error.hint.is_some_and(|hint| hint.contains("ecdsa-p256")));
            assert_eq!(backend.list(), Ok(vec![]));
        }
        // A key that is there already: it is not taken, and is left to whoever needs it.
        token.fault("none", 0, 0);
        backend.generate(&id("key"), KeyAlgorithm::Rsa2048).expect("a key");
        token.fault("pss", 0x70, 100);
        refused(backend.generate(&id("key"), KeyAlgorithm::Rsa2048), BackendErrorKind::Unsupported);
        assert_eq!(backend.list(), Ok(vec![id("key")]));
    });
}

#[test]
fn c27_a_login_refused_by_an_unknown_code_is_not_repeated_at_once() {
    run("c27_a_login_refused_by_an_unknown_code_is_not_repeated_at_once", |token| {
        let configuration = pintle_backend_pkcs11::Configuration {
            reload_interval: std::time::Duration::from_secs(3600),
            ..token.configuration()
        };
        let mut backend = Pkcs11Backend::open(configuration).expect("a backend");
        token.fault("login", 0x8000_0002, 100);
        for _ in 0..10 {
            refused(backend.list(), BackendErrorKind::Unavailable);
        }
        assert_eq!(token.faults_left(), 99);
        // Nor one that a new initialisation might mend: CKR_GENERAL_ERROR, CKR_FUNCTION_FAILED, CKR_DEVICE_ERROR.
        for code in [0x05, 0x06, 0x30] {
            let configuration = pintle_backend_pkcs11::Configuration {
                reload_interval: std::time::Duration::from_secs(3600),
                ..token.configuration()
            };
            let mut backend = Pkcs11Backend::open(configuration).expect("a backend");
            token.fault("login", code, 100);
            for _ in 0..10 {
                refused(backend.list(), BackendErrorKind::Unavailable);
            }
            assert_eq!(token.faults_left(), 99, "{code:#x}");
        }
        // A known code for a wrong PIN is final.
        token.fault("login", 0xA2, 100);
        let mut backend = token.open();
        for _ in 0..10 {
            refused(backend.list(), BackendErrorKind::Locked);
        }
        assert_eq!(token.faults_left(), 99);
    });
}

#[test]
fn c27_a_login_refused_by_an_unknown_code_is_repeated_once_however_long_it_lasts() {
    run("c27_a_login_refused_by_an_unknown_code_is_repeated_once_however_long_it_lasts", |token| {
        // Any moment is long after the last login.
        let configuration = || Configuration { reload_interval: Duration::ZERO, ..token.configuration() };
        for code in [0x8000_0002, 0x05] {
            let mut backend = Pkcs11Backend::open(configuration()).expect("a backend");
            token.fault("login", code, 100);
            let outcomes: Vec<_> = (0..10).map(|_| backend.list().expect_err("refused")).collect();
            assert_eq!(token.faults_left(), 98, "{code:#x}");
            let last = outcomes.last().expect("an outcome");
            assert_eq!(last.kind, BackendErrorKind::Locked, "{last}");
            assert!(
                last.hint.as_ref().is_some_and(|hint| hint.contains("touch")) && last.detail.contains("C_Login: CKR_")
            );
            // The same PIN written anew: somebody says that it is right.
            token.write_pin(support::PIN);
            token.fault("none", 0, 0);
            assert_eq!(backend.list(), Ok(vec![]), "{code:#x}");
        }
        // A token that says that its tries run out is spared the second one.
        token.refuse_login("99999999");
        token.fault("login", 0x8000_0002, 100);
        let mut backend = Pkcs11Backend::open(configuration()).expect("a backend");
        for _ in 0..10 {
            refused(backend.list(), BackendErrorKind::Locked);
        }
        assert_eq!(token.faults_left(), 99);
    });
}

#[test]
fn a_module_that_does_not_initialise_is_named_with_its_token() {
    run("a_module_that_does_not_initialise_is_named_with_its_token", |token| {
        let named = |error: pintle_plugins_api::BackendError| {
            let module = faulty_module();
            for words in ["token \"pintle test\"", module.to_str().expect("UTF-8"), "C_Initialize: CKR_DEVICE_ERROR"] {
                assert!(error.detail.contains(words), "{error}");
            }
            assert!(error.hint.is_some(), "{error}");
        };
        token.fault("initialize", 0x30, 1);
        named(refused(token.open().list(), BackendErrorKind::Unavailable));
        // And the same when the token went away and the module is to look for it anew.
        let (mut backend, _) = with_a_key(token);
        token.remove();
        token.fault("initialize", 0x30, 100);
        let started = Instant::now();
        let error = loop {
            let error = refused(backend.list(), BackendErrorKind::Unavailable);
            if error.detail.contains("initialise") || started.elapsed() > Duration::from_secs(10) {
                break error;
            }
        };
        named(error);
        token.fault("none", 0, 0);
        token.put_back();
        assert_eq!(when_available(|| backend.list()), vec![id("key")]);
    });
}

/// A backend that has its module initialised anew once, and then not again.
fn without_reloads(token: &TestToken) -> Pkcs11Backend {
    let configuration = Configuration { reload_interval: Duration::from_secs(3600), ..token.configuration() };
    Pkcs11Backend::open(configuration).expect("a backend")
}

#[test]
fn a_token_that_another_program_writes_to_is_not_absent() {
    run("a_token_that_another_program_writes_to_is_not_absent", |token| {
        let (mut open, _) = with_a_key(token);
        for (name, code) in [
            ("CKR_GENERAL_ERROR", 0x05),
            ("CKR_DEVICE_ERROR", 0x30),
            ("CKR_DEVICE_MEMORY", 0x31),
            ("CKR_TOKEN_NOT_PRESENT", 0xE0),
        ] {
            for backend in [&mut open, &mut without_reloads(token)] {
                token.fault("token-info", code, 3);
                assert_eq!(backend.list(), Ok(vec![id("key")]), "{name}");
                assert_eq!(token.faults_left(), 0, "{name}");
            }
        }
        // One that stays away is reported as such, and soon.
        token.fault("token-info", 0xE0, 100_000);
        for backend in [&mut open, &mut without_reloads(token)] {
            let before = token.faults_left();
            let error = refused(backend.list(), BackendErrorKind::Unavailable);
            assert!(error.detail.contains("is not present"), "{error}");
            assert!(before - token.faults_left() < 100, "asked {} times", before - token.faults_left());
        }
    });
}

#[test]
fn a_write_that_another_program_is_in_the_way_of_is_repeated() {
    run("a_write_that_another_program_is_in_the_way_of_is_repeated", |token| {
        let mut backend = token.open();
        let generate = |backend: &mut Pkcs11Backend| backend.generate(&id("key"), KeyAlgorithm::EcdsaP256).map(|_| ());
        let delete = |backend: &mut Pkcs11Backend| backend.delete(&id("key"));
        type Call<'a> = &'a dyn Fn(&mut Pkcs11Backend) -> Result<(), pintle_plugins_api::BackendError>;
        let calls: [(&str, Call<'_>); 2] = [("before-generate", &generate), ("destroy", &delete)];
        for (place, call) in calls {
            // CKR_DEVICE_MEMORY.
            token.fault(place, 0x31, 100);
            let error = refused(call(&mut backend), BackendErrorKind::Unavailable);
            assert!(error.hint.is_some_and(|hint| hint.contains("another program is writing")), "{place}");
            assert!(token.faults_left() > 90, "{place}");
            token.fault(place, 0x31, 3);
            assert_eq!(call(&mut backend), Ok(()), "{place}");
            assert_eq!(token.faults_left(), 0, "{place}");
        }
        assert_eq!(backend.list(), Ok(vec![]));
    });
}

#[test]
fn a_token_that_has_a_pin_and_says_that_it_has_none_is_not_locked() {
    run("a_token_that_has_a_pin_and_says_that_it_has_none_is_not_locked", |token| {
        // CKR_USER_PIN_NOT_INITIALIZED.
        token.fault("login", 0x102, 1);
        assert_eq!(token.open().list(), Ok(vec![]));
        token.fault("login", 0x102, 100);
        let mut backend = without_reloads(token);
        let error = refused(backend.list(), BackendErrorKind::Unavailable);
        assert!(error.detail.contains("CKR_USER_PIN_NOT_INITIALIZED"), "{error}");
        token.fault("none", 0, 0);
        assert_eq!(backend.list(), Ok(vec![]));
    });
}

#[test]
fn a_token_without_a_pin_is_locked() {
    run("a_token_without_a_pin_is_locked", |token| {
        token.forget_pin();
        let error = refused(token.open().list(), BackendErrorKind::Locked);
        assert!(error.detail.contains("has no user PIN yet"), "{error}");
    });
}

#[test]
fn what_a_token_counts_and_limits_is_told() {
    run("what_a_token_counts_and_limits_is_told", |token| {
        let (mut backend, _) = with_a_key(token);
        token.fault("limits", 0, 100);
        let usage: Vec<_> = backend.usage().expect("told").iter().map(ToString::to_string).collect();
        let expected =
            ["objects 2", "sessions 3 of 16", "read/write sessions 2 of 4", "bytes of public memory 400 of 1000"];
        assert_eq!(usage, expected);
        token.fault("token-info", 0x30, 100);
        refused(backend.usage(), BackendErrorKind::Unavailable);
    });
}
