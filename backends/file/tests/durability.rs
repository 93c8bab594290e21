//! Crashes, torn files, full disks, and several users of one directory.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Barrier;

use pintle_backend_file::FileBackend;
use pintle_plugins_api::{BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, PublicKey};

fn id(text: &str) -> KeyId {
    text.parse().expect("an id")
}

fn private(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("the mode");
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    private(directory.path(), 0o700);
    directory
}

#[test]
fn missing_directories_are_made_for_their_owner_alone() {
    let parent = directory();
    let path = parent.path().join("state/keys");
    FileBackend::open(&path).expect("the backend");
    for made in [path.as_path(), &parent.path().join("state")] {
        assert_eq!(fs::metadata(made).expect("the directory").permissions().mode() & 0o7777, 0o700);
    }
}

#[test]
fn c02_torn_key_file_is_corrupt_and_can_be_deleted() {
    let directory = directory();
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    let torn = id("torn");
    backend.generate(&torn, KeyAlgorithm::EcdsaP256).expect("a key");
    let path = directory.path().join("torn.pem");
    let whole = fs::read(&path).expect("the file");
    for content in [&b""[..], &vec![0; whole.len()], &whole[..10], &whole[..whole.len() / 2], b"garbage"] {
        fs::write(&path, content).expect("the torn file");
        for answer in [
            backend.public_key(&torn).map(|_| ()),
            backend.sign(&torn, KeyAlgorithm::EcdsaP256.schemes()[0], b"message").map(|_| ()),
            backend.generate(&torn, KeyAlgorithm::EcdsaP256).map(|_| ()),
            backend.reference(&torn).map(|_| ()),
        ] {
            let error = answer.expect_err("a torn file is no key");
            assert_eq!(error.kind, BackendErrorKind::Corrupt, "{error}");
            assert!(error.hint.is_some() && error.detail.contains("torn.pem"), "{error}");
        }
        // What is torn is still ours, so that it can be seen and pruned; garbage may be anybody's.
        assert_eq!(backend.list().expect("the list").contains(&torn), content != b"garbage");
    }
    backend.delete(&torn).expect("deleted");
    backend.generate(&torn, KeyAlgorithm::EcdsaP256).expect("a new key");
}

#[test]
fn what_a_crash_left_of_a_write_is_swept() {
    let directory = directory();
    let temporary = directory.path().join(".new");
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    fs::write(&temporary, "-----BEGIN PRI").expect("a torn temporary file");
    assert_eq!(backend.list(), Ok(vec![]));
    backend.generate(&id("first"), KeyAlgorithm::Ed25519).expect("a key");
    assert!(!temporary.exists());
    fs::write(&temporary, "").expect("an empty temporary file");
    FileBackend::open(directory.path()).expect("the backend");
    assert!(!temporary.exists());
    assert_eq!(backend.list(), Ok(vec![id("first")]));
}

/// The child of the test below, which kills it.
#[test]
fn generate_in_a_process_to_be_killed() {
    let Some(directory) = std::env::var_os("PINTLE_TEST_GENERATE_IN") else {
        return; // Only the test below sets it.
    };
    let mut backend = FileBackend::open(directory.as_ref()).expect("the backend");
    backend.generate(&id("key"), KeyAlgorithm::EcdsaP256).expect("a key");
}

#[test]
fn killed_at_any_system_call_the_key_is_whole_or_absent() {
    let (mut torn, mut absent, mut whole) = (0, 0, 0);
    for system_call in ["openat", "flock", "write", "fsync", "renameat"] {
        for occurrence in 1.. {
            let parent = directory();
            let path = parent.path().join("keys");
            let status = Command::new("strace")
                .args(["-f", "-qq", "-o", "/dev/null", "-e"])
                .arg(format!("inject={system_call}:signal=SIGKILL:when={occurrence}"))
                // Only the calls that touch these: those of the test harness are not what this is about.
                .args([OsStr::new("-P"), path.as_os_str(), OsStr::new("-P"), path.join(".new").as_os_str()])
                .args([OsStr::new("-P"), path.join("key.pem").as_os_str()])
                .arg(std::env::current_exe().expect("this test"))
                .args(["--exact", "generate_in_a_process_to_be_killed"])
                .env("PINTLE_TEST_GENERATE_IN", &path)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .expect("strace, which the test command installs");
            if status.success() {
                assert!(occurrence > 1, "{system_call} is never called");
                break;
            }
            torn += usize::from(path.join(".new").exists());
            let left = path.join("key.pem").exists();
            let mut backend = FileBackend::open(&path).expect("the backend");
            let listed = backend.list().expect("the list");
            assert_eq!(listed, if left { vec![id("key")] } else { vec![] }, "{system_call} {occurrence}");
            if left {
                backend.public_key(&id("key")).unwrap_or_else(|error| panic!("{system_call} {occurrence}: {error}"));
                whole += 1;
            } else {
                absent += 1;
            }
            backend.generate(&id("key"), KeyAlgorithm::EcdsaP256).expect("a key");
            let files = fs::read_dir(&path).expect("the directory").count();
            assert_eq!(files, 1, "something other than the key is left: {system_call} {occurrence}");
        }
    }
    // The kills were spread over the whole of it.
    assert!(torn > 0 && absent > 0 && whole > 0, "{torn} torn, {absent} absent, {whole} whole");
}

#[test]
fn two_processes_that_generate_one_id_get_one_key() {
    let directory = directory();
    for round in 0..20 {
        let id = id(&format!("round-{round}"));
        let barrier = Barrier::new(4);
        let keys: BTreeSet<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| -> PublicKey {
                        let mut backend = FileBackend::open(directory.path()).expect("the backend");
                        barrier.wait();
                        backend.generate(&id, KeyAlgorithm::EcdsaP256).expect("a key")
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a key").as_der().to_vec()).collect()
        });
        assert_eq!(keys.len(), 1);
    }
}

#[test]
fn the_file_is_the_truth_and_not_what_is_remembered_of_it() {
    let directory = directory();
    let mut one = FileBackend::open(directory.path()).expect("the backend");
    let mut other = FileBackend::open(directory.path()).expect("the backend");
    let (id, scheme) = (id("key"), KeyAlgorithm::Ed25519.schemes()[0]);
    let first = one.generate(&id, KeyAlgorithm::Ed25519).expect("a key");
    one.sign(&id, scheme, b"message").expect("a signature");

    other.delete(&id).expect("deleted");
    assert_eq!(one.sign(&id, scheme, b"message").expect_err("deleted").kind, BackendErrorKind::NotFound);
    let second = other.generate(&id, KeyAlgorithm::Ed25519).expect("another key");
    assert_ne!(first, second);
    let signature = one.sign(&id, scheme, b"message").expect("a signature");
    assert!(second.verifies(scheme, b"message", &signature));
}

#[test]
fn c29_full_disk_is_unavailable_until_there_is_room() {
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs"])
        .arg(directory.path())
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: mounting a small tmpfs needs root");
        return;
    }
    let _mounted = Mounted(directory.path());
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    let kept = backend.generate(&id("kept"), KeyAlgorithm::EcdsaP256).expect("a key");
    let filler = directory.path().join("filler");
    let mut file = fs::File::create(&filler).expect("a file");
    while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}

    let error = backend.generate(&id("new"), KeyAlgorithm::EcdsaP256).expect_err("no room");
    assert_eq!(error.kind, BackendErrorKind::Unavailable);
    assert!(error.detail.contains("the disk is full") && error.hint.is_some(), "{error}");
    assert_eq!(backend.list(), Ok(vec![id("kept")]));
    assert!(!directory.path().join(".new").exists());
    assert_eq!(backend.public_key(&id("kept")), Ok(kept));

    // Now, and not when a process that another test starts at this moment has closed its copy.
    file.set_len(0).expect("room");
    fs::remove_file(&filler).expect("removed");
    backend.generate(&id("new"), KeyAlgorithm::EcdsaP256).expect("a key");
}

#[test]
fn an_id_too_long_for_a_file_name_is_refused_before_anything_is_made() {
    let directory = directory();
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    let longest = KeyId::new(vec![0xff; 83]).expect("an id");
    backend.generate(&longest, KeyAlgorithm::Ed25519).expect("a key");
    assert_eq!(backend.list(), Ok(vec![longest]));
    let longer = KeyId::new(vec![0xff; 84]).expect("an id");
    let error = backend.generate(&longer, KeyAlgorithm::Ed25519).expect_err("too long");
    assert_eq!(error.kind, BackendErrorKind::Unsupported);
    assert!(error.hint.is_some());
    assert_eq!(backend.public_key(&longer).expect_err("absent").kind, BackendErrorKind::NotFound);
    assert_eq!(backend.delete(&longer), Ok(()));
}
