//! Identities that share a process and nothing else.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use pintle_test_support::{Agent, Pair, Token, TokenModule, eventually};
use serde_json::Value;

use super::Machine;
use super::embedded::{DEADLINE, Embedded};

const HOUR: u64 = 3600;

/// Two client identities; the second one has its own cluster.
const TWO: &str = "
[[identity]]
name = \"kubelet\"
cert-dir = \"$DIR/kubelet\"
kubeconfig = \"$DIR/kubelet.conf\"
bootstrap-kubeconfig = \"$DIR/kubelet-bootstrap\"
[[identity]]
name = \"probe\"
cert-dir = \"$DIR/probe\"
kubeconfig = \"$DIR/probe.conf\"
bootstrap-kubeconfig = \"$DIR/probe-bootstrap\"
";

fn two(name: &str, kubelet: &Embedded, probe: &Embedded) -> Machine {
    let machine = Machine::new();
    let _ = machine.scratch.write("kubelet-bootstrap", kubelet.bootstrap_kubeconfig());
    let _ = machine.scratch.write("probe-bootstrap", probe.bootstrap_kubeconfig());
    machine.configure(name, TWO);
    machine
}

#[track_caller]
fn wait_for_state(machine: &Machine, identity: &str, state: &str) -> Value {
    eventually(&format!("{identity} is {state}"), DEADLINE, || {
        let status = machine.status(identity);
        (status["state"] == state).then_some(status)
    })
}

#[track_caller]
fn rotate(machine: &Machine, identity: &str) {
    let before = machine.status(identity);
    let answer = machine.run(&["rotate", "--wait", identity]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert_ne!(machine.status(identity)["serial"], before["serial"]);
}

#[test]
fn a_file_and_a_token_rotate_in_one_process_each_for_itself() {
    let control_plane = Embedded::signing_for(HOUR);
    let mut machine = Machine::new();
    let token = Token::new(TokenModule::SoftHsm, machine.scratch.join("token"));
    machine.set_environment(token.environment());
    let _ = machine.scratch.write("bootstrap", control_plane.bootstrap_kubeconfig());
    machine.configure(
        "both",
        &format!(
            "kubeconfig = \"$DIR/kubeconfig\"\nbootstrap-kubeconfig = \"$DIR/bootstrap\"\n[backends.token]\n{}\n\
             [[identity]]\nname = \"kubelet\"\ncert-dir = \"$DIR/kubelet\"\nbackend = \"token\"\n\
             [[identity]]\nname = \"probe\"\ncert-dir = \"$DIR/probe\"\n",
            token.table()
        ),
    );
    let mut agent = machine.agent().start();
    let serials: Vec<_> =
        ["kubelet", "probe"].iter().map(|name| wait_for_state(&machine, name, "ready")["serial"].clone()).collect();
    assert_ne!(serials[0], serials[1]);
    for round in 0..3 {
        rotate(&machine, ["probe", "kubelet", "probe"][round]);
    }
    assert_eq!(machine.status("kubelet")["rotations"], 2);
    assert_eq!(machine.status("probe")["rotations"], 3);
    let probe = Pair::read(&machine.scratch.join("probe/kubelet-client-current.pem")).expect("a pair with its key");
    assert_eq!(machine.status("probe")["serial"], probe.serial);
    // The kubeconfig of the node is the first one's, and is left alone by the second.
    let kubeconfig = std::fs::read_to_string(machine.scratch.join("kubeconfig")).expect("it was written");
    assert!(kubeconfig.contains("/kubelet/kubelet-client-current.pem"), "{kubeconfig}");
    for name in ["kubelet.json", "probe.json"] {
        assert!(machine.scratch.join("state").join(name).exists(), "{name}");
    }

    let keys = machine.keys();
    assert_eq!(keys.len(), 2, "one in use of each: {keys:?}");
    assert!(keys.iter().any(|(name, _)| name.starts_with("token:both_kubelet_")), "{keys:?}");
    assert!(keys.iter().any(|(name, _)| name.starts_with("file:both_probe_")), "{keys:?}");
    assert!(machine.run(&["keys", "prune"]).output.contains("nothing to destroy"));
    assert_eq!(machine.keys(), keys);

    let log = agent.log();
    for name in ["kubelet", "probe"] {
        let of = |event: &str| log.iter().any(|line| line["event"] == event && line["identity"] == name);
        assert!(of("started") && of("key_generated") && of("identity_proven") && of("keys_retired"), "{name}");
    }
    assert!(agent.terminate(DEADLINE).success());
    let (status, output) = machine.agent().argument("--once").run(DEADLINE);
    assert!(status.success(), "{output}");
}

#[test]
fn what_keeps_one_from_starting_or_from_its_server_is_not_the_others_trouble() {
    let (near, far) = (Embedded::signing_for(HOUR), Embedded::signing_for(HOUR));
    let machine = two("apart", &near, &far);
    // Its cert-dir is a file.
    std::fs::write(machine.scratch.join("probe"), "in the way").expect("written");
    let mut agent = machine.agent().start();
    wait_for_state(&machine, "kubelet", "ready");
    let status = wait_for_state(&machine, "probe", "not-started");
    assert!(status["reason"].as_str().is_some_and(|reason| reason.contains("/probe")), "{status}");
    assert_ne!(status["hint"], "");
    assert_eq!(machine.run(&["status"]).code, Some(1));
    rotate(&machine, "kubelet");
    let answer = machine.run(&["rotate", "probe"]);
    assert!(answer.code == Some(1) && answer.error.contains("/probe"), "{answer:?}");
    let told = |agent: &Agent| agent.log().iter().filter(|line| line["event"] == "start_failed").count();
    assert_eq!(told(&agent), 1);

    // It is started once that has changed.
    std::fs::remove_file(machine.scratch.join("probe")).expect("removed");
    wait_for_state(&machine, "probe", "ready");
    assert_eq!(told(&agent), 1);
    assert_eq!(near.requests_of("apart").len(), 2, "the first one's cluster");
    assert_eq!(far.requests_of("apart").len(), 1, "the second one's");

    // A rotation of the other goes through while this one's API server is away.
    far.block_on(far.go_away());
    assert_eq!(machine.run(&["rotate", "probe"]).code, Some(0));
    wait_for_state(&machine, "probe", "failing");
    rotate(&machine, "kubelet");
    far.block_on(far.come_back());
    wait_for_state(&machine, "probe", "ready");
    assert!(agent.terminate(DEADLINE).success());
}

#[test]
fn once_is_for_all_identities_and_says_which_are_not_done() {
    let (near, far) = (Embedded::signing_for(HOUR), Embedded::signing_for(HOUR));
    let machine = two("all", &near, &far);
    far.change_faults(|faults| faults.hold_approvals = true);
    let (status, output) = machine.agent().arguments(["--once", "--timeout=10s"]).run(DEADLINE);
    assert_eq!(status.code(), Some(1), "{output}");
    for words in ["kubelet: Ready", "probe: WaitingForApproval", "hint: probe: kubectl certificate approve"] {
        assert!(output.contains(words), "{words} in {output}");
    }
    far.change_faults(|faults| faults.hold_approvals = false);
    let (status, output) = machine.agent().argument("--once").run(DEADLINE);
    assert!(status.success(), "{output}");
    let table = machine.run(&["status"]).output;
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.starts_with("IDENTITY ") && table.contains("\nprobe "), "{table}");
}

#[test]
fn commands_name_their_identity_unless_there_is_only_one() {
    let control_plane = Embedded::signing_for(HOUR);
    let machine = two("named", &control_plane, &control_plane);
    let (status, output) = machine.agent().argument("--once").run(DEADLINE);
    assert!(status.success(), "{output}");
    for arguments in [
        &["rotate"][..],
        &["migrate", "--to=file"],
        &["credential"],
        &["kubeconfig"],
        &["inspect"],
        &["rotate", "prob"],
        &["inspect", "--identity=prob"],
    ] {
        let answer = machine.run(arguments);
        assert_eq!(answer.code, Some(2), "{arguments:?}: {answer:?}");
        assert!(answer.error.contains("kubelet, probe") && answer.error.contains("hint: "), "{answer:?}");
    }
    assert_eq!(machine.run(&["needs-renewal"]).code, Some(255), "not 2: there is a certificate");
    assert_eq!(machine.run(&["needs-renewal", "--identity=probe"]).code, Some(1));
    let serial = machine.status("probe")["serial"].as_str().expect("a serial number").to_owned();
    assert!(machine.run(&["inspect", "--identity=probe"]).output.contains(&serial));
    let credential = machine.run(&["credential", "probe"]);
    assert!(credential.output.contains("ExecCredential"), "{credential:?}");
    let kubeconfig = machine.run(&["kubeconfig", "probe", "--for=exec"]).output;
    assert!(kubeconfig.contains("credential") && kubeconfig.contains("probe"), "{kubeconfig}");
}

/// A request of an earlier release, which knew no names, over the control socket.
#[test]
fn an_earlier_client_is_understood_where_there_is_no_doubt() {
    let control_plane = Embedded::signing_for(HOUR);
    let ask = |machine: &Machine, request: &str| {
        let mut stream = UnixStream::connect(machine.scratch.join("state/control.sock")).expect("the agent listens");
        stream.write_all(request.as_bytes()).expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("read");
        serde_json::from_str::<Value>(&answer).expect("JSON")
    };
    let machine = two("earlier", &control_plane, &control_plane);
    let mut agent = machine.agent().start();
    wait_for_state(&machine, "probe", "ready");
    let answer = ask(&machine, "{\"command\":\"rotate\",\"wait\":false}\n");
    assert_eq!(answer["answer"], "failed", "{answer}");
    assert!(answer["reason"].as_str().is_some_and(|reason| reason.contains("kubelet, probe")), "{answer}");
    assert!(agent.terminate(DEADLINE).success());

    let machine = Machine::new();
    let _ = machine.scratch.write("bootstrap", control_plane.bootstrap_kubeconfig());
    let paths = "kubeconfig = \"$DIR/kubeconfig\"\nbootstrap-kubeconfig = \"$DIR/bootstrap\"\ncert-dir = \"$DIR/pki\"";
    machine.configure("earlier-single", paths);
    let mut agent = machine.agent().start();
    wait_for_state(&machine, "client", "ready");
    let answer = ask(&machine, "{\"command\":\"rotate\",\"wait\":true}\n");
    assert_eq!(answer["status"]["identities"][0]["rotations"], 2, "{answer}");
    let answer = ask(
        &machine,
        "{\"command\":\"migrate\",\"identity\":\"client\",\"to\":\"file\",\"dry_run\":true,\"wait\":false}\n",
    );
    assert_eq!(answer["moves"], false, "{answer}");
    assert!(agent.terminate(DEADLINE).success());
}
