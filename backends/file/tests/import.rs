//! Keys that others made are taken over in every encoding that they are found in.

use std::fs;
use std::process::Command;

use pintle_backend_file::FileBackend;
use pintle_plugins_api::{BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyImport};

fn openssl(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("openssl").args(arguments).output().expect("openssl, which the test command installs");
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn id(text: &str) -> KeyId {
    text.parse().expect("an id")
}

#[test]
fn c17_keys_made_by_openssl_are_imported_and_become_pkcs8() {
    let parent = tempfile::tempdir().expect("a directory");
    let mut backend = FileBackend::open(&parent.path().join("keys")).expect("the backend");
    let key_file = parent.path().join("openssl.pem");
    let key_file = key_file.to_str().expect("a path");
    let curve =
        |name| vec!["-algorithm".to_owned(), "EC".into(), "-pkeyopt".into(), format!("ec_paramgen_curve:{name}")];
    let rsa = |bits| vec!["-algorithm".to_owned(), "RSA".into(), "-pkeyopt".into(), format!("rsa_keygen_bits:{bits}")];
    for (algorithm, arguments) in [
        (KeyAlgorithm::EcdsaP256, curve("P-256")),
        (KeyAlgorithm::EcdsaP384, curve("P-384")),
        (KeyAlgorithm::Rsa2048, rsa(2048)),
        (KeyAlgorithm::Rsa3072, rsa(3072)),
        (KeyAlgorithm::Rsa4096, rsa(4096)),
        (KeyAlgorithm::Ed25519, vec!["-algorithm".to_owned(), "ED25519".into()]),
    ] {
        let mut genpkey = vec!["genpkey", "-out", key_file];
        genpkey.extend(arguments.iter().map(String::as_str));
        openssl(&genpkey);
        let public = openssl(&["pkey", "-in", key_file, "-pubout", "-outform", "DER"]);
        let mut encodings = vec![openssl(&["pkcs8", "-topk8", "-nocrypt", "-in", key_file, "-outform", "DER"])];
        if algorithm != KeyAlgorithm::Ed25519 {
            // SEC 1 or PKCS#1.
            encodings.push(openssl(&["pkey", "-in", key_file, "-traditional", "-outform", "DER"]));
            assert_ne!(encodings[0], encodings[1]);
        }
        for (number, encoding) in encodings.iter().enumerate() {
            let id = id(&format!("{algorithm}-{number}"));
            let imported = backend.import(&id, encoding).expect("imported");
            assert_eq!(imported.as_der(), public, "{algorithm}, encoding {number}");
            assert_eq!(imported.algorithm(), algorithm);
            assert_eq!(backend.import(&id, encoding), Ok(imported.clone()), "a repeat");
            assert_eq!(backend.generate(&id, algorithm), Ok(imported.clone()));
            let scheme = algorithm.schemes()[0];
            let signature = backend.sign(&id, scheme, b"message").expect("a signature");
            assert!(imported.verifies(scheme, b"message", &signature));
            let text = fs::read_to_string(parent.path().join("keys").join(format!("{id}.pem"))).expect("the file");
            assert!(text.starts_with("-----BEGIN PRIVATE KEY-----\n"), "{algorithm}, encoding {number}");
        }
    }
}

#[test]
fn what_is_no_key_or_another_key_is_not_imported() {
    let parent = tempfile::tempdir().expect("a directory");
    let mut backend = FileBackend::open(&parent.path().join("keys")).expect("the backend");
    let generate =
        || openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-outform", "DER"]);
    let (first, second) = (generate(), generate());
    backend.import(&id("key"), &first).expect("imported");
    assert_eq!(backend.import(&id("key"), &second).expect_err("another key").kind, BackendErrorKind::Conflict);
    for garbage in [&b""[..], b"garbage", &first[..first.len() - 1]] {
        assert_eq!(backend.import(&id("new"), garbage).expect_err("no key").kind, BackendErrorKind::Corrupt);
    }
    assert_eq!(backend.list(), Ok(vec![id("key")]));
}
