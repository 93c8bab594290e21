//! The oldest release that is supported, for real. Its signer counts a certificate's lifetime from five minutes before the
//! present, so a short one has expired when it is issued.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use pintle_test_support::{
    Agent, BootstrapCredential, ControlPlane, Node, Options, Release, SubmittedRequest, eventually,
};

const DEADLINE: Duration = Duration::from_secs(180);
const ROTATIONS: usize = 3;

fn start(cluster_signing_duration: &str) -> ControlPlane {
    ControlPlane::start(Options {
        release: Release::V1_21,
        cluster_signing_duration: cluster_signing_duration.into(),
        ..Options::default()
    })
}

fn new_node(control_plane: &ControlPlane, name: &str) -> Node {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), name);
    let kubeconfig = control_plane.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
    node.give_bootstrap(std::fs::read(kubeconfig).expect("readable"));
    node
}

fn requests_of(control_plane: &ControlPlane, node: &Node) -> Vec<SubmittedRequest> {
    let prefix = format!("pintle-{}-", node.name());
    control_plane.requests().into_iter().filter(|request| request.name.starts_with(&prefix)).collect()
}

fn failures(agent: &Agent) -> usize {
    agent.log().iter().filter(|line| line["event"] == "failed").count()
}

#[test]
fn first_certificate_and_rotations_with_the_signers_default() {
    let control_plane = start("");
    let version = control_plane.kubectl_json(&["get", "--raw=/version"]);
    assert_eq!((version["major"].as_str(), version["minor"].as_str()), (Some("1"), Some("21")), "{version}");
    let node = new_node(&control_plane, "old");
    let mut agent = node.agent().start();
    let is_ready = |node: &Node| (node.status()["state"] == "ready").then_some(());
    agent.wait_for("ready", DEADLINE, |_| is_ready(&node));
    let first = node.current().expect("a pair");
    // The default is a year, which the signer cuts to what is left of its authority's day.
    assert!(first.not_after > SystemTime::now() + Duration::from_secs(20 * 3600), "{first:?}");

    let mut pairs = vec![first];
    for _ in 0..ROTATIONS {
        let answer = node.run(&["rotate", "--wait"]);
        assert_eq!(answer.code, Some(0), "{answer:?}");
        pairs.push(node.current().expect("a pair"));
    }
    agent.wait_for("ready", DEADLINE, |_| is_ready(&node));
    assert_eq!(pairs.iter().map(|pair| &pair.public_key).collect::<BTreeSet<_>>().len(), ROTATIONS + 1);
    assert_eq!((node.keys().len(), failures(&agent)), (1, 0), "{}", agent.output());
    // The API server takes the last one for the node; it does not say so itself before 1.28.
    let object = control_plane.try_kubectl_as(&node.kubeconfig(), &["get", "csr", "-o", "name"]);
    assert!(object.is_ok(), "{object:?}");
    let users: Vec<_> = requests_of(&control_plane, &node).into_iter().map(|request| request.username).collect();
    assert_eq!(users.len(), ROTATIONS + 1);
    assert_eq!(users.iter().filter(|user| *user == "system:node:old").count(), ROTATIONS, "{users:?}");
}

#[test]
fn c50_a_signer_that_issues_expired_certificates_is_asked_ever_more_rarely_and_its_flag_is_named() {
    let control_plane = start("30s");
    let node = new_node(&control_plane, "expired");
    let mut agent = node.agent().start();
    let status = agent.wait_for("the status names the flag", DEADLINE, |_| {
        let status = node.status();
        status["hint"].as_str()?.contains("--cluster-signing-duration").then_some(status)
    });
    assert!(status["reason"].as_str().is_some_and(|reason| reason.contains("already expired")), "{status}");
    let log = agent.log();
    let told = log.iter().any(|line| {
        line["event"] == "failed"
            && line["hint"].as_str().is_some_and(|hint| hint.contains("--cluster-signing-duration"))
    });
    assert!(told, "{}", agent.output());

    // What was issued says why: it expired before it was asked for.
    let issued = eventually("a certificate was issued", DEADLINE, || {
        requests_of(&control_plane, &node).into_iter().find(|request| request.certificate.is_some())
    });
    assert!(issued.has_condition("Approved"), "{issued:?}");

    // Six within a minute was the fault.
    std::thread::sleep(Duration::from_secs(150));
    let requests = requests_of(&control_plane, &node);
    assert!((2..=5).contains(&requests.len()), "{} requests in the first minutes", requests.len());
    assert_eq!(node.current(), None, "nothing that has expired is published");
    agent.process().assert_running();
}
