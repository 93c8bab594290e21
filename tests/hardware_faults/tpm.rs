//! What happens to TPMs.

use std::time::Duration;

use pintle_test_support::{Agent, Swtpm};

use crate::HOUR;
use crate::device::{DEADLINE, Node, events, tpm_plugin};
use crate::embedded::Embedded;

/// A node whose keys are in a TPM, and its control plane.
struct TpmNode {
    node: Node,
    swtpm: Swtpm,
    control_plane: Embedded,
}

impl TpmNode {
    fn new() -> Self {
        let node = Node::new("node");
        let swtpm = Swtpm::new(node.scratch.join("tpm"));
        let control_plane = Embedded::signing_for(HOUR);
        node.bootstrap_with(&control_plane.bootstrap_kubeconfig());
        let node = Self { node, swtpm, control_plane };
        node.configure("");
        node
    }

    fn configure(&self, more: &str) {
        self.node.configure("device", more, &[("device", &self.swtpm.table(&tpm_plugin()))]);
    }

    fn enrol(&self) -> (Agent, String) {
        let mut agent = self.node.start();
        let serial = self.node.ready_after(&mut agent, "");
        (agent, serial)
    }

    fn keys(&self) -> usize {
        let entries = std::fs::read_dir(self.node.scratch.join("state/tpm")).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".tss2.pem")).count()
    }

    #[track_caller]
    fn is_in_order(&self, agent: &mut Agent) {
        agent.process().assert_running();
        assert_eq!(self.keys(), 1);
        let handles = self.swtpm.run("tpm2_getcap", &["handles-transient"]);
        assert_eq!(String::from_utf8_lossy(&handles).trim(), "", "no slot stays taken");
    }
}

/// C25.
#[test]
fn c25_tpm_is_restarted_under_load() {
    let mut node = TpmNode::new();
    let (mut agent, first) = node.enrol();
    // One rotation after the other, and the TPM goes away at another point of one each time.
    for round in 0..12 {
        node.node.rotate();
        std::thread::sleep(Duration::from_millis(17 * round));
        node.swtpm.stop();
        if round % 4 == 3 {
            node.node.rotate();
            node.node.reason(&mut agent, &["unavailable"]);
        }
        node.swtpm.start();
    }
    let rotated = node.node.ready_after(&mut agent, &first);
    assert!(events(&agent, "keys_retired") > 0);
    node.node.rotate();
    node.node.ready_after(&mut agent, &rotated);
    node.is_in_order(&mut agent);
}

/// C26.
#[test]
fn c26_cleared_tpm_is_a_lost_key_and_enrols_again_only_when_that_is_allowed() {
    let node = TpmNode::new();
    let (mut agent, serial) = node.enrol();
    agent.terminate(DEADLINE);
    node.swtpm.run("tpm2_clear", &["-c", "lockout"]);

    // Nothing is done about it, and a person is told.
    let mut agent = node.node.start();
    agent.wait_for("the status says that the key is lost", DEADLINE, |_| {
        (node.node.status()?["state"] == "key-lost").then_some(())
    });
    let (healthy, text) = node.node.pintle(&["status"]);
    assert!(!healthy && text.contains("KeyLost") && text.contains("on-key-loss"), "{text}");
    agent.terminate(DEADLINE);

    node.configure("on-key-loss = \"enrol\"\n");
    let mut agent = node.node.start();
    node.node.ready_after(&mut agent, &serial);
    let log = agent.log();
    let submitted = log.iter().find(|line| line["event"] == "request_submitted").expect("a request");
    assert_eq!(submitted["authority"], "bootstrap", "the old key cannot vouch for it");
    node.is_in_order(&mut agent);
}

/// C32: the candidate is lost with the key in use while its request waits for approval.
#[test]
fn c32_tpm_cleared_while_a_request_is_pending_enrols_with_another_key() {
    let node = TpmNode::new();
    node.configure("on-key-loss = \"enrol\"\n");
    let (mut agent, serial) = node.enrol();
    node.control_plane.change_faults(|faults| faults.hold_approvals = true);
    node.node.rotate();
    let pending = agent.wait_for("a request is pending", DEADLINE, |_| {
        let status = node.node.status()?;
        (status["state"] == "waiting-for-approval").then(|| status["request"].as_str().map(str::to_owned))?
    });
    node.swtpm.run("tpm2_clear", &["-c", "lockout"]);
    node.control_plane.change_faults(|faults| faults.hold_approvals = false);
    node.node.ready_after(&mut agent, &serial);
    let log = agent.log();
    let submitted: Vec<_> = log.iter().filter(|line| line["event"] == "request_submitted").collect();
    let last = submitted.last().expect("a request");
    assert_ne!(last["request"], pending.as_str(), "the lost key's certificate is of no use");
    let generated: Vec<_> =
        log.iter().filter(|line| line["event"] == "key_generated").map(|line| &line["key"]).collect();
    assert_eq!(generated.len(), 3, "{generated:?}");
    assert_ne!(generated[1], generated[2], "the lost candidate's id is not used again");
    node.is_in_order(&mut agent);
}

#[test]
fn slots_that_another_user_has_taken_are_waited_for() {
    let node = TpmNode::new();
    let (mut agent, serial) = node.enrol();
    // Without a resource manager these stay in the TPM when the tool ends.
    for _ in 0..3 {
        node.swtpm.run("tpm2_createprimary", &["-Q", "-C", "o", "-G", "ecc", "-c", "other.ctx"]);
    }
    node.node.rotate();
    node.node.reason(&mut agent, &["slot", "0x902", "memory"]);
    node.swtpm.run("tpm2_flushcontext", &["-t"]);
    node.node.ready_after(&mut agent, &serial);
    node.is_in_order(&mut agent);
}
