//! Keys that move from one backend to another.

use pintle_test_support::Swtpm;

use crate::TokenNode;
use crate::device::{DEADLINE, tpm_plugin};

/// From the file to the token, to the TPM and back, by changing the configuration: the old key goes last.
#[test]
fn migration_by_configuration_there_and_back() {
    let node = TokenNode::new(None);
    let swtpm = Swtpm::new(node.node.scratch.join("tpm"));
    let tables = [("token", node.token.table()), ("tpm", swtpm.table(&tpm_plugin()))];
    let tables: Vec<(&str, &str)> = tables.iter().map(|(name, table)| (*name, table.as_str())).collect();
    let mut serial = String::new();
    let mut before: Option<&str> = None;
    for backend in ["file", "token", "tpm", "file"] {
        node.node.configure(backend, "", &tables);
        let mut agent = node.node.start();
        serial = node.node.ready_after(&mut agent, &serial);
        assert_eq!(node.node.status().expect("a status")["key"]["backend"], backend);
        assert_eq!(counts(&node, backend), [1, 0, 0], "{backend}");
        if before.is_some() {
            let names: Vec<_> =
                agent.log().iter().filter_map(|line| Some(line["event"].as_str()?.to_owned())).collect();
            let position = |name: &str| names.iter().position(|event| event == name).expect(name);
            assert!(position("identity_proven") < position("pair_published"));
            assert!(position("pair_published") < position("keys_retired"));
        }
        before = Some(backend);
        agent.terminate(DEADLINE);
    }
}

/// The same by command, while the agent runs.
#[test]
fn migration_by_command_there_and_back() {
    let node = TokenNode::new(None);
    let swtpm = Swtpm::new(node.node.scratch.join("tpm"));
    node.node.configure("file", "", &[("token", &node.token.table()), ("tpm", &swtpm.table(&tpm_plugin()))]);
    let (mut agent, mut serial) = node.enrol();
    for backend in ["token", "tpm", "file"] {
        let (success, text) = node.node.pintle(&["migrate", "client", "--to", backend, "--dry-run"]);
        assert!(success && text.contains(backend), "{text}");
        assert_eq!(node.node.status().expect("a status")["serial"], serial.as_str(), "a dry run changes nothing");
        let (success, text) = node.node.pintle(&["migrate", "client", "--to", backend]);
        assert!(success, "{text}");
        serial = node.node.ready_after(&mut agent, &serial);
        assert_eq!(node.node.status().expect("a status")["key"]["backend"], backend);
        assert_eq!(counts(&node, backend), [1, 0, 0], "{backend}");
    }
    let names: Vec<_> = agent.log().iter().filter_map(|line| Some(line["event"].as_str()?.to_owned())).collect();
    let order: Vec<_> = names
        .iter()
        .map(String::as_str)
        .filter(|name| ["pair_published", "identity_proven", "keys_retired"].contains(name))
        .collect();
    assert_eq!(order[2..5], ["identity_proven", "pair_published", "keys_retired"], "the old key goes last");
}

/// How many keys there are: in this backend, and in each of the other two.
fn counts(node: &TokenNode, backend: &str) -> [usize; 3] {
    let files = |directory: &str, suffix: &str| {
        let entries = std::fs::read_dir(node.node.scratch.join(directory)).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(suffix)).count()
    };
    let mut counts = [
        ("file", files("state/keys", ".pem")),
        ("token", node.token.keys().len()),
        ("tpm", files("state/tpm", ".tss2.pem")),
    ];
    counts.sort_by_key(|(name, _)| *name != backend);
    counts.map(|(_, count)| count)
}
