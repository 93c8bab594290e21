//! Go's clients under load with a real API server, while the agent rotates a key in SoftHSM (case C18, C19).

mod device;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use device::served::Served;
use device::{DEADLINE, Node};
use pintle_test_support::{ControlPlane, Load, Options, ScratchDirectory, Token, TokenModule, eventually};

const ROTATIONS: usize = 20;
/// What a node may always do: read, and create an object that is not stored. Clients must not retry the latter.
const FLAGS: [&str; 5] = [
    "--get=/version",
    "--post=/apis/authentication.k8s.io/v1/selfsubjectreviews",
    r#"--body={"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}"#,
    // Each client has its own connection, which is hardly ever idle: the rotation would have to wait for it.
    "--sharing=1",
    "--interval=1ms",
];

#[test]
fn c18_c19_no_request_of_a_go_client_fails_in_20_rotations_by_the_agent() {
    let cluster = ControlPlane::start(Options::default());
    let storage = ScratchDirectory::new();
    let token = Token::new(TokenModule::SoftHsm, storage.join("token"));
    let served = Served::new(Node::new("load"), token.environment(), &token.table(), &cluster, "10m");
    let mut agent = served.start();

    let mut load = Load::start(&served.kubeconfig(), &served.node.scratch, &FLAGS);
    load.wait_until_running(DEADLINE);
    let began = Instant::now();
    for _ in 0..ROTATIONS {
        served.rotate(&mut agent);
        // The next rotation starts when the old key is destroyed, which is when its last connection has closed.
        agent.wait_for("the old key is destroyed", DEADLINE, |_| (token.keys().len() == 1).then_some(()));
    }
    let took = began.elapsed();
    let report = load.stop();
    println!("{ROTATIONS} rotations in {took:?}: {}\n{:#}", report.text, served.proxy());
    assert_eq!((report.failed, report.answered), (0, report.requests), "{}", report.text);
    assert_eq!(report.by.len(), 16, "{}", report.text);
    assert_eq!(served.proxy()["statistics"]["failures"], serde_json::json!({}));

    // Compare with the API server's audit log.
    let by_certificate = eventually("the audit log shows each request", Duration::from_secs(60), || {
        let mut by_certificate = BTreeMap::<String, u64>::new();
        for event in cluster.audit_events().into_iter().filter(|event| event.user_agent == "load") {
            assert_eq!((event.username.as_str(), event.code / 100), ("system:node:load", 2), "{event:?}");
            *by_certificate.entry(event.certificate_sha256.expect("a certificate")).or_default() += 1;
        }
        let seen: u64 = by_certificate.values().sum();
        assert!(seen <= report.answered, "{seen} requests, {} answers", report.answered);
        (seen == report.answered).then_some(by_certificate)
    });
    println!("requests by certificate: {:?}", by_certificate.values());
    assert_eq!(by_certificate.len(), ROTATIONS + 1);
}
