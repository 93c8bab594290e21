//! The common manual test: check the dates, change the clock, and see the certificate renewed. Only the agent's clock
//! is changed.

mod embedded;

use std::process::Command;
use std::time::{Duration, SystemTime};

use embedded::{DEADLINE, Embedded};
use pintle_test_support::{Agent, Node};

/// The lifetime that the signer grants by default.
const LIFE: u64 = 24 * 3600;

fn node(control_plane: &Embedded, name: &str) -> Node {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), name).with_clock();
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let (status, output) = node.agent().arguments(["--once", "--expiration-seconds=3600"]).run(DEADLINE);
    assert!(status.success(), "{output}");
    node
}

/// notAfter as `openssl x509 -noout -enddate` prints it, in seconds from now.
fn seconds_left(node: &Node) -> i64 {
    let dates = ["x509", "-noout", "-enddate", "-dateopt", "iso_8601", "-in"];
    let output = Command::new("openssl").args(dates).arg(node.current_path()).output().expect("openssl starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let end = text.trim().strip_prefix("notAfter=").expect("a date").replace(' ', "T");
    let end: jiff::Timestamp = end.parse().expect("ISO 8601");
    let left = SystemTime::from(end).duration_since(SystemTime::now()).expect("it is good");
    left.as_secs().try_into().expect("not so long")
}

fn wait_for_renewal(agent: &mut Agent, node: &Node, from: &str) {
    agent.wait_for_log("it is renewed", DEADLINE, |line| line["event"] == "holding" && line["serial"] != from);
    assert!(seconds_left(node) > 3600, "its lifetime is the signer's default");
}

#[test]
fn c04_c05_a_clock_moved_into_the_last_tenth_renews_without_a_restart() {
    let control_plane = Embedded::signing_for(LIFE);
    let node = node(&control_plane, "moved");
    let before = node.current().expect("a pair").serial;
    let mut agent = node.agent().start();
    agent.wait_for_log("it is held", DEADLINE, |line| line["event"] == "holding" && line["serial"] == *before);
    node.set_clock(seconds_left(&node) - 300);
    // Within 15 s of the step: the wall clock is checked every five seconds.
    let deadline = Duration::from_secs(15);
    agent.wait_for_log("it is noticed", deadline, |line| line["event"] == "rotation_started");
    wait_for_renewal(&mut agent, &node, &before);
    assert!(agent.log().iter().any(|line| line["event"] == "clock_stepped"));
    let requests = control_plane.requests_of("moved");
    assert!(requests.iter().any(|request| request.spec.username.as_deref() == Some("system:node:moved")));
    assert_eq!(requests.len(), 2);

    // Set back, the clock makes the certificate not valid yet. It is kept, and nothing is requested.
    let renewed = node.current().expect("a pair");
    node.set_clock(-7 * 24 * 3600);
    agent.kill();
    let mut agent = node.agent().start();
    agent.wait_for_log("it is held", DEADLINE, |line| line["event"] == "holding" && line["serial"] == *renewed.serial);
    assert_eq!(control_plane.requests_of("moved").len(), 2);
}

#[test]
fn a_restart_in_the_last_tenth_renews_at_once() {
    let control_plane = Embedded::signing_for(LIFE);
    let node = node(&control_plane, "restarted");
    let before = node.current().expect("a pair").serial;
    node.set_clock(seconds_left(&node) - 300);
    let (status, output) = node.agent().argument("--once").run(DEADLINE);
    assert!(status.success(), "{output}");
    assert_ne!(node.current().expect("a pair").serial, before);
    let requests = control_plane.requests_of("restarted");
    assert_eq!(requests.len(), 2);
}

#[test]
fn a_clock_moved_past_expiry_enrols_again() {
    let control_plane = Embedded::signing_for(LIFE);
    let node = node(&control_plane, "past");
    let before = node.current().expect("a pair").serial;
    let mut agent = node.agent().start();
    agent.wait_for_log("it is held", DEADLINE, |line| line["event"] == "holding" && line["serial"] == *before);
    node.set_clock(seconds_left(&node) + 600);
    wait_for_renewal(&mut agent, &node, &before);
    let requests = control_plane.requests_of("past");
    let bootstrapped = requests
        .iter()
        .filter(|request| request.spec.username.as_deref().is_some_and(|user| user.starts_with("system:bootstrap:")));
    assert_eq!((bootstrapped.count(), requests.len()), (2, 2));
}
