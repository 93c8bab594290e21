//! What an agent makes of a disk that is not as it left it: pairs that are unreadable, links that lead nowhere, files that
//! somebody removed, and a device that answers later than the agent starts.

mod embedded;

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};

use embedded::{DEADLINE, Embedded};
use pintle_test_support::{Agent, AgentCommand, Node, Pair, Token, TokenModule, eventually};
use serde_json::Value;

const HOUR: u64 = 3600;
/// A user who owns nothing.
const NOBODY: u32 = 65534;
const PINTLE: &str = env!("CARGO_BIN_EXE_pintle");

/// A node whose pair is on disk, as a kubelet may have left it: without a journal, key files, and a kubeconfig.
fn node_with_a_pair(control_plane: &Embedded, name: &str) -> (Node, Pair) {
    let node = Node::new(PINTLE, name);
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let (code, output) = node.enrol(DEADLINE);
    assert_eq!(code, Some(0), "{output}");
    let pair = node.current().expect("a pair");
    fs::remove_dir_all(node.state_dir()).expect("removed");
    fs::remove_file(node.kubeconfig()).expect("removed");
    (node, pair)
}

/// Asserts that the node holds this pair, and asked for no other.
fn assert_kept(control_plane: &Embedded, node: &Node, pair: &Pair) {
    assert_eq!(node.current().as_ref(), Some(pair));
    assert_eq!(control_plane.requests_of(node.name()).len(), 1, "a certificate was asked for");
}

fn wait_for_state(node: &Node, agent: &mut Agent, state: &str) -> Value {
    agent.wait_for(state, DEADLINE, |_| {
        let status = node.status();
        (status["state"] == state).then_some(status)
    })
}

/// `pintle run --once` as root without the right to read what belongs to others.
fn run_without_capabilities(node: &Node) -> (Option<i32>, String) {
    let (status, output) = AgentCommand::named("/usr/bin/setpriv", node.scratch(), "unprivileged")
        .arguments(["--bounding-set=-all", "--inh-caps=-all", PINTLE, "run", "--once"])
        .arguments(node.flags())
        .run(DEADLINE);
    (status.code(), output)
}

#[test]
fn c38_a_pair_with_other_bytes_around_it_is_taken_over() {
    let control_plane = Embedded::signing_for(HOUR);
    let bag = b"Bag Attributes\n    friendlyName: Kubelet M\xfcller\n".as_slice();
    let torn = b"-----BEGIN CERTIFICATE-----\nMIIB".as_slice();
    for (name, before, after) in
        [("latin1", bag, b"".as_slice()), ("trailing", b"", b"\xff\xfe\0\x80"), ("torn-behind", b"", torn)]
    {
        let (node, pair) = node_with_a_pair(&control_plane, name);
        let file = fs::canonicalize(node.current_path()).expect("a pair");
        let content = fs::read(&file).expect("readable");
        fs::write(&file, [before, &content, after].concat()).expect("written");

        let inspected = node.run(&["inspect"]);
        assert!(inspected.code == Some(0) && inspected.output.contains(&pair.serial), "{name}: {inspected:?}");
        let due = node.run(&["needs-renewal"]);
        assert_eq!(due.code, Some(1), "{name}: {due:?}");
        let credential = node.run(&["credential"]);
        assert_eq!(credential.code, Some(0), "{name}: {}", credential.error);
        let credential: Value = serde_json::from_str(&credential.output).expect("JSON");
        let half = |field: &str| pem::parse(credential["status"][field].as_str().expect("text")).expect("PEM");
        let blocks = pem::parse_many(&content).expect("PEM");
        assert_eq!(half("clientCertificateData"), blocks[0], "{name}");
        assert_eq!(half("clientKeyData"), blocks[1], "{name}");

        let (code, output) = node.enrol(DEADLINE);
        assert_eq!(code, Some(0), "{name}: {output}");
        assert!(output.contains("credential_adopted"), "{name}: {output}");
        assert_eq!(control_plane.requests_of(name).len(), 1, "{name}: {output}");
        assert_eq!(fs::canonicalize(node.current_path()).expect("there"), file, "{name}");
    }
}

#[test]
fn c38_a_pair_that_may_not_be_read_is_neither_replaced_nor_taken_for_none() {
    if !rustix::process::getuid().is_root() {
        return; // Only root can give a file away.
    }
    let control_plane = Embedded::signing_for(HOUR);
    let (node, pair) = node_with_a_pair(&control_plane, "unreadable");
    let file = fs::canonicalize(node.current_path()).expect("a pair");
    chown(&file, Some(NOBODY), None).expect("as root");
    for link in ["there", "removed"] {
        if link == "removed" {
            fs::remove_file(node.current_path()).expect("removed");
        }
        let (code, output) = run_without_capabilities(&node);
        assert_eq!(code, Some(1), "{link}: {output}");
        for said in ["Permission denied", "user 65534", "chown 0 ", &file.display().to_string()] {
            assert!(output.contains(said), "{link}: {said} in {output}");
        }
        assert_eq!(control_plane.requests_of("unreadable").len(), 1, "{link}: {output}");
        assert_eq!(node.current_path().is_symlink(), link == "there", "{output}");
    }
    // As the hint says.
    chown(&file, Some(0), None).expect("as root");
    let (code, output) = run_without_capabilities(&node);
    assert_eq!(code, Some(0), "{output}");
    assert_kept(&control_plane, &node, &pair);
}

#[test]
fn c39_a_link_that_leads_to_no_pair_is_replaced_by_one_to_the_newest_that_is_good() {
    let control_plane = Embedded::signing_for(HOUR);
    for (name, target) in [
        ("dangling", "kubelet-client-2026-11-20-00-00-00.pem"),
        ("loop", "kubelet-client-current.pem"),
        ("to-directory", "."),
        // Which says EIO at its beginning.
        ("io-error", "/proc/self/mem"),
    ] {
        let (node, pair) = node_with_a_pair(&control_plane, name);
        fs::remove_file(node.current_path()).expect("removed");
        symlink(target, node.current_path()).expect("linked");
        let (code, output) = node.enrol(DEADLINE);
        assert_eq!(code, Some(0), "{name}: {output}");
        assert_kept(&control_plane, &node, &pair);
        let told = output.lines().position(|line| line.contains("disk_unusable"));
        let success = output.lines().position(|line| line.contains("\"holding\""));
        assert!(told.is_some() && told < success, "{name}: {output}");
    }
}

#[test]
fn c39_what_is_in_the_way_of_the_link_is_said_and_left_alone() {
    let control_plane = Embedded::signing_for(HOUR);
    for name in ["directory", "pipe"] {
        let (node, pair) = node_with_a_pair(&control_plane, name);
        let current = node.current_path();
        fs::remove_file(&current).expect("removed");
        match name {
            "directory" => fs::create_dir(&current).expect("made"),
            _ => rustix::fs::mkfifoat(rustix::fs::CWD, &current, 0o600.into()).expect("made"),
        }
        let (status, output) = node.agent().arguments(["--once", "--timeout=2s"]).run(DEADLINE);
        assert_eq!(status.code(), Some(1), "{name}: {output}");
        assert!(output.contains(&current.display().to_string()) && output.contains("move it away"), "{output}");
        assert!(!output.contains("\"holding\""), "{name}: {output}");

        let mut agent = node.agent().start();
        let status = wait_for_state(&node, &mut agent, "failing");
        assert!(status["hint"].as_str().is_some_and(|hint| hint.contains("move it away")), "{status}");
        assert!(fs::symlink_metadata(&current).is_ok_and(|found| !found.is_symlink()), "{name}");
        fs::rename(&current, node.scratch().join("moved-away")).expect("moved away");
        wait_for_state(&node, &mut agent, "ready");
        assert_kept(&control_plane, &node, &pair);
        agent.kill();
    }
}

#[test]
fn c39_a_missing_kubeconfig_is_written_beside_a_pair_that_is_taken_over_and_again_when_it_is_removed() {
    let control_plane = Embedded::signing_for(HOUR);
    let (node, pair) = node_with_a_pair(&control_plane, "kubeconfig");
    let (code, output) = node.enrol(DEADLINE);
    assert_eq!(code, Some(0), "{output}");
    let written = fs::read_to_string(node.kubeconfig()).expect("it was written");
    assert!(written.contains(&node.current_path().display().to_string()), "{written}");
    let mut agent = node.agent().start();
    wait_for_state(&node, &mut agent, "ready");
    for attempt in 0..2 {
        fs::remove_file(node.kubeconfig()).expect("removed");
        eventually("it is back", DEADLINE, || node.kubeconfig().exists().then_some(()));
        assert_eq!(fs::read_to_string(node.kubeconfig()).expect("readable"), written, "{attempt}");
    }
    agent.kill();
    assert_kept(&control_plane, &node, &pair);
}

#[test]
fn c52_a_key_file_that_is_deleted_while_the_pair_holds_the_key_is_used_again() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = Node::new(PINTLE, "c52");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let mut agent = node.agent().start();
    wait_for_state(&node, &mut agent, "ready");
    fs::remove_file(node.bootstrap_kubeconfig()).expect("removed");
    let keys = node.keys();
    // Noticed by looking, and by asking for something that needs the key.
    fs::remove_file(&keys[0]).expect("removed");
    agent.wait_for("the key is back", DEADLINE, |_| (node.keys() == keys).then_some(()));
    fs::remove_file(&keys[0]).expect("removed");
    let answer = node.run(&["rotate", "--wait"]);
    assert_eq!(answer.code, Some(0), "{answer:?}\n{}", agent.output());
    assert_eq!(control_plane.requests_of("c52").len(), 2);
    assert!(!agent.output().contains("key_lost"), "{}", agent.output());
    agent.kill();
}

/// A node whose key is in a token, and the token.
fn node_with_a_token(control_plane: &Embedded, name: &str) -> (Node, Token) {
    let node = Node::new(PINTLE, name);
    let token = Token::new(TokenModule::SoftHsm, node.scratch().join("token"));
    let _ = node.scratch().write("config.toml", format!("backend = \"token\"\n[backends.token]\n{}", token.table()));
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    (node, token)
}

fn with_token(command: AgentCommand, token: &Token) -> AgentCommand {
    let environment = token.environment().into_iter();
    environment.fold(command, |command, (name, value)| command.environment(name, value))
}

/// The journal is lost, and the token comes later than the agent: only the token says whether the key is there.
#[test]
fn c10_a_pair_whose_key_may_be_in_a_token_that_is_late_waits_for_it() {
    let control_plane = Embedded::signing_for(HOUR);
    let (node, token) = node_with_a_token(&control_plane, "late");
    let (status, output) = with_token(node.agent().argument("--once"), &token).run(DEADLINE);
    assert!(status.success(), "{output}");
    let leaf = |path: &Path| pem::parse_many(fs::read(path).expect("readable")).expect("PEM").swap_remove(0);
    let (before, file): (_, PathBuf) =
        (leaf(&node.current_path()), fs::canonicalize(node.current_path()).expect("a pair"));
    fs::remove_file(node.journal()).expect("removed");
    token.remove();
    let mut agent = with_token(node.agent(), &token).start();
    let status = wait_for_state(&node, &mut agent, "failing");
    let reason = status["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("token") && reason.contains("kubelet-client-"), "{status}");
    assert_ne!(status["hint"], "");
    // It is asked again and again, and nothing else is done.
    assert_eq!(fs::canonicalize(node.current_path()).expect("a pair"), file);
    assert_eq!(control_plane.requests_of("late").len(), 1, "{}", agent.output());
    agent.kill();
    let mut agent = with_token(node.agent(), &token).start();
    wait_for_state(&node, &mut agent, "failing");
    token.put_back();
    wait_for_state(&node, &mut agent, "ready");
    assert_eq!(leaf(&node.current_path()), before);
    assert_eq!(control_plane.requests_of("late").len(), 1, "{}", agent.output());
    assert!(agent.terminate(DEADLINE).success());
}
