//! What a key is in the token, as other programs see it.

mod support;

use std::process::Command;

use cryptoki::context::Pkcs11;
use cryptoki::object::{Attribute, AttributeType, ObjectClass};
use pintle_backend_pkcs11::{Configuration, Pkcs11Backend};
use pintle_plugins_api::{BackendErrorKind, KeyAlgorithm, KeyBackend, KeyReference, SignatureScheme};
use support::{Kind, LABEL, TestToken, id, refused};

fn hexadecimal(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn delete_half(token: &TestToken, kind: &str, text: &str) {
    token.pkcs11_tool_logged_in(&["--delete-object", "--type", kind, "--id", &hexadecimal(text)]);
}

fn generated_anew(token: &TestToken, backend: &mut Pkcs11Backend, text: &str) {
    let after = backend.generate(&id(text), KeyAlgorithm::EcdsaP256).expect("a key");
    let signature = backend.sign(&id(text), SignatureScheme::EcdsaP256Sha256, b"message").expect("a signature");
    assert!(after.verifies(SignatureScheme::EcdsaP256Sha256, b"message", &signature));
    let output = token.pkcs11_tool_logged_in(&["--list-objects", "--type", "privkey", "--id", &hexadecimal(text)]);
    assert_eq!(String::from_utf8_lossy(&output.stdout).matches("Key Object").count(), 1);
    assert_eq!(backend.generate(&id(text), KeyAlgorithm::EcdsaP256), Ok(after));
    backend.delete(&id(text)).expect("deleted");
    assert_eq!(backend.list(), Ok(vec![]));
}

fn public_half_alone(token: &TestToken) {
    let mut backend = token.open();
    backend.generate(&id("half"), KeyAlgorithm::EcdsaP256).expect("a key");
    delete_half(token, "privkey", "half");
    let mut backend = token.open();
    assert_eq!(backend.list(), Ok(vec![id("half")]), "what is left is listed, so that it is pruned");
    refused(backend.public_key(&id("half")), BackendErrorKind::NotFound);
    generated_anew(token, &mut backend, "half");
}

#[test]
fn softhsm_public_half_alone_is_no_key() {
    support::run(Kind::SoftHsm, "softhsm_public_half_alone_is_no_key", public_half_alone);
}

#[test]
fn kryoptic_public_half_alone_is_no_key() {
    support::run(Kind::Kryoptic, "kryoptic_public_half_alone_is_no_key", public_half_alone);
}

/// Whether the module's private objects tell the public key of a curve, as PKCS #11 does not demand.
fn private_half_alone(token: &TestToken, tells_points: bool) {
    let scheme = SignatureScheme::EcdsaP256Sha256;
    let mut backend = token.open();
    let curve = backend.generate(&id("curve"), KeyAlgorithm::EcdsaP256).expect("a key");
    let rsa = backend.generate(&id("rsa"), KeyAlgorithm::Rsa2048).expect("a key");
    delete_half(token, "pubkey", "curve");
    delete_half(token, "pubkey", "rsa");
    let mut backend = token.open();
    let signature = backend.sign(&id("curve"), scheme, b"message").expect("a signature");
    assert!(curve.verifies(scheme, b"message", &signature));
    backend.reference(&id("curve")).expect("a reference");
    assert_eq!(backend.public_key(&id("rsa")), Ok(rsa));
    backend.delete(&id("rsa")).expect("deleted");
    if tells_points {
        assert_eq!(backend.public_key(&id("curve")), Ok(curve));
        return generated_anew(token, &mut backend, "curve");
    }
    let error = refused(backend.public_key(&id("curve")), BackendErrorKind::Corrupt);
    assert!(error.detail.contains("private half of key curve"), "{error}");
    // What the hint says.
    assert!(error.hint.is_some_and(|hint| hint.contains("--id 6375727665 --label 'pintle curve'")));
    let file = token.directory.join("public.der");
    std::fs::write(&file, curve.as_der()).expect("written");
    let file = file.to_str().expect("UTF-8");
    let write = ["--write-object", file, "--type", "pubkey", "--id", "6375727665", "--label", "pintle curve"];
    token.pkcs11_tool_logged_in(&write);
    assert_eq!(backend.public_key(&id("curve")), Ok(curve));
    // And if it is one that no generation ever answered.
    delete_half(token, "pubkey", "curve");
    generated_anew(token, &mut backend, "curve");
}

#[test]
fn softhsm_private_half_alone_is_not_lost() {
    support::run(Kind::SoftHsm, "softhsm_private_half_alone_is_not_lost", |token| private_half_alone(token, false));
}

#[test]
fn kryoptic_private_half_alone_is_not_lost() {
    support::run(Kind::Kryoptic, "kryoptic_private_half_alone_is_not_lost", |token| private_half_alone(token, true));
}

fn never_leaves(token: &TestToken) {
    let mut backend = token.open();
    let algorithms = [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Rsa2048];
    for algorithm in algorithms {
        backend.generate(&id(algorithm.name()), algorithm).expect("a key");
    }
    // In the same process, so logged in.
    let pkcs11 = Pkcs11::new(&token.module).expect("the module");
    let slots = pkcs11.get_slots_with_token().expect("slots");
    let slot = slots.into_iter().find(|slot| pkcs11.get_token_info(*slot).is_ok_and(|info| info.label() == LABEL));
    let session = pkcs11.open_ro_session(slot.expect("the slot")).expect("a session");
    let private = session.find_objects(&[Attribute::Class(ObjectClass::PRIVATE_KEY)]).expect("objects");
    assert_eq!(private.len(), algorithms.len());
    for object in private {
        let asked = [
            AttributeType::Sensitive,
            AttributeType::Extractable,
            AttributeType::Decrypt,
            AttributeType::Unwrap,
            AttributeType::Derive,
            AttributeType::Value,
            AttributeType::PrivateExponent,
            AttributeType::Prime1,
        ];
        let expected = [
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Decrypt(false),
            Attribute::Unwrap(false),
            Attribute::Derive(false),
        ];
        assert_eq!(session.get_attributes(object, &asked).expect("attributes"), expected);
    }
}

#[test]
fn c18_softhsm_keys_never_leave_and_only_sign() {
    support::run(Kind::SoftHsm, "c18_softhsm_keys_never_leave_and_only_sign", never_leaves);
}

#[test]
fn c18_kryoptic_keys_never_leave_and_only_sign() {
    support::run(Kind::Kryoptic, "c18_kryoptic_keys_never_leave_and_only_sign", never_leaves);
}

/// What SoftHSM leaves when a process is killed before the private object has its value is not local either, and has
/// no value; an imported key is as near to that as another program can come.
fn unfinished(token: &TestToken) {
    let path = |name: &str| token.directory.join(name).to_str().expect("UTF-8").to_owned();
    let openssl = |arguments: &[&str]| {
        assert!(Command::new("openssl").args(arguments).output().expect("openssl").status.success(), "{arguments:?}");
    };
    let (key, public) = (path("key.der"), path("public.der"));
    openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-outform", "DER", "-out", &key]);
    openssl(&["ec", "-inform", "DER", "-in", &key, "-pubout", "-outform", "DER", "-out", &public]);
    let bytes = hexadecimal("unfinished");
    for (kind, file) in [("privkey", &key), ("pubkey", &public)] {
        token.pkcs11_tool_logged_in(&[
            "--write-object",
            file,
            "--type",
            kind,
            "--id",
            &bytes,
            "--label",
            "pintle unfinished",
            "--usage-sign",
        ]);
    }
    let mut backend = token.open();
    let before = backend.public_key(&id("unfinished")).expect("it looks whole");
    let after = backend.generate(&id("unfinished"), KeyAlgorithm::EcdsaP256).expect("a key");
    assert_ne!(before, after);
    assert_eq!(backend.generate(&id("unfinished"), KeyAlgorithm::EcdsaP256), Ok(after));
}

#[test]
fn softhsm_key_that_was_not_generated_in_the_token_is_made_anew() {
    support::run(Kind::SoftHsm, "softhsm_key_that_was_not_generated_in_the_token_is_made_anew", unfinished);
}

#[test]
fn kryoptic_key_that_was_not_generated_in_the_token_is_made_anew() {
    support::run(Kind::Kryoptic, "kryoptic_key_that_was_not_generated_in_the_token_is_made_anew", unfinished);
}

fn not_ours(token: &TestToken) {
    let generate = ["--keypairgen", "--key-type", "EC:prime256v1", "--usage-sign"];
    let make = |text: &str, label: &str, more: &[&str]| {
        let bytes = hexadecimal(text);
        token.pkcs11_tool_logged_in(&[&generate[..], &["--id", &bytes, "--label", label], more].concat());
    };
    // Somebody else's key with an id that we would choose.
    make("theirs", "web server", &[]);
    // A key with our label that could have left the token.
    make("planted", "pintle planted", &["--extractable"]);
    // Two agents that share an id.
    make("twice", "pintle twice", &[]);
    make("twice", "pintle twice", &[]);

    let mut backend = token.open();
    refused(backend.generate(&id("theirs"), KeyAlgorithm::EcdsaP256), BackendErrorKind::Conflict);
    refused(backend.public_key(&id("theirs")), BackendErrorKind::NotFound);
    refused(backend.generate(&id("planted"), KeyAlgorithm::EcdsaP256), BackendErrorKind::Unsupported);
    refused(backend.generate(&id("twice"), KeyAlgorithm::EcdsaP256), BackendErrorKind::Corrupt);
    refused(backend.public_key(&id("twice")), BackendErrorKind::Corrupt);
    let mut listed = backend.list().expect("a list");
    listed.sort();
    assert_eq!(listed, [id("planted"), id("twice")]);
    // Deleting an id of ours that is somebody else's key touches nothing.
    backend.delete(&id("theirs")).expect("nothing to do");
    let output = token.pkcs11_tool_logged_in(&["--list-objects", "--type", "privkey"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout).matches("Private Key Object").count(), 4);
}

#[test]
fn softhsm_keys_that_are_not_ours_are_not_used() {
    support::run(Kind::SoftHsm, "softhsm_keys_that_are_not_ours_are_not_used", not_ours);
}

#[test]
fn kryoptic_keys_that_are_not_ours_are_not_used() {
    support::run(Kind::Kryoptic, "kryoptic_keys_that_are_not_ours_are_not_used", not_ours);
}

fn other_programs(token: &TestToken) {
    let mut backend = token.open();
    let key = id("node-1/client/3");
    let public_key = backend.generate(&key, KeyAlgorithm::EcdsaP256).expect("a key");
    let KeyReference::Uri(uri) = backend.reference(&key).expect("a reference") else { panic!("no URI") };
    assert_eq!(uri, format!("pkcs11:token=pintle%20test;id={};type=private", percent_encoded("node-1/client/3")));

    let path = |name: &str| token.directory.join(name).to_str().expect("UTF-8").to_owned();
    std::fs::write(path("message"), b"message").expect("written");
    let digest = Command::new("openssl")
        .args(["dgst", "-sha256", "-binary", "-out", &path("digest"), &path("message")])
        .status();
    assert!(digest.expect("openssl").success());
    let bytes = hexadecimal("node-1/client/3");
    token.pkcs11_tool_logged_in(&[
        "--sign",
        "--mechanism",
        "ECDSA",
        "--signature-format",
        "openssl",
        "--id",
        &bytes,
        "--input-file",
        &path("digest"),
        "--output-file",
        &path("signature"),
    ]);
    let signature = std::fs::read(path("signature")).expect("a signature");
    assert!(public_key.verifies(SignatureScheme::EcdsaP256Sha256, b"message", &signature));
}

fn percent_encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[test]
fn softhsm_keys_are_used_by_other_programs() {
    support::run(Kind::SoftHsm, "softhsm_keys_are_used_by_other_programs", other_programs);
}

#[test]
fn kryoptic_keys_are_used_by_other_programs() {
    support::run(Kind::Kryoptic, "kryoptic_keys_are_used_by_other_programs", other_programs);
}

#[test]
fn a_module_that_is_not_there_yet_is_unavailable() {
    let uri = "pkcs11:token=keys?module-path=/nonexistent/module.so";
    let mut backend = Pkcs11Backend::open(Configuration::new(uri)).expect("a backend");
    let error = refused(backend.list(), BackendErrorKind::Unavailable);
    assert!(error.detail.contains("/nonexistent/module.so") && error.hint.is_some(), "{error}");
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused_at_once() {
    for (uri, module, pin_file) in [
        ("pkcs11:token=keys", None, None),
        ("pkcs11:token=keys?module-path=/a.so", Some("/b.so"), None),
        ("pkcs11:token=keys?pin-source=/a", Some("/b.so"), Some("/c")),
        ("pkcs11:token=keys", Some("relative.so"), None),
        ("pkcs11:token=keys", Some("/b.so"), Some("../pin")),
        ("pkcs11:token=keys?pin-value=1234", Some("/b.so"), None),
    ] {
        let configuration = Configuration {
            module: module.map(Into::into),
            pin_file: pin_file.map(Into::into),
            ..Configuration::new(uri)
        };
        refused(Pkcs11Backend::open(configuration).map(|_| ()), BackendErrorKind::Unsupported);
    }
}

fn usage_of(token: &TestToken) {
    let mut backend = token.open();
    let usage = |backend: &mut Pkcs11Backend| -> Vec<_> {
        backend.usage().expect("the token tells").into_iter().map(|resource| resource.to_string()).collect()
    };
    assert_eq!(usage(&mut backend), ["objects 0", "sessions 1"]);
    for number in 1..=2 {
        backend.generate(&id(&format!("usage/{number}")), KeyAlgorithm::EcdsaP256).expect("a key");
    }
    // Another program's, of the same id.
    let bytes = hexadecimal("usage/2");
    token.pkcs11_tool_logged_in(&["--keypairgen", "--key-type", "EC:prime256v1", "--id", &bytes, "--label", "theirs"]);
    assert_eq!(usage(&mut token.open())[0], "objects 4");
    backend.delete(&id("usage/1")).expect("deleted");
    assert_eq!(usage(&mut backend)[0], "objects 2");
}

#[test]
fn softhsm_usage_counts_this_agents_objects() {
    support::run(Kind::SoftHsm, "softhsm_usage_counts_this_agents_objects", usage_of);
}

#[test]
fn kryoptic_usage_counts_this_agents_objects() {
    support::run(Kind::Kryoptic, "kryoptic_usage_counts_this_agents_objects", usage_of);
}
