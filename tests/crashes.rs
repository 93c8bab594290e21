//! Power cuts, torn files and full disks: the agent goes on, and nothing is lost.

mod embedded;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use embedded::{DEADLINE, Embedded, public_key_of};
use pintle_test_support::{
    Agent, AuditEvent, BootstrapCredential, ControlPlane, Node, Options, Pair, ProcessCommand, SubmittedRequest,
    TestProcess, eventually, serial_text,
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

/// Zeros of the same length, as some file systems leave them after a power cut.
fn tear(path: &Path) {
    let length = fs::metadata(path).expect("it exists").len();
    fs::write(path, vec![0; usize::try_from(length).expect("a small file")]).expect("writable");
}

#[test]
fn c02_torn_files_are_survived() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "torn");
    let first = node.current().expect("a pair");
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), first.serial);
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    agent.kill();
    let second = node.current().expect("a pair");
    let current = || fs::canonicalize(node.current_path()).expect("a link");

    // The newest pair: the journal has its certificate, and the backend its key.
    tear(&current());
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), second.serial);
    assert_eq!(node.current(), Some(second.clone()));
    assert!(node.keys().len() <= 2);

    // The same under a running agent, and then the whole directory.
    tear(&current());
    eventually("it is written again", DEADLINE, || (node.current()? == second).then_some(()));
    fs::remove_dir_all(node.cert_dir()).expect("removed");
    eventually("it is written again", DEADLINE, || (node.current()? == second).then_some(()));

    // The journal alone.
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    let third = node.current().expect("a pair");
    agent.kill();
    tear(&node.journal());
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), third.serial);
    agent.kill();
    assert_eq!(control_plane.requests_of("torn").len(), 3, "nothing was requested for all that");

    // The newest pair and the journal: the previous pair is still good.
    tear(&node.journal());
    tear(&current());
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), second.serial);
    assert_eq!(node.current(), Some(second));
    agent.kill();
    assert_eq!(control_plane.requests_of("torn").len(), 3);

    // Everything: only the bootstrap credential is left. The keys of before may be anybody's, so they are left alone.
    let left = node.keys();
    tear(&node.journal());
    node.pairs().iter().for_each(|pair| tear(pair));
    let mut agent = node.agent().start();
    assert_eq!(Some(wait_until_holding(&mut agent)), node.current().map(|pair| pair.serial));
    assert_eq!(control_plane.requests_of("torn").len(), 4);
    assert!(left.iter().all(|key| node.keys().contains(key)), "{left:?} and now {:?}", node.keys());
}

/// Puts somebody else's private key into a pair.
fn exchange_key(path: &Path) {
    let pair = fs::read_to_string(path).expect("readable");
    let key = pair.find("-----BEGIN PRIVATE KEY").expect("a key");
    let other = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    fs::write(path, format!("{}{other}", &pair[..key])).expect("writable");
}

#[test]
fn c02_a_pair_with_somebody_elses_key_is_not_used() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "exchanged");
    let first = node.current().expect("a pair");
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), first.serial);
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    let (second, good) = (node.current().expect("a pair"), fs::read(node.current_path()).expect("readable"));
    let current = || fs::canonicalize(node.current_path()).expect("a link");

    // Under a running agent, and at a start: the key is still in the backend.
    exchange_key(&current());
    eventually("it is written again", DEADLINE, || (fs::read(node.current_path()).ok()? == good).then_some(()));
    agent.kill();
    exchange_key(&current());
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), second.serial);
    assert_eq!(fs::read(node.current_path()).expect("readable"), good);
    agent.kill();

    // With nothing but the pairs, the previous one is still good, and then there is none.
    exchange_key(&current());
    fs::remove_dir_all(node.state_dir()).expect("removed");
    let mut agent = node.agent().start();
    assert_eq!(wait_until_holding(&mut agent), first.serial);
    assert_eq!(control_plane.requests_of("exchanged").len(), 2);
    agent.kill();
    node.pairs().iter().for_each(|pair| exchange_key(pair));
    fs::remove_dir_all(node.state_dir()).expect("removed");
    node.agent().start().wait_for_log("a new certificate", DEADLINE, |line| {
        line["event"] == "holding" && line["serial"] != first.serial && line["serial"] != second.serial
    });
    assert_eq!(control_plane.requests_of("exchanged").len(), 3);
}

/// As a kubelet does that rotates beside us: another file, and the link flipped.
#[test]
fn c46_a_pair_that_something_else_writes_is_named_and_held() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "beside");
    let other = enrolled(&control_plane, "beside");
    let own_keys = node.keys();
    let mut agent = node.agent().start();
    wait_until_holding(&mut agent);
    let theirs = other.current().expect("a pair");
    let (file, link) = (node.cert_dir().join("kubelet-client-by-kubelet.pem"), node.cert_dir().join("next"));
    fs::copy(other.current_path(), &file).expect("copied");
    std::os::unix::fs::symlink(&file, &link).expect("linked");
    fs::rename(&link, node.current_path()).expect("flipped");
    agent.wait_for_log("it is named", DEADLINE, |line| {
        line["event"] == "credential_adopted" && line["serial"] == *theirs.serial
    });
    agent.wait_for_log("it is proven", DEADLINE, |line| {
        line["event"] == "identity_proven" && line["serial"] == *theirs.serial
    });
    eventually("the key before is destroyed", DEADLINE, || {
        own_keys.iter().all(|key| !node.keys().contains(key)).then_some(())
    });
    assert_eq!(node.current().expect("a pair"), theirs);
    assert_eq!(node.run(&["rotate", "--wait"]).code, Some(0));
    agent.process().assert_running();
}

#[test]
fn c09_c10_a_plain_file_is_adopted_and_a_lost_directory_made_again() {
    let control_plane = Embedded::signing_for(HOUR);
    let node = enrolled(&control_plane, "moved");
    let pair = node.current().expect("a pair");
    let content = fs::read(node.current_path()).expect("readable");

    node.pairs().iter().for_each(|pair| fs::remove_file(pair).expect("removed"));
    fs::remove_file(node.current_path()).expect("removed");
    fs::write(node.current_path(), &content).expect("written");
    assert_eq!(node.enrol(DEADLINE).0, Some(0));
    assert!(node.current_path().is_symlink());
    assert_eq!((node.current(), node.pairs().len()), (Some(pair.clone()), 1));

    fs::remove_dir_all(node.cert_dir()).expect("removed");
    assert_eq!(node.enrol(DEADLINE).0, Some(0));
    assert_eq!(node.current(), Some(pair.clone()));
    assert_eq!(control_plane.requests_of("moved").len(), 1);

    // Both directories on a tmpfs, and a reboot.
    fs::remove_dir_all(node.cert_dir()).expect("removed");
    fs::remove_dir_all(node.state_dir()).expect("removed");
    assert_eq!(node.enrol(DEADLINE).0, Some(0));
    assert_ne!(node.current().expect("a pair").public_key, pair.public_key);
    assert_eq!((control_plane.requests_of("moved").len(), node.keys().len()), (2, 1));
}

/// An agent one of whose directories is a tmpfs of 64 KiB, which goes with it.
struct Cramped<'a> {
    node: &'a Node,
    directory: PathBuf,
    process: TestProcess,
}

impl<'a> Cramped<'a> {
    fn start(node: &'a Node, directory: PathBuf) -> Self {
        let script = r#"mkdir -p "$0" && mount -t tmpfs -o size=64k,mode=700 tmpfs "$0" && exec "$@""#;
        let process = ProcessCommand::new("/bin/sh", node.scratch().join("cramped.log"))
            .private_mounts()
            .arguments(["-c", script])
            .argument(&directory)
            .arguments([env!("CARGO_BIN_EXE_pintle"), "run"])
            .arguments(node.flags())
            .start();
        Self { node, directory, process }
    }

    /// A path as the agent sees it.
    fn seen(&self, path: &Path) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.process.id())).join(path.strip_prefix("/").expect("absolute"))
    }

    fn fill(&self) {
        let mut file = fs::File::create(self.seen(&self.directory.join("filler"))).expect("created");
        while file.write_all(&[1; 512]).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.seen(&self.directory.join("filler"))).expect("removed");
    }

    fn rotate(&self) {
        assert!(self.pintle("rotate").status.success());
    }

    /// Runs a command beside the agent, where it sees the same directory.
    fn pintle(&self, command: &str) -> std::process::Output {
        let target = format!("--target={}", self.process.id());
        Command::new("nsenter")
            .args([target.as_str(), "--mount", env!("CARGO_BIN_EXE_pintle"), command])
            .args(self.node.flags())
            .output()
            .expect("nsenter starts")
    }

    /// Waits until the log has so many events of a name whose line contains the words.
    fn wait_for(&mut self, event: &str, words: &str, count: usize) {
        eventually(event, DEADLINE, || {
            assert!(self.process.is_running(), "{}", self.process.output());
            let event = format!("\"event\":\"{event}\"");
            let lines = self.process.output();
            let found = lines.lines().filter(|line| line.contains(&event) && line.contains(words)).count();
            (found >= count).then_some(())
        });
    }
}

#[test]
fn c29_a_full_disk_costs_no_certificate() {
    let control_plane = Embedded::signing_for(HOUR);
    for which in ["pki", "state"] {
        let node = new_node(&format!("full-{which}"));
        node.give_bootstrap(control_plane.bootstrap_kubeconfig());
        let mut cramped = Cramped::start(&node, node.scratch().join(which));
        cramped.wait_for("holding", "", 1);
        cramped.fill();
        cramped.rotate();
        if which == "pki" {
            cramped.wait_for("certificate_issued", "", 2);
            cramped.wait_for("failed", "cannot be written", 2);
            assert_eq!(control_plane.requests_of(node.name()).len(), 2);
        } else {
            cramped.wait_for("journal_not_saved", "", 2);
            assert_eq!(control_plane.requests_of(node.name()).len(), 1, "nothing is done that is not written down");
            let status = cramped.pintle("status").stdout;
            assert!(String::from_utf8_lossy(&status).contains("the journal cannot be saved"), "{status:?}");
        }
        cramped.make_room();
        cramped.wait_for("holding", "", 2);
        let requests = control_plane.requests_of(node.name());
        assert_eq!(requests.len(), 2, "{which}");
        let current = fs::read_link(cramped.seen(&node.current_path())).expect("a link");
        let held = Pair::read(&cramped.seen(&node.cert_dir()).join(current)).expect("a pair");
        assert!(requests.iter().any(|request| public_key_of(request) == held.public_key));
    }
}

#[test]
fn c29_what_was_issued_while_the_journal_could_not_be_written_is_kept() {
    let control_plane = Embedded::start(pintle::demo::control_plane::Options {
        approval_delay: Duration::from_secs(3),
        ..pintle::demo::control_plane::Options::default()
    });
    let node = new_node("full-meanwhile");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let mut cramped = Cramped::start(&node, node.state_dir());
    cramped.wait_for("request_pending", "", 1);
    cramped.fill();
    cramped.wait_for("certificate_issued", "", 1);
    cramped.wait_for("journal_not_saved", "", 1);
    cramped.make_room();
    cramped.wait_for("holding", "", 1);
    let requests = control_plane.requests_of("full-meanwhile");
    assert_eq!(requests.len(), 1);
    assert_eq!(node.current().map(|pair| pair.public_key), Some(public_key_of(&requests[0])));
}
