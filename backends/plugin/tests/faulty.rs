//! Plugins with a wrong version, a missing function, a short table, a panic or a lie get a clear error, and never
//! undefined behaviour: the last test runs the others under valgrind.

mod shared;

use std::path::{Path, PathBuf};
use std::process::Command;

use pintle_backend_plugin::PluginBackend;
use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, Resource, SignatureScheme,
};

fn compiled(directory: &Path, fault: &str) -> PathBuf {
    let path = directory.join(format!("{fault}.so"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faulty.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-fPIC", "-shared", "-I"]);
    compiler.arg(shared::plugins_api().join("include")).arg(format!("-DFAULT_{fault}")).arg("-o").arg(&path);
    shared::run(compiler.arg(source));
    path
}

fn id() -> KeyId {
    KeyId::new(*b"node/1").expect("a key id")
}

fn sign(backend: &mut PluginBackend) -> Result<Vec<u8>, BackendError> {
    backend.sign(&id(), SignatureScheme::EcdsaP256Sha256, b"message")
}

/// What a person reads: one line, that names the plugin, and what to do.
fn clear(error: &BackendError, kind: BackendErrorKind, words: &str) {
    assert_eq!(error.kind, kind, "{error:?}");
    assert!(error.detail.contains(words), "{words:?} is not in {error:?}");
    for line in [Some(&error.detail), error.hint.as_ref()].into_iter().flatten() {
        assert!(!line.contains(char::is_control), "{error:?}");
    }
}

#[test]
fn tables_that_cannot_be_used_are_refused() {
    let scratch = shared::scratch();
    for (fault, kind, words) in [
        ("SYMBOL", BackendErrorKind::Unsupported, "does not export pintle_backend_v1"),
        ("MAJOR", BackendErrorKind::Unsupported, "speaks version 2"),
        ("NULL", BackendErrorKind::Unsupported, "does not work with this host"),
        ("MISALIGNED", BackendErrorKind::Corrupt, "not aligned"),
        ("SHORT_TABLE", BackendErrorKind::Corrupt, "its table has only 16 bytes"),
        ("MISSING", BackendErrorKind::Corrupt, "its function sign is missing"),
    ] {
        let plugin = compiled(scratch.path(), fault);
        // The second time it is not loaded again, and the answer is the same.
        for _ in 0..2 {
            let error = shared::open(&plugin, "{}").map(|_| ()).expect_err(fault);
            clear(&error, kind, words);
            assert!(error.detail.contains(fault) && error.hint.is_some(), "{error:?}");
        }
    }
    let text = scratch.path().join("text.so");
    std::fs::write(&text, "this is no shared object").expect("a file");
    let error = shared::open(&text, "{}").map(|_| ()).expect_err("it is text");
    clear(&error, BackendErrorKind::Unavailable, "text.so");
}

#[test]
fn lies_are_found_out() {
    let scratch = shared::scratch();
    let plugin = compiled(scratch.path(), "NONE");
    let open = |fault: &str| shared::open(&plugin, fault).expect(fault);
    let corrupt = BackendErrorKind::Corrupt;

    // The truth first: what is refused below is not refused for another reason.
    let mut honest = open("none");
    honest.public_key(&id()).expect("a key");
    assert_eq!(honest.list().map(|ids| ids.len()), Ok(2));
    assert_eq!(honest.reference(&id()), Ok(KeyReference::Uri("faulty:key".to_owned())));
    let resources = [Resource::new("sessions", 1, Some(16)), Resource::new("key slots", 2, None)];
    assert_eq!(honest.usage(), Ok(resources.to_vec()));

    // Its signature is well-formed, and is not one of the key. That is found as soon as the key is made.
    let useless = honest.generate(&id(), KeyAlgorithm::EcdsaP256).expect_err("forged");
    clear(&useless, corrupt, "a signature that is not one of key");
    clear(&sign(&mut honest).expect_err("forged"), corrupt, "a signature that is not one of key");
    clear(&sign(&mut open("empty signature")).expect_err("empty"), corrupt, "sign");
    let wrong = honest.generate(&KeyId::new(*b"2").expect("a key id"), KeyAlgorithm::Rsa2048).expect_err("P-256");
    clear(&wrong, corrupt, "answered a key of ecdsa-p256 for one of rsa-2048");

    let garbage = open("garbage public key").public_key(&id()).expect_err("garbage");
    clear(&garbage, corrupt, "not a DER SubjectPublicKeyInfo");
    let mut changing = open("another public key");
    changing.public_key(&id()).expect("the first key");
    clear(&changing.public_key(&id()).expect_err("the second"), corrupt, "another public key");
    changing.delete(&id()).expect("it is gone");
    changing.public_key(&id()).expect("a new key under the same id");

    for fault in [
        "oversized length",
        "one byte too long",
        "greedy",
        "never enough",
        "too small for less",
        "other buffer",
        "writes nothing",
        "unknown code",
        "positive code",
    ] {
        let mut backend = open(fault);
        for error in [
            backend.generate(&id(), KeyAlgorithm::EcdsaP256).map(|_| ()),
            backend.public_key(&id()).map(|_| ()),
            sign(&mut backend).map(|_| ()),
            backend.list().map(|_| ()),
            backend.reference(&id()).map(|_| ()),
            backend.usage().map(|_| ()),
        ] {
            clear(&error.expect_err(fault), corrupt, "is faulty");
        }
    }
    for fault in ["unknown code", "positive code"] {
        clear(&open(fault).delete(&id()).expect_err(fault), corrupt, "no error code");
    }
    for fault in ["list of an empty id", "list that ends early", "list of a long id"] {
        clear(&open(fault).list().expect_err(fault), corrupt, "no list of key ids");
    }
    for fault in ["resource of no name", "resource of no number", "resource with a nasty name"] {
        clear(&open(fault).usage().expect_err(fault), corrupt, "no list of resources");
    }
    for fault in ["unknown reference", "relative file", "reference of no text"] {
        clear(&open(fault).reference(&id()).expect_err(fault), corrupt, "nonsense");
    }
}

#[test]
fn a_plugin_built_before_usage_loads_and_says_nothing_of_it() {
    let scratch = shared::scratch();
    let mut backend = shared::open(&compiled(scratch.path(), "VERSION_1_0"), "none").expect("it opens");
    assert_eq!(backend.usage(), Ok(vec![]));
    assert_eq!(backend.list().map(|ids| ids.len()), Ok(2));
}

#[test]
fn error_texts_are_believed_as_text_only() {
    let scratch = shared::scratch();
    let plugin = compiled(scratch.path(), "NONE");
    let unavailable = BackendErrorKind::Unavailable;
    for fault in ["error without text", "lying error text"] {
        let error = shared::open(&plugin, fault).expect(fault).list().expect_err(fault);
        clear(&error, unavailable, "list failed");
    }
    let nasty = shared::open(&plugin, "nasty error text").expect("it opens").list().expect_err("it fails");
    clear(&nasty, unavailable, "[2Jlevel=info\u{fffd}\u{fffd} done");
    assert_eq!(nasty.hint.as_deref(), Some("hint  of it"));

    let refused = |fault: &str| shared::open(&plugin, fault).map(|_| ()).expect_err(fault);
    clear(&refused("no context"), BackendErrorKind::Corrupt, "succeeded without a context");
    clear(&refused("open fails"), unavailable, "the device");
    clear(&refused("open fails with a lie"), BackendErrorKind::Locked, "open failed");
}

#[test]
fn panics_stay_in_the_plugin() {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is in the target directory");
    let mut cargo = Command::new(env!("CARGO"));
    // With the features of the whole workspace, as everything else is built: those of this package alone would have its
    // dependencies compiled once more, AWS-LC among them.
    cargo.args(["build", "--quiet", "--workspace", "--example", "panicking", "--target-dir"]);
    shared::run(cargo.arg(target));
    let plugin = target.join("debug/examples/libpanicking.so").canonicalize().expect("it was built");

    let error = shared::open(&plugin, "open").map(|_| ()).expect_err("it panics");
    clear(&error, BackendErrorKind::Corrupt, "panics in open");
    let mut backend = shared::open(&plugin, "{}").expect("it opens");
    for (error, words) in [
        (backend.generate(&id(), KeyAlgorithm::EcdsaP256).map(|_| ()), "panicked: no key node%2F1"),
        (backend.public_key(&id()).map(|_| ()), "range start index 1"),
        (backend.delete(&id()), "panicked"),
        (backend.list().map(|_| ()), "the list"),
        (backend.reference(&id()).map(|_| ()), "no reference"),
        (sign(&mut backend).map(|_| ()), "range start index 1"),
    ] {
        clear(&error.expect_err(words), BackendErrorKind::Corrupt, words);
    }
    drop(backend);
}

#[test]
fn valgrind_finds_no_error_in_any_of_it() {
    let mut valgrind = Command::new("valgrind");
    valgrind
        .env("RUST_BACKTRACE", "0")
        .args(["--quiet", "--error-exitcode=99"])
        .arg(std::env::current_exe().expect("this test"));
    shared::run(valgrind.args(["--test-threads=1", "--skip", "valgrind"]));
}
