//! What happens to devices and their modules: the agent stays up, says what is wrong, leaves no key behind, and goes on
//! by itself when it is over.
//!
//! Certificates live for an hour here, and each rotation is asked for (`pintle rotate`) once: whatever is tried after the
//! fault has ended, the agent tries by itself.

#[path = "../device/mod.rs"]
mod device;
#[path = "../embedded/mod.rs"]
mod embedded;
mod migrations;
mod tpm;

use std::path::{Path, PathBuf};

use device::{DEADLINE, Node, certified_key, children};
use embedded::Embedded;
use pintle_test_support::{Agent, Token, TokenModule, eventually};

const HOUR: u64 = 3600;

/// A module that crashes and hangs when it is told to, in front of SoftHSM.
fn faulty_module() -> PathBuf {
    pintle_test_support::faulty_module(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

/// A node whose keys are in a SoftHSM token, and its control plane.
struct TokenNode {
    node: Node,
    token: Token,
    control_plane: Embedded,
}

impl TokenNode {
    fn new(between: Option<PathBuf>) -> Self {
        let mut node = Node::new("node");
        let token = Token::new(TokenModule::SoftHsm, node.scratch.join("token"));
        let token = match between {
            Some(between) => token.behind(between),
            None => token,
        };
        node.set_environment(token.environment());
        node.configure("device", "", &[("device", &token.table())]);
        let control_plane = Embedded::signing_for(HOUR);
        node.bootstrap_with(&control_plane.bootstrap_kubeconfig());
        Self { node, token, control_plane }
    }

    /// Enrols; the serial number of the first certificate.
    fn enrol(&self) -> (Agent, String) {
        let mut agent = self.node.start();
        let serial = self.node.ready_after(&mut agent, "");
        (agent, serial)
    }

    /// What must hold once everything is over: one key, which is the one in use.
    #[track_caller]
    fn is_in_order(&self, agent: &mut Agent) {
        agent.process().assert_running();
        let keys = self.token.keys();
        assert_eq!(keys.len(), 1, "orphans: {keys:?}");
        let public = self.token.tool(&["--read-object", "--type", "pubkey", "--id", &keys[0].id]);
        assert_eq!(public, certified_key(&self.node.pair()));
        let status = self.node.status().expect("a status");
        assert_eq!((status["state"].as_str(), status["reason"].as_str()), (Some("ready"), Some("")), "{status}");
        assert!(self.control_plane.certificate_signing_requests().len() < 10, "requests do not pile up");
    }
}

/// The process that holds the module.
#[track_caller]
fn module_process(agent: &mut Agent) -> u32 {
    let process = agent.process().id();
    eventually("a process holds the module", DEADLINE, || match children(process)[..] {
        [child] => Some(child),
        _ => None,
    })
}

/// Kills a process that the agent started.
fn kill(process: u32) {
    let process = rustix::process::Pid::from_raw(i32::try_from(process).expect("a process id")).expect("not 0");
    rustix::process::kill_process(process, rustix::process::Signal::KILL).expect("it runs");
}

#[test]
fn module_that_crashes_takes_only_its_own_process_along() {
    let node = TokenNode::new(Some(faulty_module()));
    let (mut agent, serial) = node.enrol();
    node.token.fault("sign-in-use segfault");
    node.node.rotate();
    node.node.reason(&mut agent, &["SIGSEGV"]);
    let (healthy, text) = node.node.pintle(&["status"]);
    assert!(healthy && text.contains("SIGSEGV"), "the certificate in use is good meanwhile: {text}");
    node.token.mend();
    node.node.ready_after(&mut agent, &serial);
    node.is_in_order(&mut agent);
}

#[test]
fn module_that_hangs_is_ended_at_its_deadline() {
    let node = TokenNode::new(Some(faulty_module()));
    let (mut agent, serial) = node.enrol();
    node.token.fault("sign-in-use hang");
    let before = module_process(&mut agent);
    node.node.rotate();
    node.node.reason(&mut agent, &["did not answer sign"]);
    assert!(!Path::new(&format!("/proc/{before}")).exists(), "the process that hangs is gone");
    node.token.mend();
    node.node.ready_after(&mut agent, &serial);
    node.is_in_order(&mut agent);
}

/// The key is made and nobody was told: the next try finds it under the id that was written down before.
#[test]
fn module_process_killed_in_the_middle_of_a_generate_leaves_no_key_behind() {
    let node = TokenNode::new(Some(faulty_module()));
    let (mut agent, serial) = node.enrol();
    for _ in 0..2 {
        node.token.fault("after-generate hang");
        let serial = node.node.status().expect("a status")["serial"].as_str().expect("a serial").to_owned();
        node.node.rotate();
        eventually("the key is made", DEADLINE, || (node.token.keys().len() == 2).then_some(()));
        kill(module_process(&mut agent));
        node.node.reason(&mut agent, &["SIGKILL"]);
        node.token.mend();
        node.node.ready_after(&mut agent, &serial);
        node.is_in_order(&mut agent);
    }
    assert_ne!(node.node.status().expect("a status")["serial"], serial.as_str());
}

/// C25.
#[test]
fn c25_token_is_taken_away_and_comes_back() {
    let node = TokenNode::new(None);
    let (mut agent, serial) = node.enrol();
    node.token.remove();
    node.node.rotate();
    let reason = node.node.reason(&mut agent, &["unavailable"]);
    assert!(reason.contains(Token::LABEL), "{reason}");
    node.token.put_back();
    node.node.ready_after(&mut agent, &serial);
    node.is_in_order(&mut agent);
}

fn spy() -> PathBuf {
    let directories = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"];
    let paths = directories.iter().map(|directory| Path::new(directory).join("pkcs11-spy.so"));
    paths.into_iter().find(|path| path.exists()).expect("pkcs11-spy.so, Debian package opensc, is installed")
}

/// C27.
#[test]
fn c27_wrong_pin_is_tried_once_whatever_is_started_again() {
    let node = TokenNode::new(Some(spy()));
    node.token.write_pin("99999999");
    let mut agent = node.node.start();
    node.node.reason(&mut agent, &["PIN"]);
    for round in 1..4 {
        let failures = node.node.status().expect("a status")["failures"].as_u64();
        // Also a new process for the module does not try it.
        for child in children(agent.process().id()) {
            kill(child);
        }
        // An operator who has not read the message.
        node.node.rotate();
        agent.wait_for("another attempt", DEADLINE, |_| {
            let now = node.node.status()?["failures"].as_u64();
            (now != failures || round > 1).then_some(())
        });
    }
    let reason = node.node.reason(&mut agent, &["PIN"]);
    assert!(!reason.contains("99999999") && !agent.output().contains("99999999"));
    assert_eq!(node.token.logins(), 1, "a refused PIN is not tried again: {reason}");
    node.token.write_pin(Token::PIN);
    node.node.ready_after(&mut agent, "");
    assert_eq!(node.token.logins(), 2);
    node.is_in_order(&mut agent);
}

/// C27. A login that stands goes on; the next one needs the new PIN.
#[test]
fn c27_pin_is_changed() {
    const NEW: &str = "16180339";
    let node = TokenNode::new(Some(spy()));
    let (mut agent, serial) = node.enrol();
    let _ = node.token.tool(&["--change-pin", "--new-pin", NEW]);
    node.node.rotate();
    let serial = node.node.ready_after(&mut agent, &serial);
    let logins = node.token.logins();
    kill(module_process(&mut agent));
    node.node.rotate();
    node.node.reason(&mut agent, &["PIN"]);
    assert_eq!(node.token.logins(), logins + 1);
    node.token.write_pin(NEW);
    node.node.ready_after(&mut agent, &serial);
    agent.process().assert_running();
    let listed = node.token.pkcs11_tool_with_pin(NEW, &["--list-objects", "--type", "privkey"]).expect("the new PIN");
    assert_eq!(String::from_utf8_lossy(&listed).matches("pintle ").count(), 1);
}

/// C33: the nodes of two clusters have equal names and share a token; and one of them is installed anew.
#[test]
fn c33_equal_node_names_on_one_token_do_not_touch_each_others_keys() {
    let node = TokenNode::new(None);
    let (mut agent, serial) = node.enrol();
    let key = certified_key(&node.node.pair());
    let other_cluster = Embedded::signing_for(HOUR);
    let mut other = Node::new("node");
    other.set_environment(node.token.environment());
    other.configure("device", "", &[("device", &node.token.table())]);
    other.bootstrap_with(&other_cluster.bootstrap_kubeconfig());
    let mut other_agent = other.start();
    let first = other.ready_after(&mut other_agent, "");
    assert_ne!(certified_key(&other.pair()), key, "it has a key of its own");
    other.rotate();
    other.ready_after(&mut other_agent, &first);
    assert_eq!(node.token.keys().len(), 2, "its own old key is gone, and nothing else");

    // Another state directory over the same pairs: the key in use is used, and never destroyed.
    other_agent.terminate(DEADLINE);
    let second = certified_key(&other.pair());
    std::fs::remove_dir_all(other.scratch.join("state")).expect("removed");
    let mut other_agent = other.start();
    let adopted = other.ready_after(&mut other_agent, "");
    assert_eq!(certified_key(&other.pair()), second);
    other.rotate();
    other.ready_after(&mut other_agent, &adopted);
    assert_eq!(node.token.keys().len(), 3, "what an earlier installation made is a person's to destroy");
    let (success, text) = other.pintle(&["keys", "list"]);
    assert!(success && text.matches("unknown").count() >= 2, "{text}");

    // The first one's key is still there, and it is the one in use.
    agent.terminate(DEADLINE);
    let mut agent = node.node.start();
    assert_eq!(node.node.ready_after(&mut agent, ""), serial);
    node.node.rotate();
    node.node.ready_after(&mut agent, &serial);
}
