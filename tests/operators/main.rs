//! What operators do, and forget to do: bootstrap credentials that come and go, hosts that are renamed, two agents at once.

#[path = "../embedded/mod.rs"]
mod embedded;
mod secrets;

use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use embedded::{DEADLINE, Embedded, public_key_of};
use pintle::demo::control_plane::Options;
use pintle_test_support::{Agent, AgentCommand, Node, eventually};
use rustix::process::Signal;
use serde_json::Value;

const HOUR: u64 = 3600;
/// A user who owns nothing.
const NOBODY: u32 = 65534;

fn new_node(name: &str) -> Node {
    Node::new(env!("CARGO_BIN_EXE_pintle"), name)
}

fn wait_until_holding(agent: &mut Agent) -> Value {
    agent.wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding")
}

fn wait_for_state(node: &Node, state: &str) -> Value {
    eventually(state, DEADLINE, || {
        let status = node.status();
        (status["state"] == state).then_some(status)
    })
}

#[test]
fn c03_c21_a_node_without_any_credential_says_so_and_goes_on_when_it_gets_one() {
    let control_plane = Embedded::signing_for(8);
    let node = new_node("c03");
    let mut agent = node.agent().start();
    let status = wait_for_state(&node, "no-credential");
    assert!(status["hint"].as_str().is_some_and(|hint| hint.contains("--bootstrap-kubeconfig")), "{status}");
    assert_eq!(node.run(&["status"]).code, Some(1));
    assert_eq!(node.run(&["needs-renewal"]).code, Some(2));
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    wait_until_holding(&mut agent);
    agent.kill();

    // Off for longer than the certificate lives, and the bootstrap credential is long gone.
    std::fs::remove_file(node.bootstrap_kubeconfig()).expect("it was there");
    let ends = node.current().expect("a pair").not_after;
    eventually("the certificate ends", DEADLINE, || (SystemTime::now() > ends).then_some(()));
    assert_eq!(node.run(&["needs-renewal"]).code, Some(0));
    let before = control_plane.requests_of("c03").len();
    let mut agent = node.agent().start();
    let status = wait_for_state(&node, "no-credential");
    assert!(
        status["reason"].as_str().is_some_and(|reason| reason.contains("bootstrap-kubeconfig does not exist")),
        "{status}"
    );
    assert_eq!(node.run(&["status"]).code, Some(1));
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    wait_until_holding(&mut agent);
    assert!(node.current().expect("a pair").not_after > ends);
    assert!(control_plane.requests_of("c03").len() > before);
}

#[test]
fn c08_a_kubeconfig_that_does_not_follow_rotations_is_told_of() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = new_node("c08");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let inline = control_plane.client_kubeconfig("system:node:c08", &["system:nodes"], Duration::from_secs(HOUR));
    let _ = node.scratch().write("kubeconfig", inline.expect("a certificate can be issued"));
    let before = std::fs::read(node.kubeconfig()).expect("readable");
    let mut agent = node.agent().start();
    let stale = agent.wait_for_log("it is told", DEADLINE, |line| line["event"] == "kubeconfig_stale");
    assert!(stale["reason"].as_str().is_some_and(|reason| reason.contains("holds a certificate itself")), "{stale}");
    wait_until_holding(&mut agent);
    assert_eq!(std::fs::read(node.kubeconfig()).expect("readable"), before, "it belongs to the operator");
}

#[test]
fn c12_a_renamed_host_is_refused_with_both_names() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = new_node("c12-before");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    assert_eq!(node.enrol(DEADLINE).0, Some(0));
    let node = node.renamed("c12-after");
    for journal in ["with its journal", "without"] {
        let (code, output) = node.enrol(DEADLINE);
        assert_eq!(code, Some(1), "{journal}: {output}");
        for said in ["system:node:c12-before", "system:node:c12-after", "--node-name c12-before", "mv "] {
            assert!(output.contains(said), "{journal}: {said} in {output}");
        }
        let _ = std::fs::remove_file(node.journal());
    }
    assert!(control_plane.requests_of("c12-after").is_empty());
}

#[test]
fn c23_a_bootstrap_kubeconfig_deleted_in_the_middle_is_not_needed_any_more() {
    let control_plane = Embedded::start(Options { approval_delay: Duration::from_secs(4), ..Options::default() });
    let node = new_node("c23");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let mut agent = node.agent().start();
    agent.wait_for_log("it is submitted", DEADLINE, |line| line["event"] == "request_submitted");
    std::fs::remove_file(node.bootstrap_kubeconfig()).expect("it was there");
    wait_until_holding(&mut agent);
    assert!(node.kubeconfig().exists(), "the kubeconfig is written all the same");
    assert_eq!(control_plane.requests_of("c23").len(), 1);

    // Restarted in between as well: what was submitted is in the journal, and is asked after with the next credential.
    let node = new_node("c23-restarted");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let mut agent = node.agent().start();
    agent.wait_for_log("it is submitted", DEADLINE, |line| line["event"] == "request_submitted");
    agent.kill();
    std::fs::remove_file(node.bootstrap_kubeconfig()).expect("it was there");
    let mut agent = node.agent().start();
    wait_for_state(&node, "no-credential");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    wait_until_holding(&mut agent);
    let requests = control_plane.requests_of("c23-restarted");
    assert_eq!(requests.len(), 1);
    assert_eq!(public_key_of(&requests[0]), node.current().expect("a pair").public_key);
}

#[test]
fn c24_a_life_is_asked_for_and_what_was_granted_is_shown() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = new_node("c24");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let refused = node.run(&["run", "--once", "--expiration-seconds=599"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.error.contains("600"), "{refused:?}");
    assert!(control_plane.requests_of("c24").is_empty());

    let (status, output) = node.agent().arguments(["--once", "--expiration-seconds=600"]).run(DEADLINE);
    assert!(status.success(), "{output}");
    assert_eq!(control_plane.requests_of("c24")[0].spec.expiration_seconds, Some(600));
    let pair = node.current().expect("a pair");
    assert!(pair.not_after <= SystemTime::now() + Duration::from_secs(600));
    let shown = node.status()["notAfter"].as_str().and_then(|time| time.parse::<jiff::Timestamp>().ok());
    assert_eq!(shown.map(SystemTime::from), Some(pair.not_after));
    assert_eq!(node.run(&["needs-renewal"]).code, Some(1));
    assert_eq!(node.run(&["status"]).code, Some(0), "from disk, without an agent");
}

#[test]
fn two_agents_never_share_a_state_directory() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = new_node("twice");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let mut agent = node.agent().start();
    wait_until_holding(&mut agent);
    let second = node.run(&["run", "--once"]);
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(second.error.contains("another pintle is running") && second.error.contains("hint: "), "{second:?}");
    assert_eq!(node.status()["state"], "ready", "the first one's control socket is untouched");
    assert!(agent.terminate(DEADLINE).success());
    assert_eq!(node.run(&["rotate"]).code, Some(1));
    assert_eq!(control_plane.requests_of("twice").len(), 1);
}

#[test]
fn a_directory_of_somebody_else_is_refused_with_what_to_do() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = new_node("owner");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    // Keys that somebody else can replace are no secret.
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(node.state_dir().join("keys")).expect("made");
    chown(node.state_dir().join("keys"), Some(NOBODY), None).expect("as root");
    let mut agent = node.agent().start();
    let failed = agent.wait_for_log("it fails", DEADLINE, |line| line["event"] == "failed");
    assert!(failed["reason"].as_str().is_some_and(|reason| reason.contains("belongs to user 65534")), "{failed}");
    assert_ne!(failed["hint"], "");
    assert!(control_plane.requests_of("owner").is_empty());
    chown(node.state_dir().join("keys"), Some(0), None).expect("as root");
    wait_until_holding(&mut agent);
    agent.kill();

    // As a user who may not even look.
    let (status, output) = AgentCommand::named("/usr/bin/setpriv", node.scratch(), "nobody")
        .arguments(["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_pintle"), "run", "--once"])
        .arguments([format!("--state-dir={}", node.state_dir().display()), "--node-name=owner".to_owned()])
        .run(DEADLINE);
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(output.contains("Permission denied") && output.contains("hint: "), "{output}");
}

#[test]
fn an_exec_plugin_that_hangs_holds_up_neither_status_nor_the_end() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = new_node("exec");
    let user =
        "exec: {apiVersion: client.authentication.k8s.io/v1, command: sleep, args: ['60'], interactiveMode: Never}";
    let kubeconfig = control_plane.bootstrap_kubeconfig();
    let token = kubeconfig.lines().map(str::trim).find(|line| line.starts_with("token:")).expect("a token");
    node.give_bootstrap(kubeconfig.replace(token, user));
    let mut agent = node.agent().start();
    wait_for_state(&node, "enrolling");
    assert!(agent.terminate(DEADLINE).success());

    // A kubeconfig that is replaced meanwhile is tried at once when the first one has had its time, and a server that
    // is no URL is said to be none.
    node.give_bootstrap(kubeconfig.replace("https://", ""));
    let mut agent = node.agent().start();
    let status = wait_for_state(&node, "no-credential");
    assert!(status["reason"].as_str().is_some_and(|reason| reason.contains("https://")), "{status}");
    agent.kill();
}

#[test]
fn c08_a_torn_kubeconfig_is_told_of_and_does_not_keep_the_agent_from_its_server() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = new_node("torn");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    std::fs::write(node.kubeconfig(), "").expect("the scratch directory is writable");
    let mut agent = node.agent().start();
    agent.wait_for_log("the kubeconfig is told of", DEADLINE, |line| line["event"] == "kubeconfig_stale");
    agent.wait_for_log("the identity is proven", DEADLINE, |line| line["event"] == "identity_proven");
    agent.kill();
}

#[test]
fn an_agent_that_is_stopped_is_said_not_to_answer() {
    let node = new_node("stopped");
    let mut agent = node.agent().start();
    wait_for_state(&node, "no-credential");
    agent.process().signal(Signal::STOP);
    for command in ["status", "rotate"] {
        let answer = node.run(&[command]);
        assert_eq!(answer.code, Some(1));
        assert!(answer.error.contains("does not answer") && answer.error.contains("hint: "), "{}", answer.error);
    }
    agent.kill();
    let status = node.status();
    assert_eq!(status["state"], "not-running");
    assert_eq!(status["pair"], node.current_path().display().to_string());
}

#[test]
fn c26_a_lost_key_is_no_rotation_to_wait_for() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = new_node("lost");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    assert_eq!(node.enrol(DEADLINE).0, Some(0));
    node.keys().iter().for_each(|key| std::fs::remove_file(key).expect("removed"));
    // The pair without its key.
    let pair = read(&node.current_path());
    let end = pair.find("-----BEGIN PRIVATE KEY").expect("a key");
    std::fs::write(node.current_path(), &pair[..end]).expect("written");
    let mut agent = node.agent().start();
    wait_for_state(&node, "key-lost");
    assert_eq!(node.run(&["status"]).code, Some(1));
    let answer = node.run(&["rotate", "--wait"]);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert!(answer.error.contains("no longer has the key") && answer.error.contains("on-key-loss"), "{answer:?}");
    agent.kill();
}

#[test]
fn commands_say_what_is_wrong_with_what_they_are_given() {
    let node = new_node("wrong");
    let config = node.scratch().write("wrong.toml", "keep-pairs = 0");
    let config = config.display().to_string();
    let der = node.scratch().write("der", [0x30, 0x82, 0xff, 0x00]);
    let der = der.display().to_string();
    let pintle = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_pintle")).args(arguments).output().expect("it starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // 2 would say that there is no certificate.
    for (arguments, code, words) in [
        (vec!["needs-renewal", "--config", &config], 255, "keep-pairs"),
        (vec!["needs-renewal", &der], 255, "der"),
        (vec!["config", "check", "--config", &config], 2, "keep-pairs"),
        (vec!["inspect", &der], 1, "no PEM block"),
        (vec!["backend", "check", "nosuch"], 2, "nosuch"),
    ] {
        let (found, error) = pintle(&arguments);
        assert_eq!(found, Some(code), "{arguments:?}: {error}");
        assert!(error.contains(words) && error.contains("hint: "), "{arguments:?}: {error}");
    }
    // clap's own words, which have no hint.
    for identity in [["migrate", "nosuch"], ["kubeconfig", "nosuch"]] {
        let (found, error) =
            pintle(&[identity.as_slice(), &["--to=file"][..usize::from(identity[0] == "migrate")]].concat());
        assert!(found == Some(2) && error.contains("nosuch"), "{identity:?}: {error}");
    }
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("every Linux has it");
    let completions = Command::new(env!("CARGO_BIN_EXE_pintle")).args(["completions", "bash"]).stdout(full).output();
    let completions = completions.expect("it starts");
    let error = String::from_utf8_lossy(&completions.stderr);
    assert_eq!(completions.status.code(), Some(1), "{error}");
    assert!(error.contains("No space left") && error.contains("hint: "), "{error}");
    let closed = format!("{} completions bash | head -n 0; exit ${{PIPESTATUS[0]}}", env!("CARGO_BIN_EXE_pintle"));
    let completions = Command::new("bash").args(["-c", &closed]).output().expect("bash starts");
    assert!(completions.status.success(), "{}", String::from_utf8_lossy(&completions.stderr));
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).expect("readable")).into_owned()
}

/// In a back-off that a later look at the file must end, while the agent runs and across a start.
#[test]
fn c21_a_bootstrap_kubeconfig_that_is_mended_is_tried_at_once() {
    let control_plane = Embedded::signing_for(HOUR);
    let good = control_plane.bootstrap_kubeconfig();
    let wrong = good.lines().map(|line| line.split("token: ").next().map_or(line, |rest| rest));
    let wrong = wrong.collect::<Vec<_>>().join("\n");
    for running in [true, false] {
        let node = new_node(if running { "mended" } else { "mended-before" });
        node.give_bootstrap(&wrong);
        let mut agent = node.agent().start();
        agent.wait_for_log("it is refused", DEADLINE, |line| line["event"] == "failed");
        agent.kill();
        let mut journal: Value = serde_json::from_str(&read(&node.journal())).expect("JSON");
        let until = SystemTime::now() + Duration::from_secs(300);
        let until = until.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_millis();
        journal["state"]["back_off"]["until"] = u64::try_from(until).expect("a time").into();
        std::fs::write(node.journal(), journal.to_string()).expect("written");
        if running {
            agent = node.agent().start();
            wait_for_state(&node, "failing");
            node.give_bootstrap(&good);
        } else {
            node.give_bootstrap(&good);
            agent = node.agent().start();
        }
        wait_until_holding(&mut agent);
        agent.kill();
    }
}
