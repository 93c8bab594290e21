//! Directories and files that others own or could read are refused, each with a hint.
//!
//! As root, the tests run themselves again as another user, since root is refused nothing.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use pintle_backend_file::FileBackend;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId};

/// "nobody" on every Linux.
const ANOTHER_USER: u32 = 65534;
const ALGORITHM: KeyAlgorithm = KeyAlgorithm::EcdsaP256;

fn id() -> KeyId {
    KeyId::new(*b"key").expect("an id")
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("the mode");
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    set_mode(directory.path(), 0o700);
    directory
}

#[track_caller]
fn assert_refused<T>(answer: Result<T, BackendError>, words: &str) {
    let Err(error) = answer else { panic!("not refused") };
    assert_eq!(error.kind, BackendErrorKind::Unavailable, "{error}");
    assert!(error.detail.contains(words), "{error}");
    assert!(error.hint.is_some(), "{error}");
}

#[test]
fn directory_that_others_can_enter_is_refused() {
    let directory = directory();
    for mode in [0o750, 0o701, 0o755, 0o770] {
        set_mode(directory.path(), mode);
        assert_refused(FileBackend::open(directory.path()), "accessible to other users");
    }
    set_mode(directory.path(), 0o700);
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    // Also later, and it mends without opening anew.
    set_mode(directory.path(), 0o755);
    assert_refused(backend.generate(&id(), ALGORITHM), "accessible to other users");
    set_mode(directory.path(), 0o700);
    backend.generate(&id(), ALGORITHM).expect("a key");
}

#[test]
fn key_file_that_others_can_read_is_refused_even_if_it_is_remembered() {
    let directory = directory();
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    backend.generate(&id(), ALGORITHM).expect("a key");
    let path = directory.path().join("key.pem");
    let mut sign = || backend.sign(&id(), ALGORITHM.schemes()[0], b"message");
    sign().expect("a signature");
    set_mode(&path, 0o640);
    assert_refused(sign(), "accessible to other users");
    set_mode(&path, 0o600);
    sign().expect("a signature");
}

#[test]
fn symbolic_link_in_the_place_of_a_key_is_refused() {
    let (directory, elsewhere) = (directory(), directory());
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    let target = elsewhere.path().join("key.pem");
    FileBackend::open(elsewhere.path()).expect("the backend").generate(&id(), ALGORITHM).expect("a key");
    symlink(&target, directory.path().join("key.pem")).expect("a symbolic link");
    assert_refused(backend.public_key(&id()), "symbolic link");
    assert_refused(backend.generate(&id(), ALGORITHM), "symbolic link");
    backend.delete(&id()).expect("the link removed");
    assert!(target.exists(), "and not what it points to");

    symlink(&target, directory.path().join(".new")).expect("a symbolic link");
    let before = fs::read(&target).expect("the key");
    backend.generate(&id(), ALGORITHM).expect("a key");
    assert_eq!(fs::read(&target).expect("the key"), before, "nothing is written through a link");
}

#[test]
fn fifo_in_the_place_of_a_key_does_not_block() {
    let directory = directory();
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    let made = Command::new("mkfifo").args(["-m", "600"]).arg(directory.path().join("key.pem")).status();
    assert!(made.expect("mkfifo").success());
    assert_eq!(backend.public_key(&id()).expect_err("no key").kind, BackendErrorKind::Corrupt);
    assert_eq!(backend.list(), Ok(vec![]));
}

#[test]
fn directory_or_file_of_another_user_is_refused() {
    let directory = directory();
    if chown(directory.path(), Some(ANOTHER_USER), None).is_err() {
        eprintln!("skipped: giving files away needs root");
        return;
    }
    assert_refused(FileBackend::open(directory.path()), "belongs to user 65534");
    chown(directory.path(), Some(0), None).expect("taken back");
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    backend.generate(&id(), ALGORITHM).expect("a key");
    chown(directory.path().join("key.pem"), Some(ANOTHER_USER), None).expect("given away");
    assert_refused(backend.public_key(&id()), "belongs to user 65534");
    assert_eq!(backend.list(), Ok(vec![]), "somebody else's");
}

#[test]
fn as_another_user_every_refusal_of_the_kernel_has_a_hint() {
    if let Some(parent) = std::env::var_os("PINTLE_TEST_AS_ANOTHER_USER") {
        return as_another_user(Path::new(&parent));
    }
    let parent = tempfile::tempdir().expect("a directory");
    set_mode(parent.path(), 0o755);
    let owned = |name: &str, mode, owner| {
        let path = parent.path().join(name);
        fs::create_dir(&path).expect("a directory");
        set_mode(&path, mode);
        chown(&path, Some(owner), Some(owner)).map(|()| path)
    };
    let Ok(own) = owned("own", 0o700, ANOTHER_USER) else {
        eprintln!("skipped: giving files away needs root");
        return;
    };
    owned("roots", 0o700, 0).expect("a directory");
    owned("open", 0o755, 0).expect("a directory");
    fs::write(own.join("roots.pem"), "").expect("a file of root");
    set_mode(&own.join("roots.pem"), 0o600);

    // The build directory may be closed to that user.
    let executable = parent.path().join("test");
    fs::copy(std::env::current_exe().expect("this test"), &executable).expect("its copy");
    set_mode(&executable, 0o755);
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&executable)
        .args(["--exact", "as_another_user_every_refusal_of_the_kernel_has_a_hint", "--nocapture"])
        .env("PINTLE_TEST_AS_ANOTHER_USER", parent.path())
        .current_dir(parent.path())
        .output()
        .expect("setpriv");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn as_another_user(parent: &Path) {
    assert_refused(FileBackend::open(&parent.join("roots")), "permission denied");
    assert_refused(FileBackend::open(&parent.join("open")), "belongs to user 0");
    assert_refused(FileBackend::open(&parent.join("new")), "permission denied");
    let own = parent.join("own");
    let mut backend = FileBackend::open(&own).expect("the backend");
    let roots = KeyId::new(*b"roots").expect("an id");
    assert_refused(backend.public_key(&roots), "permission denied");
    assert_refused(backend.generate(&roots, ALGORITHM), "permission denied");
    let public_key = backend.generate(&id(), ALGORITHM).expect("a key");
    assert_eq!(backend.list(), Ok(vec![id()]));

    let key = own.join("key.pem");
    set_mode(&key, 0);
    assert_refused(backend.public_key(&id()), "permission denied");
    // Hidden is not gone: a list without it would be a lie.
    assert_refused(backend.list(), "permission denied");
    set_mode(&key, 0o600);
    assert_eq!(backend.public_key(&id()), Ok(public_key));

    set_mode(&own, 0o500);
    assert_refused(backend.delete(&id()), "permission denied");
    let other = KeyId::new(*b"other").expect("an id");
    assert_refused(backend.generate(&other, ALGORITHM), "permission denied");
    set_mode(&own, 0o700);
    backend.delete(&id()).expect("deleted");
}
