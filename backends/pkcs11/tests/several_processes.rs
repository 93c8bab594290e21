//! Several processes that log in to one token, make keys and destroy them, all at once.

mod support;

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use pintle_backend_pkcs11::{Configuration, Pkcs11Backend};
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, SignatureScheme};
use support::{Kind, TestToken, id, refused};

const MESSAGE: &[u8] = b"a message";
const SCHEME: SignatureScheme = SignatureScheme::EcdsaP256Sha256;
/// Which of several processes a test is.
const WORKER: &str = "PINTLE_TEST_WORKER";
const WORKERS: usize = 4;
/// How many processes one after the other each worker is.
const LIVES: usize = 4;

/// A file of the token's own: `token.object` is the token itself, and `generation` counts what is made and destroyed.
fn token_file(token: &TestToken, name: &str) -> PathBuf {
    let mut directories = fs::read_dir(token.tokens()).expect("the tokens");
    directories.next().expect("a token").expect("its directory").path().join(name)
}

/// SoftHSM's files begin with a number that each change adds one to.
fn changed(content: &[u8]) -> Vec<u8> {
    let (count, rest) = content.split_first_chunk().expect("a number");
    [&(u64::from_be_bytes(*count) + 1).to_be_bytes(), rest].concat()
}

/// Runs `call` while the token is as SoftHSM 2.6.1 leaves it for a moment when somebody logs in: the file is empty, and
/// nobody holds its lock. Perhaps another program makes an object in that moment. On a busy machine the moment may be longer
/// than the backend waits; then it is tried again, some times.
fn while_it_is_written<T>(
    token: &TestToken,
    makes_an_object: bool,
    mut call: impl FnMut() -> Result<T, BackendError>,
) -> Result<T, BackendError> {
    for _ in 0..5 {
        let answer = once_while_it_is_written(token, makes_an_object, &mut call);
        if !answer.as_ref().is_err_and(|error| error.kind == BackendErrorKind::Unavailable) {
            return answer;
        }
    }
    once_while_it_is_written(token, makes_an_object, call)
}

fn once_while_it_is_written<T>(token: &TestToken, makes_an_object: bool, call: impl FnOnce() -> T) -> T {
    let (object, generation) = (token_file(token, "token.object"), token_file(token, "generation"));
    let content = fs::read(&object).expect("the token's file");
    fs::write(&object, "").expect("the token's file emptied");
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(10));
            if makes_an_object {
                let count = fs::read(&generation).expect("the count");
                fs::write(&generation, changed(&count)).expect("the count written");
            }
            thread::sleep(Duration::from_millis(20));
            fs::write(&object, changed(&content)).expect("the token's file written");
        });
        call()
    })
}

fn written_to(token: &TestToken) {
    let open = |reload_interval| {
        Pkcs11Backend::open(Configuration { reload_interval, ..token.configuration() }).expect("a backend")
    };
    let mut backend = open(Duration::from_secs(3600));
    // The module does not find the token when it is initialised.
    assert_eq!(while_it_is_written(token, false, || backend.list()), Ok(vec![]));
    let public_key = backend.generate(&id("key"), KeyAlgorithm::EcdsaP256).expect("a key");
    // It finds it, and cannot tell what it is.
    for _ in 0..5 {
        assert_eq!(while_it_is_written(token, false, || backend.list()), Ok(vec![id("key")]));
        let answer = while_it_is_written(token, false, || backend.public_key(&id("absent")));
        refused(answer, BackendErrorKind::NotFound);
        assert_eq!(while_it_is_written(token, false, || open(Duration::from_secs(3600)).list()), Ok(vec![id("key")]));
    }
    // It does not find it again until it is initialised anew.
    let mut backend = open(Duration::ZERO);
    for _ in 0..5 {
        assert_eq!(while_it_is_written(token, true, || backend.list()), Ok(vec![id("key")]));
        assert_eq!(while_it_is_written(token, true, || backend.public_key(&id("key"))), Ok(public_key.clone()));
    }
    assert_eq!(backend.delete(&id("key")), Ok(()));
}

#[test]
fn softhsm_written_to_at_this_moment() {
    support::run(Kind::SoftHsm, "softhsm_written_to_at_this_moment", written_to);
}

fn come_and_go(token: &TestToken, test: &str) {
    if let Ok(worker) = std::env::var(WORKER) {
        let mut backend = token.open();
        for round in 0..3 {
            let key = id(&format!("{worker}/{round}"));
            let public_key = backend.generate(&key, KeyAlgorithm::EcdsaP256).expect("a key");
            let signature = backend.sign(&key, SCHEME, MESSAGE).expect("a signature");
            assert!(public_key.verifies(SCHEME, MESSAGE, &signature));
            assert!(backend.list().expect("a list").contains(&key));
            assert_eq!(backend.public_key(&key), Ok(public_key));
            assert_eq!(backend.delete(&key), Ok(()));
            refused(backend.public_key(&key), BackendErrorKind::NotFound);
        }
        return;
    }
    thread::scope(|scope| {
        for worker in 0..WORKERS {
            scope.spawn(move || {
                for life in 0..LIVES {
                    let mut process = token.start_again(test, WORKER, &format!("{worker}/{life}"));
                    assert!(process.wait().expect("the worker ended").success(), "worker {worker} in life {life}");
                }
            });
        }
    });
    assert_eq!(token.open().list(), Ok(vec![]));
}

#[test]
fn softhsm_in_processes_that_come_and_go() {
    support::run(Kind::SoftHsm, "softhsm_in_processes_that_come_and_go", |token| {
        come_and_go(token, "softhsm_in_processes_that_come_and_go");
    });
}

#[test]
fn kryoptic_in_processes_that_come_and_go() {
    support::run(Kind::Kryoptic, "kryoptic_in_processes_that_come_and_go", |token| {
        come_and_go(token, "kryoptic_in_processes_that_come_and_go");
    });
}
