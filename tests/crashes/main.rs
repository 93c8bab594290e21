//! Power cuts, torn files and full disks: the agent goes on, and nothing is lost.

#[path = "../embedded/mod.rs"]
mod embedded;
mod full_disk;
mod torn_files;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use embedded::{DEADLINE, Embedded, public_key_of};
use pintle_test_support::{
    Agent, AuditEvent, BootstrapCredential, ControlPlane, Node, Options, SubmittedRequest, serial_text,
};

const HOUR: u64 = 3600;

fn new_node(name: &str) -> Node {
    Node::new(env!("CARGO_BIN_EXE_pintle"), name)
}

fn enrolled(control_plane: &Embedded, name: &str) -> Node {
    let node = new_node(name);
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let (code, output) = node.enrol(DEADLINE);
    assert_eq!(code, Some(0), "{output}");
    node
}

fn wait_until_holding(agent: &mut Agent) -> String {
    let line = agent.wait_for_log("a certificate is held", DEADLINE, |line| line["event"] == "holding");
    line["serial"].as_str().unwrap_or_default().to_owned()
}

/// Numbers that the seed determines (xorshift).
struct Numbers(u64);

impl Numbers {
    /// From PINTLE_TEST_SEED, or from the clock; printed, so that a failure can be repeated.
    fn new() -> Self {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos();
        let given = std::env::var("PINTLE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or(u64::from(clock)) | 1;
        println!("PINTLE_TEST_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, bound: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let bound = u64::try_from(bound.as_micros()).unwrap_or(u64::MAX).max(1);
        Duration::from_micros(self.0 % bound)
    }
}

/// Ten rotations, each cut off by SIGKILL at a random moment and then gone on with.
fn rotate_and_kill(node: &Node) {
    let mut numbers = Numbers::new();
    let mut agent = node.agent().start();
    wait_until_holding(&mut agent);
    let started = Instant::now();
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    let rotation = started.elapsed();
    for _ in 0..10 {
        let before = node.current().expect("there is always a pair");
        assert_eq!(node.run(&["rotate"]).code, Some(0));
        // The moment of the power cut, and not a condition that could be waited for.
        std::thread::sleep(numbers.below(rotation * 3 / 2));
        agent.kill();
        assert!(node.current().is_some(), "the link names a whole pair at every moment");
        agent = node.agent().start();
        wait_until_holding(&mut agent);
        if node.current().is_some_and(|current| current.serial == before.serial) {
            // Killed before it was written down that a rotation was asked for.
            assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
        }
        assert_ne!(node.current().expect("a pair").serial, before.serial);
        assert!(node.keys().len() <= 2, "{:?}", node.keys());
    }
    // The last one may finish what it is about: a killed agent may leave a file that the next one writes over.
    agent.terminate(DEADLINE);
}

/// What must be true after any number of crashes: one request for each key, each certificate put to use, no files left.
fn assert_nothing_lost(node: &Node, request_keys: &[Vec<u8>], issued: &BTreeSet<String>) {
    let distinct: BTreeSet<_> = request_keys.iter().collect();
    assert_eq!(distinct.len(), request_keys.len(), "a second request for the same key");
    let log = fs::read_to_string(node.scratch().join("agent.log")).expect("readable");
    let published: BTreeSet<String> = log
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|line| line["event"] == "pair_published")
        .filter_map(|line| Some(line["serial"].as_str()?.to_owned()))
        .collect();
    assert_eq!(&published, issued, "published, and issued");
    assert_eq!(node.pairs().len(), 2, "{:?}", node.pairs());
    assert_eq!(node.keys().len(), 1, "{:?}", node.keys());
    let names = |directory: PathBuf| -> Vec<_> {
        fs::read_dir(directory).expect("readable").filter_map(Result::ok).map(|entry| entry.file_name()).collect()
    };
    for name in names(node.state_dir()).into_iter().chain(names(node.cert_dir())) {
        assert!(!name.to_string_lossy().starts_with('.'), "{name:?} was left behind");
    }
}

#[test]
fn killed_at_ten_moments_of_ten_rotations_it_goes_on() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "killed");
    rotate_and_kill(&node);
    let requests = control_plane.requests_of("killed");
    let issued = requests.iter().filter_map(|request| {
        let chain = &request.status.as_ref()?.certificate.as_ref()?.0;
        let leaf = pem::parse(chain).ok()?;
        let (_, leaf) = x509_parser::parse_x509_certificate(leaf.contents()).ok()?;
        Some(serial_text(leaf.raw_serial()))
    });
    assert_nothing_lost(&node, &requests.iter().map(public_key_of).collect::<Vec<_>>(), &issued.collect());
}

#[test]
fn killed_against_the_real_control_plane_it_goes_on() {
    let control_plane = ControlPlane::start(Options::default());
    let node = new_node("killed");
    let bootstrap = control_plane.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
    node.give_bootstrap(fs::read(bootstrap).expect("readable"));
    rotate_and_kill(&node);
    let decode = |text: &str| {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.decode(text).expect("base64");
        pem::parse(text).expect("PEM").into_contents()
    };
    let requests = control_plane.requests();
    let keys: Vec<_> = requests
        .iter()
        .map(|request| {
            use x509_parser::prelude::FromDer as _;
            let request = decode(&request.request);
            let parsed = x509_parser::certification_request::X509CertificationRequest::from_der(&request);
            parsed.expect("PKCS#10").1.certification_request_info.subject_pki.raw.to_vec()
        })
        .collect();
    let issued = requests.iter().filter_map(|request| {
        let leaf = decode(request.certificate.as_deref()?);
        let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).ok()?;
        Some(serial_text(leaf.raw_serial()))
    });
    assert_nothing_lost(&node, &keys, &issued.collect());
    assert_each_created_once(&control_plane.audit_events(), &requests);
}

/// What the API server has seen: no other request was ever asked for than those that are there, and none made twice. A
/// request's name is a hash of its key and attempt.
///
/// Not each of them was answered 201. When a client is killed over its create, the API server does not wait for etcd any
/// longer and notes 504, "context canceled" (`FinishRequest` in k8s.io/apiserver), or whatever error etcd's client then
/// gives, whether or not etcd stores the request. If it does, the agent's next attempt finds it there.
fn assert_each_created_once(events: &[AuditEvent], requests: &[SubmittedRequest]) {
    let creates = |is_meant: fn(u64) -> bool| {
        let creates = events
            .iter()
            .filter(|event| (event.verb.as_str(), event.resource.as_str()) == ("create", "certificatesigningrequests"));
        creates.filter(|event| is_meant(event.code)).map(|event| event.name.as_str()).collect::<Vec<_>>()
    };
    let created = creates(|code| code == 201);
    let distinct: BTreeSet<_> = created.iter().copied().collect();
    assert_eq!(distinct.len(), created.len(), "a request was made twice: {created:?}");
    let mut perhaps_created: BTreeSet<_> = creates(|code| code == 201 || code >= 500).into_iter().collect();
    // Cut off before the API server had read which one it is.
    perhaps_created.remove("");
    let names: BTreeSet<_> = requests.iter().map(|request| request.name.as_str()).collect();
    assert_eq!(perhaps_created, names, "asked for, and there");
}
