//! What the TPM's neighbours do to it: restarts, clears, other users, and OpenSSL with the same keys.

mod swtpm;

use std::time::Duration;

use pintle_backend_tpm::TpmBackend;
use pintle_plugins_api::{BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, SignatureScheme};
use swtpm::Swtpm;

const MESSAGE: &[u8] = b"a certificate signing request";

fn id(text: &str) -> KeyId {
    KeyId::new(text.as_bytes()).expect("a key id")
}

fn open(swtpm: &Swtpm) -> TpmBackend {
    TpmBackend::open(&swtpm.configuration()).expect("the TPM's directory")
}

fn signs(backend: &mut TpmBackend, id: &KeyId, key: &PublicKey) -> Result<(), BackendErrorKind> {
    let scheme = key.algorithm().schemes()[0];
    let signature = backend.sign(id, scheme, MESSAGE).map_err(|error| {
        assert!(error.hint.is_some() && !error.to_string().contains('\n'), "{error:?}");
        error.kind
    })?;
    assert!(key.verifies(scheme, MESSAGE, &signature));
    Ok(())
}

/// C25.
#[test]
fn c25_restarted_tpm_is_used_again_without_being_asked() {
    let mut swtpm = Swtpm::new();
    let mut backend = open(&swtpm);
    let id = id("node/1");
    let key = backend.generate(&id, KeyAlgorithm::EcdsaP256).expect("a key");
    for _ in 0..3 {
        signs(&mut backend, &id, &key).expect("it signs");
        swtpm.stop();
        assert_eq!(signs(&mut backend, &id, &key), Err(BackendErrorKind::Unavailable));
        swtpm.start();
        signs(&mut backend, &id, &key).expect("it signs again");
        // Under the connection that is open, without anybody noticing.
        swtpm.stop();
        swtpm.start();
        signs(&mut backend, &id, &key).expect("it signs yet again");
    }
    assert_eq!(open(&swtpm).public_key(&id), Ok(key));
}

/// C26.
#[test]
fn c26_cleared_tpm_says_that_the_key_is_lost() {
    let swtpm = Swtpm::new();
    let mut backend = open(&swtpm);
    let id = id("node/1");
    let key = backend.generate(&id, KeyAlgorithm::EcdsaP256).expect("a key");
    signs(&mut backend, &id, &key).expect("it signs");
    swtpm.run("tpm2_clear", &["-c", "lockout"]);

    assert_eq!(signs(&mut backend, &id, &key), Err(BackendErrorKind::KeyLost));
    assert_eq!(backend.public_key(&id).map_err(|error| error.kind), Err(BackendErrorKind::KeyLost));
    let again = backend.generate(&id, KeyAlgorithm::EcdsaP256).map_err(|error| error.kind);
    assert_eq!(again, Err(BackendErrorKind::KeyLost), "never silently another key");
    backend.delete(&id).expect("a lost key can be deleted");
    let new = backend.generate(&id, KeyAlgorithm::EcdsaP256).expect("a new key");
    assert_ne!(new, key);
    signs(&mut backend, &id, &new).expect("it signs");
}

#[test]
fn slots_taken_by_another_user_are_waited_for_and_named() {
    let swtpm = Swtpm::new();
    let mut backend = open(&swtpm);
    let id = id("node/1");
    let key = backend.generate(&id, KeyAlgorithm::EcdsaP256).expect("a key");
    let take_slots = || {
        // Without a resource manager these stay in the TPM when the tool ends.
        for _ in 0..3 {
            swtpm.run("tpm2_createprimary", &["-C", "o", "-G", "ecc", "-c", "other.ctx"]);
        }
    };
    take_slots();
    assert_eq!(signs(&mut backend, &id, &key), Err(BackendErrorKind::Unavailable));
    assert_eq!(
        backend.generate(&self::id("node/2"), KeyAlgorithm::EcdsaP256).map_err(|error| error.kind),
        Err(BackendErrorKind::Unavailable)
    );
    swtpm.run("tpm2_flushcontext", &["-t"]);
    signs(&mut backend, &id, &key).expect("it signs again");

    take_slots();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            swtpm.run("tpm2_flushcontext", &["-t"]);
        });
        signs(&mut backend, &id, &key).expect("it waits for a slot");
    });
    assert_eq!(backend.list(), Ok(vec![id]), "nothing of the failed generate remains");
}

#[test]
fn nothing_is_left_in_the_tpm() {
    let swtpm = Swtpm::new();
    let mut backend = open(&swtpm);
    for number in 0..4 {
        let id = id(&format!("node/{number}"));
        let key = backend.generate(&id, KeyAlgorithm::EcdsaP256).expect("a key");
        signs(&mut backend, &id, &key).expect("it signs");
    }
    for handles in ["handles-transient", "handles-persistent", "handles-loaded-session"] {
        let listed = swtpm.run("tpm2_getcap", &[handles]);
        assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "", "{handles}");
    }
}

#[test]
fn usage_counts_the_slots_that_others_hold() {
    let swtpm = Swtpm::new();
    let mut backend = open(&swtpm);
    backend.generate(&id("node/1"), KeyAlgorithm::EcdsaP256).expect("a key");
    let usage = |backend: &mut TpmBackend| -> Vec<_> {
        backend.usage().expect("the TPM tells").into_iter().map(|resource| resource.to_string()).collect()
    };
    let before = usage(&mut backend);
    assert_eq!(before[..3], ["files 1", "transient objects 0 of 3", "loaded sessions 0 of 3"], "{before:?}");
    assert!(before[3].starts_with("persistent objects 0 of ") && before.len() == 4, "{before:?}");
    swtpm.run("tpm2_createprimary", &["-C", "o", "-G", "ecc", "-c", "other.ctx"]);
    assert_eq!(usage(&mut backend)[1], "transient objects 1 of 3");
    swtpm.run("tpm2_evictcontrol", &["-C", "o", "-c", "other.ctx", "0x81000001"]);
    swtpm.run("tpm2_flushcontext", &["-t"]);
    let after = usage(&mut backend);
    assert_eq!(after[..3], before[..3]);
    assert!(after[3].starts_with("persistent objects 1 of "), "{after:?}");
}

#[test]
fn a_key_file_that_is_none_is_corrupt_and_stays() {
    let swtpm = Swtpm::new();
    let mut backend = open(&swtpm);
    let id = id("node");
    backend.generate(&id, KeyAlgorithm::EcdsaP256).expect("a key");
    let path = swtpm.path("keys/node.tss2.pem");
    let whole = std::fs::read_to_string(&path).expect("the key's file");
    let middle = whole.len() / 2;
    for damaged in [String::new(), "garbage".to_owned(), whole[..middle].to_owned(), whole.replace("TSS2", "EC")] {
        std::fs::write(&path, &damaged).expect("the file is written");
        for kind in [
            backend.public_key(&id).map_err(|error| error.kind).map(|_| ()),
            backend.generate(&id, KeyAlgorithm::EcdsaP256).map_err(|error| error.kind).map(|_| ()),
            backend.reference(&id).map_err(|error| error.kind).map(|_| ()),
        ] {
            assert_eq!(kind, Err(BackendErrorKind::Corrupt), "{damaged}");
        }
        assert_eq!(std::fs::read_to_string(&path).expect("the file"), damaged);
    }
}

/// The published pair holds the reference: OpenSSL's tpm2 provider must be able to use it.
#[test]
fn openssl_signs_with_the_reference() {
    let swtpm = Swtpm::new();
    let mut backend = open(&swtpm);
    std::fs::write(swtpm.path("message"), MESSAGE).expect("the message");
    let providers = ["-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2"];
    for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::Rsa2048] {
        let id = id(algorithm.name());
        let key = backend.generate(&id, algorithm).expect("a key");
        let reference = backend.reference(&id).expect("its reference");
        let KeyReference::Pem(pem) = reference else { panic!("{reference:?}") };
        std::fs::write(swtpm.path("key.pem"), pem).expect("the key's file");

        let read =
            swtpm.run("openssl", &[&["pkey", "-in", "key.pem", "-pubout", "-outform", "DER"], &providers[..]].concat());
        assert_eq!(read.stdout, key.as_der(), "OpenSSL sees the same key");
        let signed =
            swtpm.run("openssl", &[&["dgst", "-sha256", "-sign", "key.pem"], &providers[..], &["message"]].concat());
        let scheme = match algorithm {
            KeyAlgorithm::Rsa2048 => SignatureScheme::RsaPkcs1Sha256,
            _ => SignatureScheme::EcdsaP256Sha256,
        };
        assert!(key.verifies(scheme, MESSAGE, &signed.stdout), "{algorithm}");
        swtpm.run(
            "openssl",
            &[&["req", "-new", "-key", "key.pem", "-subj", "/O=system:nodes/CN=system:node:a"], &providers[..]]
                .concat(),
        );
    }
}
