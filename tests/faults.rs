//! What the API server, the approver and the signer do wrong, and what the agent makes of it.

mod embedded;

use std::process::Command;
use std::time::Duration;

use embedded::{DEADLINE, Embedded, public_key_of};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use pintle::demo::control_plane::Options;
use pintle_agent_core::Template;
use pintle_plugins_api::PublicKey;
use pintle_test_support::{Agent, Node, cluster_binary, eventually};
use serde_json::Value;

const HOUR: u64 = 3600;

fn node(name: &str, control_plane: &Embedded) -> Node {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), name);
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    node
}

fn wait_for_event(agent: &mut Agent, event: &str) -> Value {
    agent.wait_for_log(event, DEADLINE, |line| line["event"] == event)
}

/// Waits until a certificate other than `serial` is held.
fn wait_until_holding(agent: &mut Agent, serial: &str) -> String {
    let line = agent
        .wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding" && line["serial"] != serial);
    line["serial"].as_str().unwrap_or_default().to_owned()
}

fn wait_for_failure(agent: &mut Agent, words: &str) -> Value {
    agent.wait_for_log(words, DEADLINE, |line| {
        line["event"] == "failed" && line["reason"].as_str().is_some_and(|reason| reason.contains(words))
    })
}

fn kubectl(control_plane: &Embedded, node: &Node, arguments: &[&str]) -> String {
    let administrator = control_plane.admin_kubeconfig().expect("a certificate can be issued");
    let administrator = node.scratch().write("administrator.kubeconfig", administrator);
    let output = Command::new(cluster_binary())
        .args(["kubectl", "--kubeconfig"])
        .arg(administrator)
        .args(arguments)
        .env("HOME", node.scratch().path())
        .output()
        .expect("kubectl starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn c01_one_request_for_each_key_whatever_fails() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = node("c01", &control_plane);
    let requests = |count: usize| {
        let requests = control_plane.requests_of("c01");
        let mut keys: Vec<_> = requests.iter().map(public_key_of).collect();
        keys.sort();
        keys.dedup();
        assert_eq!((requests.len(), keys.len()), (count, count), "requests, and keys that they are for");
    };

    // Errors.
    control_plane.change_faults(|faults| faults.internal_errors = 2);
    let mut agent = node.agent().start();
    wait_for_failure(&mut agent, "500");
    let first = wait_until_holding(&mut agent, "");
    requests(1);

    // Silence.
    control_plane.change_faults(|faults| faults.hang = true);
    assert_eq!(node.run(&["rotate"]).code, Some(0));
    wait_for_failure(&mut agent, "no answer");
    control_plane.change_faults(|faults| faults.hang = false);
    let second = wait_until_holding_after(&mut agent, &[&first]);
    requests(2);

    // Nobody there, and a restart meanwhile.
    control_plane.block_on(control_plane.go_away());
    assert_eq!(node.run(&["rotate"]).code, Some(0));
    wait_for_failure(&mut agent, "refused");
    agent.kill();
    let mut agent = node.agent().start();
    eventually("the failure is known after the restart", DEADLINE, || {
        node.status()["reason"].as_str()?.contains("refused").then_some(())
    });
    control_plane.block_on(control_plane.come_back());
    wait_until_holding_after(&mut agent, &[&first, &second]);
    requests(3);
    assert!(node.keys().len() <= 2);
}

fn wait_until_holding_after(agent: &mut Agent, serials: &[&str]) -> String {
    let line = agent.wait_for_log("another certificate is held", DEADLINE, |line| {
        line["event"] == "holding" && !serials.iter().any(|serial| line["serial"] == **serial)
    });
    line["serial"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn c07_a_refused_certificate_is_replaced_by_way_of_the_bootstrap_credential() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = node("c07", &control_plane);
    let mut agent = node.agent().start();
    let first = wait_until_holding(&mut agent, "");

    control_plane.replace_client_certificate_authority().expect("an authority can be made");
    let answer = node.run(&["rotate", "--wait"]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    let second = wait_until_holding(&mut agent, &first);

    // Nobody asks for a rotation, but a restart looks.
    control_plane.replace_client_certificate_authority().expect("an authority can be made");
    agent.kill();
    let mut agent = node.agent().start();
    wait_until_holding(&mut agent, &second);
    let requesters: Vec<_> = control_plane
        .requests_of("c07")
        .into_iter()
        .map(|request| request.spec.username.unwrap_or_default().starts_with("system:bootstrap:"))
        .collect();
    assert_eq!(requesters, [true; 3]);
}

#[test]
fn c13_c14_waiting_for_approval_is_said_and_survives_a_restart() {
    let control_plane = Embedded::start(Options { manual_approval: true, ..Options::default() });
    let node = node("c13", &control_plane);
    let mut agent = node.agent().start();
    let pending = wait_for_event(&mut agent, "request_pending")["request"].as_str().expect("a name").to_owned();
    let said = |node: &Node| {
        eventually("the status says what is waited for", DEADLINE, || {
            let status = node.status();
            (status["state"] == "waiting-for-approval").then_some(status)
        })
    };
    let status = said(&node);
    let command = format!("kubectl certificate approve {pending}");
    assert_eq!(status["hint"], *command);
    let table = node.run(&["status"]);
    assert!(table.output.contains(&command) && table.code == Some(1), "{table:?}");

    for _ in 0..3 {
        agent.kill();
        agent = node.agent().start();
        wait_for_event(&mut agent, "request_pending");
        assert_eq!(said(&node)["request"], *pending);
    }
    assert_eq!(control_plane.requests_of("c13").len(), 1);

    kubectl(&control_plane, &node, &["certificate", "approve", &pending]);
    let first = wait_until_holding(&mut agent, "");

    // Deleted by somebody: the same key again, under another name.
    assert_eq!(node.run(&["rotate"]).code, Some(0));
    let pending = agent.wait_for_log("the next request", DEADLINE, |line| {
        line["event"] == "request_pending" && line["request"] != *pending
    });
    let pending = pending["request"].as_str().expect("a name").to_owned();
    let key = |name: &str| {
        let requests = control_plane.requests_of("c13");
        requests.iter().find(|request| request.metadata.name.as_deref() == Some(name)).map(public_key_of)
    };
    let deleted = key(&pending).expect("the request is there");
    assert!(control_plane.delete_certificate_signing_request(&pending));
    let again = eventually("it is requested again", DEADLINE, || {
        let requests = control_plane.requests_of("c13");
        requests.into_iter().find(|request| public_key_of(request) == deleted)?.metadata.name
    });
    assert_ne!(again, pending);
    kubectl(&control_plane, &node, &["certificate", "approve", &again]);
    wait_until_holding(&mut agent, &first);
    assert_eq!(node.current().expect("a pair").public_key, deleted);
}

#[test]
fn c20_the_server_is_left_alone_for_as_long_as_it_asks() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = node("c20", &control_plane);
    control_plane.change_faults(|faults| {
        faults.too_many_requests = 2;
        faults.retry_after = Some(Duration::from_secs(3));
    });
    let mut agent = node.agent().start();
    wait_until_holding(&mut agent, "");
    let time =
        |line: &Value| line["time"].as_str().and_then(|time| time.parse::<jiff::Timestamp>().ok()).expect("a time");
    let log = agent.log();
    let refusals: Vec<_> = log.iter().filter(|line| line["event"] == "failed").collect();
    assert_eq!(refusals.len(), 2);
    let submitted = log.iter().find(|line| line["event"] == "request_submitted").expect("it was submitted");
    for (refused, next) in refusals.iter().zip(refusals.iter().skip(1).chain([&submitted])) {
        assert!(refused["reason"].as_str().is_some_and(|reason| reason.contains("wait for 3 s")), "{refused}");
        // Log times are rounded to milliseconds.
        assert!(time(next).duration_since(time(refused)).as_millis() >= 2_999, "{refused} {next}");
    }
}

#[test]
fn c28_refusals_are_answered_with_the_same_key_and_bounded() {
    let control_plane = Embedded::signing_for(HOUR);
    let refused = node("c28", &control_plane);
    control_plane.change_faults(|faults| faults.deny_next = true);
    let mut agent = refused.agent().start();
    wait_for_failure(&mut agent, "denied");
    control_plane.change_faults(|faults| faults.fail_next_signing = true);
    wait_for_failure(&mut agent, "signer failed");
    wait_until_holding(&mut agent, "");
    let keys: Vec<_> = control_plane.requests_of("c28").iter().map(public_key_of).collect();
    assert_eq!(keys, vec![refused.current().expect("a pair").public_key; keys.len()]);
    // The signer's fault may meet the second request or, when the approver was quicker than the test, a third.
    assert_eq!(keys.len(), 3);

    // C50: what was issued has already expired, and the next one has too: the signer will go on like that.
    control_plane.change_faults(|faults| faults.signing_clock_offset_seconds = -24 * 3600);
    let behind = node("behind", &control_plane);
    let mut agent = behind.agent().start();
    let second =
        agent.wait_for_log("a second failure", DEADLINE, |line| line["event"] == "failed" && line["failures"] == 2);
    let time = |text: &Value| text.as_str().and_then(|time| time.parse::<jiff::Timestamp>().ok()).expect("a time");
    let wait = time(&second["retry_at"]).duration_since(time(&second["time"])).as_secs();
    assert!((299..=600).contains(&wait), "backed off hard: {second}");
    assert!(second["hint"].as_str().is_some_and(|hint| hint.contains("--cluster-signing-duration")), "{second}");
    control_plane.change_faults(|faults| faults.signing_clock_offset_seconds = 0);
    assert_eq!(behind.run(&["rotate"]).code, Some(0), "a person need not wait for it");
    wait_until_holding(&mut agent, "");
    let failures = agent.log().iter().filter(|line| line["event"] == "failed").count();
    let keys: Vec<_> = control_plane.requests_of("behind").iter().map(public_key_of).collect();
    assert_eq!(keys, vec![behind.current().expect("a pair").public_key; failures + 1]);
}

#[test]
fn c28_a_certificate_that_is_not_yet_valid_is_waited_for() {
    let control_plane = Embedded::signing_for(HOUR);
    // Five minutes of backdating, and some seconds that are to be waited for.
    control_plane.change_faults(|faults| faults.signing_clock_offset_seconds = 315);
    let node = node("ahead", &control_plane);
    let mut agent = node.agent().start();
    let failed = wait_for_event(&mut agent, "failed");
    assert!(failed["reason"].as_str().is_some_and(|reason| reason.contains("valid")), "{failed}");
    agent.kill();
    let mut agent = node.agent().start();
    wait_until_holding(&mut agent, "");
    assert_eq!(control_plane.requests_of("ahead").len(), 1);
}

#[test]
fn another_s_request_of_the_same_name_is_not_taken_for_ours() {
    let control_plane = Embedded::start(Options { manual_approval: true, ..Options::default() });
    let node = node("taken", &control_plane);
    let mut agent = node.agent().start();
    let first = wait_for_event(&mut agent, "request_pending")["request"].as_str().expect("a name").to_owned();
    let requests = control_plane.requests_of("taken");
    let key = PublicKey::from_der(public_key_of(&requests[0])).expect("a key");
    let next = |attempt| Template::kubelet_client("taken").request_name(&key, attempt);
    assert_eq!(next(1), first);

    // Whoever saw the first request knows the next one's name.
    let stranger = rcgen::KeyPair::generate().expect("a key");
    let request = rcgen::CertificateParams::default().serialize_request(&stranger).expect("a request");
    let mut object = requests[0].clone();
    object.metadata = ObjectMeta { name: Some(next(2)), ..ObjectMeta::default() };
    object.spec.request.0 = request.pem().expect("PEM").into_bytes();
    object.spec.signer_name = "example.com/signer".to_owned();
    object.status = None;
    let path = node.scratch().write("request.json", serde_json::to_vec(&object).expect("JSON"));
    kubectl(&control_plane, &node, &["create", "--validate=false", "-f", &path.display().to_string()]);

    assert!(control_plane.delete_certificate_signing_request(&first));
    wait_for_failure(&mut agent, "taken by another");
    let third = agent.wait_for_log("another request", DEADLINE, |line| {
        line["event"] == "request_pending" && line["request"] != first
    });
    assert_eq!(third["request"], next(3));
    kubectl(&control_plane, &node, &["certificate", "approve", &next(3)]);
    wait_until_holding(&mut agent, "");
}

#[test]
fn a_replaced_authority_is_read_without_a_restart() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = node("authority", &control_plane);
    let authority = node.scratch().write("authority.pem", control_plane.certificate_authority_pem());
    let mut agent = node.agent().flag("client-ca-file", &authority).start();
    wait_for_failure(&mut agent, "authority");
    let _ = node.scratch().write("authority.pem", control_plane.client_certificate_authority_pem());
    wait_until_holding(&mut agent, "");
}
