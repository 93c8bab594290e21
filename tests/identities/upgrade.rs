//! The state directory of a release that knew a single identity is taken over as it is.

use std::collections::BTreeMap;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use pintle_test_support::eventually;

use super::Machine;
use super::embedded::{DEADLINE, Embedded};

/// Written by 0.1.0: a node "demo-node" that holds a certificate for ten years, in the middle of nothing.
const JOURNAL: &str = include_str!("release-0.1/client.json");
const KEY: &str = include_str!("release-0.1/demo-node_client_1.pem");
const PAIR: &str = include_str!("release-0.1/pair.pem");
const SERIAL: &str = "517AEB3597CDF4E3B16834CC4AA8C974";

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("the scratch directory is writable");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("it is ours");
}

/// What the release has left, moved by `pintle migrate` to a backend of the configuration.
fn left_behind(machine: &Machine, control_plane: &Embedded) {
    let at = |name: &str| machine.scratch.join(name);
    for directory in ["state", "state/keys", "pki"] {
        std::fs::DirBuilder::new().mode(0o700).create(at(directory)).expect("made");
    }
    write(&at("state/client.json"), JOURNAL);
    write(&at("state/keys/demo-node_client_1.pem"), KEY);
    write(&at("pki/kubelet-client-2026-11-28-00-35-22.pem"), PAIR);
    symlink("kubelet-client-2026-11-28-00-35-22.pem", at("pki/kubelet-client-current.pem")).expect("linked");
    let _ = machine.scratch.write("bootstrap", control_plane.bootstrap_kubeconfig());
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).expect("there").flatten();
    let name = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    entries.map(|entry| (name(&entry), std::fs::read(entry.path()).unwrap_or_default())).collect()
}

const PATHS: &str = "kubeconfig = \"$DIR/kubeconfig\"\nbootstrap-kubeconfig = \"$DIR/bootstrap\"\n";

#[test]
fn a_single_identity_keeps_its_journal_its_key_and_its_pair() {
    let control_plane = Embedded::signing_for(3600);
    let machine = Machine::new();
    left_behind(&machine, &control_plane);
    machine.configure("demo-node", &format!("{PATHS}cert-dir = \"$DIR/pki\"\n"));
    let (keys, pairs) = (files(&machine.scratch.join("state/keys")), files(&machine.scratch.join("pki")));

    let status = machine.status("client");
    assert_eq!((&status["serial"], &status["key"]["id"]), (&SERIAL.into(), &"demo-node_client_1".into()), "{status}");
    let (status, output) = machine.agent().argument("--once").run(DEADLINE);
    assert!(status.success(), "{output}");
    assert!(control_plane.requests_of("demo-node").is_empty(), "nothing is asked for");
    assert_eq!(machine.status("client")["serial"], SERIAL);
    assert_eq!(files(&machine.scratch.join("state/keys")), keys);
    assert_eq!(files(&machine.scratch.join("pki")), pairs);
}

#[test]
fn a_migration_of_before_still_holds_and_its_rotation_is_numbered_on() {
    let control_plane = Embedded::signing_for(3600);
    let machine = Machine::new();
    left_behind(&machine, &control_plane);
    std::fs::DirBuilder::new().mode(0o700).create(machine.scratch.join("other")).expect("made");
    write(&machine.scratch.join("state/migration.json"), "{\"configured\": \"file\", \"backend\": \"other\"}");
    let table = "[backends.other]\ntype = \"file\"\ndirectory = \"$DIR/other\"\n";
    // The same with a table of that name beside another identity.
    let identities = "[[identity]]\nname = \"client\"\ncert-dir = \"$DIR/pki\"\n[[identity]]\nname = \"probe\"\n\
                      cert-dir = \"$DIR/probe\"\n";
    machine.configure("demo-node", &format!("{PATHS}{table}{identities}"));
    let mut agent = machine.agent().start();
    let key = agent.wait_for("the identity has moved", DEADLINE, |_| {
        let status = machine.status("client");
        (status["state"] == "ready" && status["serial"] != SERIAL).then(|| status["key"].clone())
    });
    assert_eq!(key["backend"], "other");
    assert!(key["id"].as_str().is_some_and(|id| id.starts_with("demo-node_client_") && id.ends_with("_2")), "{key}");
    eventually("the old key is gone", DEADLINE, || {
        files(&machine.scratch.join("state/keys")).keys().all(|name| name.contains("_probe_")).then_some(())
    });
    assert!(agent.terminate(DEADLINE).success());
}
