//! `pintle run --once` ends with 0 only when a device may be unplugged.

use std::os::unix::fs::DirBuilderExt as _;
use std::time::Duration;

use pintle_test_support::AgentCommand;

use super::Machine;
use super::embedded::{DEADLINE, Embedded};

const HOUR: u64 = 3600;

/// A node with one identity, whose backend is one of two directories of key files.
fn configure(machine: &Machine, backend: &str) {
    machine.configure(
        "once",
        &format!(
            "kubeconfig = \"$DIR/kubeconfig\"\nbootstrap-kubeconfig = \"$DIR/bootstrap\"\ncert-dir = \"$DIR/pki\"\n\
             backend = \"{backend}\"\n[backends.other]\ntype = \"file\"\ndirectory = \"$DIR/other\"\n"
        ),
    );
}

fn enrolled(control_plane: &Embedded) -> Machine {
    let machine = Machine::new();
    let _ = machine.scratch.write("bootstrap", control_plane.bootstrap_kubeconfig());
    std::fs::DirBuilder::new().mode(0o700).create(machine.scratch.join("other")).expect("made");
    configure(&machine, "file");
    let (status, output) = machine.agent().argument("--once").run(DEADLINE);
    assert!(status.success(), "{output}");
    configure(&machine, "other");
    machine
}

fn once(machine: &Machine) -> AgentCommand {
    machine.agent().argument("--once")
}

/// What `docs/hardware.md` tells an operator to wait for before he unplugs the old device.
fn assert_moved(machine: &Machine) {
    let status = machine.status("client");
    assert_eq!(status["key"]["backend"], "other", "{status}");
    let left = std::fs::read_dir(machine.scratch.join("state/keys")).expect("the old backend").count();
    assert_eq!(left, 0, "the old key is destroyed");
}

#[test]
fn a3_it_waits_for_an_approval_and_for_the_old_key_to_go() {
    let control_plane = Embedded::signing_for(HOUR);
    let machine = enrolled(&control_plane);
    control_plane.change_faults(|faults| faults.hold_approvals = true);
    let mut agent = once(&machine).start();
    agent.wait_for_log("it is pending", DEADLINE, |line| line["event"] == "request_pending");
    control_plane.change_faults(|faults| faults.hold_approvals = false);
    let status = agent.process().wait(DEADLINE);
    assert!(status.success(), "{}", agent.output());
    assert_moved(&machine);
}

#[test]
fn a3_it_goes_on_after_a_denial() {
    let control_plane = Embedded::signing_for(HOUR);
    let machine = enrolled(&control_plane);
    control_plane.change_faults(|faults| faults.deny_next = true);
    let (status, output) = once(&machine).run(DEADLINE);
    assert!(status.success() && output.contains("denied"), "{output}");
    assert_moved(&machine);
}

#[test]
fn a3_a_timeout_and_a_signal_say_what_is_missing() {
    let control_plane = Embedded::signing_for(HOUR);
    let machine = enrolled(&control_plane);
    control_plane.change_faults(|faults| faults.hold_approvals = true);
    let (status, output) = once(&machine).argument("--timeout=3s").run(DEADLINE);
    assert_eq!(status.code(), Some(1), "{output}");
    for words in ["client: WaitingForApproval", "hint: kubectl certificate approve "] {
        assert!(output.contains(words), "{words} in {output}");
    }
    let mut agent = once(&machine).start();
    agent.wait_for_log("it is pending", DEADLINE, |line| line["event"] == "request_pending");
    assert_eq!(agent.terminate(DEADLINE).code(), Some(1), "nothing is installed yet");
    assert_eq!(machine.status("client")["key"]["backend"], "file");

    // An old key that cannot be destroyed is something left to do.
    control_plane.change_faults(|faults| faults.hold_approvals = false);
    let keys = machine.scratch.join("state/keys");
    std::fs::rename(&keys, machine.scratch.join("away")).expect("renamed");
    std::fs::write(&keys, "in the way").expect("written");
    let (status, output) = once(&machine).argument("--timeout=15s").run(DEADLINE);
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(output.contains("client: Failing"), "{output}");
    std::fs::remove_file(&keys).expect("removed");
    std::fs::rename(machine.scratch.join("away"), &keys).expect("renamed");
    let (status, output) = once(&machine).run(DEADLINE);
    assert!(status.success(), "{output}");
    assert_moved(&machine);
}

#[test]
fn a_timeout_needs_once_and_is_a_duration() {
    let machine = Machine::new();
    configure(&machine, "file");
    for arguments in [&["run", "--timeout=3s"][..], &["run", "--once", "--timeout=soon"]] {
        let answer = machine.run(arguments);
        assert_eq!(answer.code, Some(2), "{answer:?}");
    }
    // With nothing to enrol with, there is nothing to wait for but time.
    let (status, output) = once(&machine).argument("--timeout=1s").run(Duration::from_secs(60));
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(output.contains("client: NoCredential"), "{output}");
}

/// Case C34: with the old backend, the key in use is gone from the configuration as well.
#[test]
fn a_backend_that_is_no_longer_configured_does_not_hold_the_identity() {
    let control_plane = Embedded::signing_for(HOUR);
    let machine = enrolled(&control_plane);
    let (status, output) = once(&machine).run(DEADLINE);
    assert!(status.success(), "{output}");
    machine.configure(
        "once",
        "kubeconfig = \"$DIR/kubeconfig\"\nbootstrap-kubeconfig = \"$DIR/bootstrap\"\ncert-dir = \"$DIR/pki\"\n",
    );
    let (status, output) = once(&machine).argument("--timeout=10s").run(DEADLINE);
    let moved = machine.status("client");
    assert_eq!(moved["key"]["backend"], "file", "{moved} {output}");
    assert_eq!(status.code(), Some(1), "the old key is left: {output}");
    assert!(output.contains("hint: add [backends.other] to the configuration file"), "{output}");
    configure(&machine, "file");
    let (status, output) = once(&machine).run(DEADLINE);
    assert!(status.success(), "{output}");
    assert_eq!(std::fs::read_dir(machine.scratch.join("other")).expect("the old backend").count(), 0);
}
