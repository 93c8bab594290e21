//! Rotation after rotation against the real control plane, with certificates that live for seconds.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use pintle_test_support::{BootstrapCredential, ControlPlane, Node, Options, Pair, eventually};

const ROTATIONS: usize = 20;
/// A certificate is rotated after seven or eight of its ten seconds.
const LIFE: &str = "10s";
const DEADLINE: Duration = Duration::from_secs(600);

static SHARED: LazyLock<ControlPlane> =
    LazyLock::new(|| ControlPlane::start(Options { cluster_signing_duration: LIFE.into(), ..Options::default() }));

fn new_node(name: &str) -> Node {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), name);
    let bootstrap = SHARED.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
    node.give_bootstrap(std::fs::read(bootstrap).expect("readable"));
    node
}

fn time(text: &serde_json::Value) -> SystemTime {
    let time: Result<jiff::Timestamp, _> = text.as_str().unwrap_or_default().parse();
    time.expect("RFC 3339").into()
}

/// Waits until the status gives a reason that contains these words.
#[track_caller]
fn wait_for_reason(agent: &mut pintle_test_support::Agent, node: &Node, words: &str) {
    agent.wait_for(&format!("status says: {words}"), DEADLINE, |_| {
        let reason = node.status()["reason"].as_str()?.to_owned();
        reason.contains(words).then_some(())
    });
}

/// C31: kube-controller-manager comes back with an authority that kube-apiserver does not know; and with the right one.
#[test]
fn c31_what_the_api_server_refuses_is_not_published_and_the_held_key_lives() {
    let control_plane = ControlPlane::start(Options::default());
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), "refused");
    let kubeconfig = control_plane.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
    node.give_bootstrap(std::fs::read(kubeconfig).expect("readable"));
    let mut agent = node.agent().start();
    let first = eventually("the first pair", DEADLINE, || node.current());
    let first_key = node.keys();
    wait_until_ready(&mut agent, &node);

    control_plane.sign_with_unknown_authority();
    assert_eq!(node.run(&["rotate"]).code, Some(0));
    wait_for_reason(&mut agent, &node, "the API server refuses what the signer issued");
    let held_works = || {
        assert_eq!(node.current().as_ref(), Some(&first), "the held pair stays current");
        assert!(node.keys().contains(&first_key[0]), "its key lives");
        let identity = control_plane.who_is_in(&node.kubeconfig()).expect("the API server knows the node");
        assert_eq!(identity.certificate_sha256.as_ref(), Some(&first.sha256));
    };
    held_works();

    // The candidate's key is lost as well: it is let go, and nothing else (A5).
    for key in node.keys().iter().filter(|key| !first_key.contains(key)) {
        std::fs::remove_file(key).expect("removed");
    }
    agent.wait_for_log("the lost candidate is let go", DEADLINE, |line| {
        line["event"] == "failed" && line["reason"].as_str().is_some_and(|reason| reason.contains("key not found"))
    });
    held_works();

    wait_for_reason(&mut agent, &node, "the API server refuses what the signer issued");
    control_plane.sign_with_known_authority();
    // A person who has fixed the signer need not wait for the back-off.
    assert_eq!(node.run(&["rotate"]).code, Some(0));
    let second = eventually("the second pair", DEADLINE, || node.current().filter(|pair| *pair != first));
    wait_until_ready(&mut agent, &node);
    assert!(!node.keys().contains(&first_key[0]) && node.keys().len() == 1, "{:?}", node.keys());
    assert_eq!(
        control_plane.who_is_in(&node.kubeconfig()).expect("known").certificate_sha256.as_ref(),
        Some(&second.sha256)
    );
}

#[track_caller]
fn wait_until_ready(agent: &mut pintle_test_support::Agent, node: &Node) {
    agent.wait_for("ready", DEADLINE, |_| (node.status()["state"] == "ready").then_some(()));
}

/// Counts the live requests of a node again and again until it is told to stop; the most that it saw.
fn most_live_requests(node: &str, stop: &AtomicBool) -> usize {
    let prefix = format!("pintle-{node}-");
    let mut most = 0;
    while !stop.load(Ordering::Relaxed) {
        let live =
            SHARED.requests().into_iter().filter(|request| request.name.starts_with(&prefix) && request.is_live());
        most = most.max(live.count());
        // Each look is a process.
        std::thread::sleep(Duration::from_millis(500));
    }
    most
}

#[test]
fn c01_c15_c19_twenty_rotations_in_a_row() {
    let node = new_node("twenty");
    let mut agent = node.agent().argument("--keep-pairs=3").start();
    let first = eventually("the first pair", DEADLINE, || node.current());
    // A token that is spent is not needed again.
    std::fs::remove_file(node.bootstrap_kubeconfig()).expect("it was there");

    let mut seen: BTreeMap<String, Pair> = BTreeMap::from([(first.serial.clone(), first)]);
    let stop = AtomicBool::new(false);
    let most_live = std::thread::scope(|scope| {
        let live = scope.spawn(|| most_live_requests("twenty", &stop));
        agent.wait_for("twenty rotations", DEADLINE, |agent| {
            // At no moment may the pair be missing, torn or expired.
            let pair = node.current().expect("there is always a pair");
            assert!(pair.not_after > SystemTime::now(), "expired: {pair:?}\n{}", agent.output());
            seen.insert(pair.serial.clone(), pair);
            (seen.len() > ROTATIONS).then_some(())
        });
        stop.store(true, Ordering::Relaxed);
        live.join().expect("it ends")
    });
    assert!(most_live <= 1, "{most_live} live requests at once");

    let holding = |agent: &pintle_test_support::Agent| {
        let last = agent.log().into_iter().rfind(|line| line["event"] == "holding")?;
        seen.contains_key(last["serial"].as_str()?).then_some(())
    };
    agent.wait_for("the last rotation is complete", DEADLINE, |agent| {
        (agent.log().iter().filter(|line| line["event"] == "holding").count() > ROTATIONS).then_some(())?;
        holding(agent)
    });
    let log = agent.log();
    agent.kill();
    assert_eq!(node.pairs().len(), 3, "exactly the pairs that are to be kept");

    // Each by a new key.
    let mut keys: Vec<_> = seen.values().map(|pair| &pair.public_key).collect();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), seen.len());

    // By the log's own times, each was published before the one before had ended, and failed at nothing.
    let published: Vec<_> = log.iter().filter(|line| line["event"] == "pair_published").collect();
    let issued: Vec<_> = log.iter().filter(|line| line["event"] == "certificate_issued").collect();
    assert!(published.len() > ROTATIONS && published.len() == issued.len());
    for (before, next) in issued.iter().zip(published.iter().skip(1)) {
        assert!(time(&next["time"]) < time(&before["not_after"]), "{before} {next}");
    }

    // What the API server saw: one request for each certificate, each but the first made as the node, and each
    // certificate in use.
    let events = SHARED.audit_events();
    let prefix = "pintle-twenty-";
    let created: Vec<_> = events
        .iter()
        .filter(|event| event.verb == "create" && event.code == 201 && event.name.starts_with(prefix))
        .collect();
    assert_eq!(created.len(), issued.len());
    assert!(created[0].username.starts_with("system:bootstrap:"));
    for (index, event) in created.iter().enumerate().skip(1) {
        assert_eq!(event.username, "system:node:twenty", "request {index}");
    }
    for pair in seen.values() {
        let used = events.iter().any(|event| {
            event.username == "system:node:twenty" && event.certificate_sha256.as_ref() == Some(&pair.sha256)
        });
        assert!(used, "{} was never shown to the API server", pair.serial);
    }
    // From the next request on it speaks as the new certificate only: no certificate is used again after its successor.
    let used: Vec<_> = events
        .iter()
        // The log has a request when it is answered, and a watch when it has ended, which the server may notice late.
        .filter(|event| event.username == "system:node:twenty" && event.verb != "watch")
        .filter_map(|event| event.certificate_sha256.clone())
        .collect();
    let mut in_order = used.clone();
    in_order.dedup();
    let mut distinct = in_order.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(in_order.len(), distinct.len(), "an old certificate was used again");
}

#[test]
fn a_rotation_can_be_asked_for_and_switched_off() {
    let node = new_node("switched-off");
    let mut agent = node.agent().argument("--rotate-certificates=false").start();
    let off = agent.wait_for_log("it says so", DEADLINE, |line| line["event"] == "rotation_off");
    assert!(off["message"].as_str().is_some_and(|message| message.contains("not renewed")), "{off}");
    let held = node.current().expect("a pair");
    let answer = node.run(&["rotate", "--wait"]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    let asked_for = node.current().expect("a pair");
    assert_ne!(asked_for.public_key, held.public_key);
    assert!(answer.output.contains(&asked_for.serial), "{answer:?}");

    let status = node.status();
    assert_eq!(status["state"], "rotation-off");
    assert!(status["hint"].as_str().is_some_and(|hint| hint.contains("--rotate-certificates=true")), "{status}");
    let closes = time(&status["windowCloses"]);
    eventually("the window passes", DEADLINE, || {
        let now = SystemTime::now();
        if now < asked_for.not_after {
            // Read first, looked at afterwards: it may end in between.
            let current = node.current();
            assert!(SystemTime::now() >= asked_for.not_after || current.as_ref() == Some(&asked_for));
        }
        (now > closes).then_some(())
    });
    agent.kill();

    // Switched on again.
    let mut agent = node.agent().start();
    agent.wait_for_log("it rotates", DEADLINE, |line| line["event"] == "holding");
    assert_ne!(node.current().expect("a pair").serial, asked_for.serial);
}
