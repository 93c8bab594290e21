//! A real kubelet with pintle's files, and pintle with a real kubelet's files.

use std::sync::LazyLock;
use std::time::Duration;

use pintle_test_support::{BootstrapCredential, ControlPlane, Kubelet, KubeletOptions, Node, Options, eventually};

const DEADLINE: Duration = Duration::from_secs(180);

/// A kubelet counts the lifetime from notBefore, which is backdated by five minutes, so it rotates such a certificate
/// within seconds.
static SHARED: LazyLock<ControlPlane> =
    LazyLock::new(|| ControlPlane::start(Options { cluster_signing_duration: "75s".into(), ..Options::default() }));

fn new_node(name: &str) -> Node {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), name);
    let bootstrap = SHARED.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
    node.give_bootstrap(std::fs::read(bootstrap).expect("readable"));
    node
}

#[test]
fn a_kubelet_becomes_ready_with_pintles_files() {
    let node = new_node("served");
    let mut agent = node.agent().start();
    agent.wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding");
    let mut options = KubeletOptions::new("served", node.kubeconfig());
    options.cert_dir = Some(node.cert_dir());
    let mut kubelet = Kubelet::start(&SHARED, &options);
    kubelet.wait_ready(DEADLINE);
    // After a rotation, the pair also works for the kubelet's next start.
    let answer = node.run(&["rotate", "--wait"]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    kubelet.restart();
    let before = kubelet.lease_renew_time();
    eventually("its lease is renewed", DEADLINE, || {
        kubelet.lease_renew_time().filter(|time| before.as_ref() < Some(time))
    });
    assert!(agent.process().is_running());
}

#[test]
fn pintle_takes_over_from_a_kubelet_and_the_kubelet_takes_back() {
    let node = new_node("taken-over");
    let mut options = KubeletOptions::new("taken-over", node.kubeconfig());
    options.bootstrap_kubeconfig = Some(node.bootstrap_kubeconfig());
    options.cert_dir = Some(node.cert_dir());
    options.rotate_certificates = true;
    let mut kubelet = Kubelet::start(&SHARED, &options);
    kubelet.wait_ready(DEADLINE);
    eventually("the kubelet has rotated its own", DEADLINE, || {
        let clients = node.pairs().into_iter().filter(|pair| pair.to_string_lossy().contains("kubelet-client-2"));
        (clients.count() >= 2).then_some(())
    });
    kubelet.process().kill();
    // From here on there is no bootstrap credential.
    std::fs::remove_file(node.bootstrap_kubeconfig()).expect("it was there");
    let kubeconfig = std::fs::read(node.kubeconfig()).expect("the kubelet wrote it");
    let of_kubelet = node.current().expect("a pair");

    let mut agent = node.agent().start();
    let adopted = agent.wait_for_log("it is adopted", DEADLINE, |line| line["event"] == "credential_adopted");
    assert_eq!(adopted["serial"], of_kubelet.serial.as_str());
    agent.wait_for_log("it is held", DEADLINE, |line| line["event"] == "holding");
    let answer = node.run(&["rotate", "--wait"]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    let of_pintle = node.current().expect("a pair");
    assert_ne!(of_pintle.public_key, of_kubelet.public_key);
    assert_eq!(std::fs::read(node.kubeconfig()).expect("readable"), kubeconfig, "adopted unchanged");
    assert_eq!(SHARED.who_is_in(&node.kubeconfig()).expect("known").certificate_sha256, Some(of_pintle.sha256.clone()));
    agent.kill();

    // The kubelet continues with pintle's pair, and rotates it by itself.
    options.bootstrap_kubeconfig = None;
    let mut kubelet = Kubelet::start(&SHARED, &options);
    let rotated = eventually("the kubelet rotates pintle's pair", DEADLINE, || {
        kubelet.process().is_running().then_some(())?;
        node.current().filter(|pair| pair.serial != of_pintle.serial)
    });
    kubelet.process().kill();
    let rotated = node.current().unwrap_or(rotated);

    // pintle adopts that pair, although its journal has another one.
    let mut agent = node.agent().start();
    let adopted = agent.wait_for_log("it is adopted", DEADLINE, |line| line["event"] == "credential_adopted");
    assert_eq!(adopted["serial"], rotated.serial.as_str());
    agent.wait_for_log("it is held", DEADLINE, |line| line["event"] == "holding");
    assert!(node.keys().len() <= 2, "{:?}", node.keys());
}
