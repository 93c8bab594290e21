//! What the backend does when its token is pulled, logged out, locked, shared, or interrupted.

mod support;

use std::time::Duration;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::session::Session;
use pintle_backend_pkcs11::{Configuration, Pkcs11Backend};
use pintle_plugins_api::{BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, SignatureScheme};
use support::{Kind, LABEL, TestToken, id, refused, when_available};

const MESSAGE: &[u8] = b"a message";
const SCHEME: SignatureScheme = SignatureScheme::EcdsaP256Sha256;
/// Which of several processes a test is, and what it works on.
const WORKER: &str = "PINTLE_TEST_WORKER";

fn generate(backend: &mut Pkcs11Backend, id: &KeyId) -> pintle_plugins_api::PublicKey {
    backend.generate(id, KeyAlgorithm::EcdsaP256).expect("a key")
}

/// A session of somebody else in this process, on the same token.
fn foreign_session(token: &TestToken) -> (Pkcs11, Session) {
    let pkcs11 = Pkcs11::new(&token.module).expect("the module");
    let slots = pkcs11.get_slots_with_token().expect("slots");
    let slot = slots
        .into_iter()
        .find(|slot| pkcs11.get_token_info(*slot).is_ok_and(|info| info.label() == LABEL))
        .expect("the slot");
    let session = pkcs11.open_rw_session(slot).expect("a session");
    (pkcs11, session)
}

/// How many private and public objects of ours another program sees. SoftHSM may also hold objects without any name: it
/// leaves such a one when the process is killed before it has written the template's attributes.
fn count_objects(token: &TestToken) -> (usize, usize) {
    let count = |kind| {
        let output = token.pkcs11_tool_logged_in(&["--list-objects", "--type", kind]);
        let label = |line: &&str| line.trim_start().strip_prefix("label:").is_some_and(|text| text.contains("pintle "));
        String::from_utf8_lossy(&output.stdout).lines().filter(label).count()
    };
    (count("privkey"), count("pubkey"))
}

fn removed_and_put_back(token: &TestToken) {
    let mut backend = token.open();
    let key = id("kept");
    let public_key = generate(&mut backend, &key);
    for _ in 0..2 {
        token.remove();
        for _ in 0..3 {
            refused(backend.sign(&key, SCHEME, MESSAGE), BackendErrorKind::Unavailable);
            refused(backend.public_key(&key), BackendErrorKind::Unavailable);
            refused(backend.public_key(&id("never")), BackendErrorKind::Unavailable);
            refused(backend.generate(&id("new"), KeyAlgorithm::EcdsaP256), BackendErrorKind::Unavailable);
            refused(backend.delete(&key), BackendErrorKind::Unavailable);
            refused(backend.list(), BackendErrorKind::Unavailable);
            refused(backend.reference(&key), BackendErrorKind::Unavailable);
        }
        token.put_back();
        let signature = when_available(|| backend.sign(&key, SCHEME, MESSAGE));
        assert!(public_key.verifies(SCHEME, MESSAGE, &signature));
        assert_eq!(backend.list(), Ok(vec![key.clone()]));
    }
}

#[test]
fn c25_token_removed_and_put_back() {
    support::run(Kind::SoftHsm, "c25_token_removed_and_put_back", removed_and_put_back);
}

fn absent_at_the_start(token: &TestToken) {
    token.remove();
    let mut backend = token.open();
    refused(backend.list(), BackendErrorKind::Unavailable);
    refused(backend.list(), BackendErrorKind::Unavailable);
    token.put_back();
    assert_eq!(when_available(|| backend.list()), vec![]);
    generate(&mut backend, &id("first"));
}

#[test]
fn c25_token_absent_at_the_start() {
    support::run(Kind::SoftHsm, "c25_token_absent_at_the_start", absent_at_the_start);
}

fn shared_by_two_backends(token: &TestToken) {
    let (mut first, mut second) = (token.open(), token.open());
    let public_key = generate(&mut first, &id("shared"));
    assert_eq!(second.public_key(&id("shared")), Ok(public_key.clone()));
    token.remove();
    refused(first.list(), BackendErrorKind::Unavailable);
    refused(second.list(), BackendErrorKind::Unavailable);
    token.put_back();
    // The one that finds the token again has the module initialised anew; the other one's session is of the past.
    for backend in [&mut first, &mut second] {
        let signature = when_available(|| backend.sign(&id("shared"), SCHEME, MESSAGE));
        assert!(public_key.verifies(SCHEME, MESSAGE, &signature));
    }
    // What goes away now must not close a session of the other.
    drop(first);
    assert!(second.sign(&id("shared"), SCHEME, MESSAGE).is_ok());
}

#[test]
fn c25_two_backends_of_one_process_recover_together() {
    support::run(Kind::SoftHsm, "c25_two_backends_of_one_process_recover_together", shared_by_two_backends);
}

fn reloads_are_rare(token: &TestToken) {
    let configuration = Configuration { reload_interval: Duration::from_secs(3600), ..token.configuration() };
    let mut backend = Pkcs11Backend::open(configuration).expect("a backend");
    generate(&mut backend, &id("key"));
    token.remove();
    let initializations = || {
        let log = std::fs::read_to_string(token.directory.join("spy.log")).expect("the spy's log");
        log.lines().filter(|line| line.ends_with(": C_Initialize")).count()
    };
    assert_eq!(initializations(), 1);
    for _ in 0..10 {
        refused(backend.list(), BackendErrorKind::Unavailable);
    }
    assert_eq!(initializations(), 2, "one look for the token, and the next one an hour later");
}

#[test]
fn c25_a_module_is_not_initialised_again_and_again() {
    support::run_spied(Kind::SoftHsm, "c25_a_module_is_not_initialised_again_and_again", reloads_are_rare);
}

fn replaced(token: &TestToken) {
    let mut backend = token.open();
    generate(&mut backend, &id("lost"));
    token.replace();
    let error = loop {
        match backend.public_key(&id("lost")) {
            Err(error) if error.kind == BackendErrorKind::Unavailable => std::thread::sleep(Duration::from_millis(20)),
            answer => break answer.expect_err("the key is lost"),
        }
    };
    assert!(matches!(error.kind, BackendErrorKind::KeyLost | BackendErrorKind::NotFound), "{error}");
    generate(&mut backend, &id("lost"));
}

#[test]
fn c26_token_initialised_anew_has_lost_its_keys() {
    support::run(Kind::SoftHsm, "c26_token_initialised_anew_has_lost_its_keys", replaced);
}

fn logged_out(token: &TestToken) {
    let mut backend = token.open();
    let public_key = generate(&mut backend, &id("key"));
    type Call<'a> = &'a dyn Fn(&mut Pkcs11Backend);
    let calls: [Call<'_>; 5] = [
        &|backend| {
            let signature = backend.sign(&id("key"), SCHEME, MESSAGE).expect("a signature");
            assert!(public_key.verifies(SCHEME, MESSAGE, &signature));
        },
        &|backend| assert_eq!(backend.public_key(&id("key")), Ok(public_key.clone())),
        &|backend| assert_eq!(backend.list(), Ok(vec![id("key")])),
        // Seen without a login, the pair is a public half: not to be taken for the remains of a crash.
        &|backend| assert_eq!(generate(backend, &id("key")), public_key),
        &|backend| assert_eq!(backend.delete(&id("key")), Ok(())),
    ];
    for call in calls {
        let (_pkcs11, session) = foreign_session(token);
        session.logout().expect("logged out");
        call(&mut backend);
    }
    assert_eq!(count_objects(token), (0, 0));
}

#[test]
fn softhsm_logged_out_behind_our_back() {
    support::run(Kind::SoftHsm, "softhsm_logged_out_behind_our_back", logged_out);
}

#[test]
fn kryoptic_logged_out_behind_our_back() {
    support::run(Kind::Kryoptic, "kryoptic_logged_out_behind_our_back", logged_out);
}

fn finalized(token: &TestToken) {
    let mut backend = token.open();
    let public_key = generate(&mut backend, &id("key"));
    Pkcs11::new(&token.module).expect("the module").finalize().expect("finalized");
    let signature = when_available(|| backend.sign(&id("key"), SCHEME, MESSAGE));
    assert!(public_key.verifies(SCHEME, MESSAGE, &signature));
    // And again, with a new initialisation that is not ours.
    let pkcs11 = Pkcs11::new(&token.module).expect("the module");
    pkcs11.clone().finalize().expect("finalized");
    pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).expect("initialised");
    let signature = when_available(|| backend.sign(&id("key"), SCHEME, MESSAGE));
    assert!(public_key.verifies(SCHEME, MESSAGE, &signature));
}

#[test]
fn softhsm_finalized_behind_our_back() {
    support::run(Kind::SoftHsm, "softhsm_finalized_behind_our_back", finalized);
}

#[test]
fn kryoptic_finalized_behind_our_back() {
    support::run(Kind::Kryoptic, "kryoptic_finalized_behind_our_back", finalized);
}

fn two_processes(token: &TestToken, test: &str) {
    if let Ok(worker) = std::env::var(WORKER) {
        let mut backend = token.open();
        for round in 0..10 {
            let key = id(&format!("worker-{worker}/{round}"));
            // Kryoptic does not wait while the other process writes, and says CKR_DEVICE_MEMORY.
            let public_key = when_available(|| backend.generate(&key, KeyAlgorithm::EcdsaP256));
            for _ in 0..10 {
                let signature = when_available(|| backend.sign(&key, SCHEME, MESSAGE));
                assert!(public_key.verifies(SCHEME, MESSAGE, &signature));
            }
            assert!(when_available(|| backend.list()).contains(&key));
            if round % 2 == 0 {
                when_available(|| backend.delete(&key));
                refused(backend.public_key(&key), BackendErrorKind::NotFound);
            }
        }
        return;
    }
    let workers: Vec<_> = ["a", "b"].iter().map(|worker| token.start_again(test, WORKER, worker)).collect();
    for mut worker in workers {
        assert!(worker.wait().expect("the worker ended").success());
    }
    assert_eq!(token.open().list().expect("a list").len(), 10);
    assert_eq!(count_objects(token), (10, 10));
}

#[test]
fn softhsm_in_two_processes_at_once() {
    support::run(Kind::SoftHsm, "softhsm_in_two_processes_at_once", |token| {
        two_processes(token, "softhsm_in_two_processes_at_once");
    });
}

#[test]
fn kryoptic_in_two_processes_at_once() {
    support::run(Kind::Kryoptic, "kryoptic_in_two_processes_at_once", |token| {
        two_processes(token, "kryoptic_in_two_processes_at_once");
    });
}

fn killed(token: &TestToken, test: &str) {
    // Not before the login: SoftHSM writes the token's flags then, and a process killed there ruins the whole token.
    let ready = token.directory.join("ready");
    if std::env::var(WORKER).is_ok() {
        let mut backend = token.open();
        backend.list().expect("a list");
        std::fs::write(&ready, "").expect("ready");
        loop {
            generate(&mut backend, &id("key"));
            backend.delete(&id("key")).expect("deleted");
        }
    }
    for round in 0..20 {
        let mut worker = token.start_again(test, WORKER, "generate");
        while !ready.exists() {
            assert!(worker.try_wait().expect("the worker").is_none(), "the worker ended too soon");
            std::thread::sleep(Duration::from_millis(1));
        }
        // At another point of generating, or of destroying, in each round.
        std::thread::sleep(Duration::from_micros(1500 * round));
        worker.kill().expect("killed");
        worker.wait().expect("the worker ended");
        std::fs::remove_file(&ready).expect("the file removed");
        let mut backend = token.open();
        let public_key = generate(&mut backend, &id("key"));
        let signature = backend.sign(&id("key"), SCHEME, MESSAGE).expect("a signature");
        assert!(public_key.verifies(SCHEME, MESSAGE, &signature));
        assert_eq!(backend.list(), Ok(vec![id("key")]));
        assert_eq!(count_objects(token), (1, 1), "round {round}");
        backend.delete(&id("key")).expect("deleted");
        assert_eq!(count_objects(token), (0, 0), "round {round}");
    }
}

#[test]
fn softhsm_process_killed_while_it_generates() {
    support::run(Kind::SoftHsm, "softhsm_process_killed_while_it_generates", |token| {
        killed(token, "softhsm_process_killed_while_it_generates");
    });
}

#[test]
fn kryoptic_process_killed_while_it_generates() {
    support::run(Kind::Kryoptic, "kryoptic_process_killed_while_it_generates", |token| {
        killed(token, "kryoptic_process_killed_while_it_generates");
    });
}
