//! A module in a child process: whatever it does, the caller gets a response in time, with the cause of a failure.

mod agent;
mod token;
mod users;

use std::fs;
use std::time::Duration;

use pintle::config::ProcessIsolation;
use pintle::keys::ModuleConfiguration;
use pintle::keys::isolation::{Deadlines, IsolatedBackend};
use pintle_plugins_api::conformance::{self, Harness, Situation};
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, PublicKey, SignatureScheme};
use pintle_test_support::eventually;
use token::{PIN, Token};

const SCHEME: SignatureScheme = SignatureScheme::EcdsaP256Sha256;
const DEADLINE: Duration = Duration::from_secs(30);

fn id(text: &str) -> KeyId {
    KeyId::new(text.as_bytes()).expect("an id")
}

fn key(backend: &mut dyn KeyBackend, text: &str) -> PublicKey {
    backend.generate(&id(text), KeyAlgorithm::EcdsaP256).expect("a key")
}

fn unavailable<T: std::fmt::Debug>(answer: Result<T, BackendError>, words: &[&str]) {
    let error = answer.expect_err("an error");
    assert_eq!(error.kind, BackendErrorKind::Unavailable, "{error}");
    for word in words {
        assert!(error.detail.contains(word), "{error} does not say {word:?}");
    }
    assert!(!error.detail.contains('\n') && !error.detail.contains(PIN), "{error}");
}

struct Isolated<'a> {
    token: &'a Token,
}

impl Harness for Isolated<'_> {
    fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError> {
        Ok(Box::new(self.token.open()))
    }

    fn algorithms(&self) -> Vec<KeyAlgorithm> {
        KeyAlgorithm::ALL.to_vec()
    }

    fn arrange(&mut self, situation: Situation) -> bool {
        if situation == Situation::WrongPin {
            self.token.write_pin("99999999");
        }
        situation == Situation::WrongPin
    }

    fn restore(&mut self) {
        self.token.write_pin(PIN);
    }

    fn pin_attempts(&mut self) -> Option<u64> {
        Some(self.token.logins())
    }
}

#[test]
fn c17_softhsm_conforms_in_a_child() {
    let token = Token::new();
    let report = conformance::run(&mut Isolated { token: &token });
    println!("{report}");
    report.assert_passed();
}

#[test]
fn a_module_that_segfaults_is_reported_and_restarted() {
    let token = Token::new();
    let mut backend = token.open();
    let public_key = key(&mut backend, "crash");
    token.fault("sign", "segfault");
    unavailable(
        backend.sign(&id("crash"), SCHEME, b"message"),
        &["backend child was killed by signal 11 (SIGSEGV)", "in sign", "about to fail"],
    );
    // Restarted immediately the first time, and then after a wait, during which the cause is still reported.
    unavailable(backend.sign(&id("crash"), SCHEME, b"message"), &["SIGSEGV"]);
    unavailable(backend.sign(&id("crash"), SCHEME, b"message"), &["SIGSEGV", "restarting in 1 s"]);
    token.clear_fault();
    let signature =
        eventually("the module is restarted", DEADLINE, || backend.sign(&id("crash"), SCHEME, b"message").ok());
    assert!(public_key.verifies(SCHEME, b"message", &signature));
    token.fault("sign", "exit");
    unavailable(backend.sign(&id("crash"), SCHEME, b"message"), &["exited with code 3", "in sign"]);
}

#[test]
fn a_module_that_hangs_is_killed_at_the_deadline() {
    let token = Token::new();
    let deadlines = Deadlines { generate: Duration::from_secs(20), call: Duration::from_secs(1) };
    let mut backend = token.open_with_deadlines(deadlines);
    let public_key = key(&mut backend, "hang");
    token.fault("sign", "hang");
    let process = token.process().expect("a child");
    unavailable(backend.sign(&id("hang"), SCHEME, b"message"), &["did not answer sign within 1s and was killed"]);
    assert!(rustix::process::test_kill_process(process).is_err(), "the child is gone");
    token.clear_fault();
    let signature = backend.sign(&id("hang"), SCHEME, b"message").expect("the next child signs");
    assert!(public_key.verifies(SCHEME, b"message", &signature));
}

#[test]
fn a_child_killed_during_generate_leaves_no_orphan() {
    let token = Token::new();
    for place in ["before-generate", "after-generate"] {
        let mut backend = token.open();
        assert!(backend.list().expect("listed").is_empty());
        token.fault(place, "hang");
        let killed = std::thread::scope(|scope| {
            let generating = scope.spawn(|| backend.generate(&id("half"), KeyAlgorithm::EcdsaP256));
            std::thread::sleep(Duration::from_millis(300));
            token.kill_child();
            generating.join().expect("no panic")
        });
        unavailable(killed, &["was killed by signal 9 (SIGKILL)", "in generate"]);
        token.clear_fault();
        // What the agent does next: it repeats the call with the same id.
        let first = key(&mut backend, "half");
        assert_eq!(key(&mut backend, "half"), first);
        assert_eq!(backend.list().expect("listed"), [id("half")]);
        let signature = backend.sign(&id("half"), SCHEME, b"message").expect("signed");
        assert!(first.verifies(SCHEME, b"message", &signature));
        backend.delete(&id("half")).expect("deleted");
        assert!(backend.list().expect("listed").is_empty());
    }
}

#[test]
fn a_child_that_exits_between_calls_fails_no_call() {
    let token = Token::new();
    let mut backend = token.open();
    key(&mut backend, "idle");
    token.kill_child();
    token.await_death();
    backend.sign(&id("idle"), SCHEME, b"message").expect("the next child signs");
}

#[test]
fn c27_a_wrong_pin_is_tried_once_however_often_the_child_is_restarted() {
    let token = Token::new();
    token.write_pin("99999999");
    let locked = |backend: &mut IsolatedBackend| {
        let error = backend.list().expect_err("a wrong PIN");
        assert_eq!(error.kind, BackendErrorKind::Locked, "{error}");
        assert!(!format!("{error:?}").contains("99999999"));
    };
    let mut backend = token.open();
    for _ in 0..3 {
        locked(&mut backend);
    }
    token.kill_child();
    token.await_death();
    for _ in 0..3 {
        locked(&mut backend);
    }
    drop(backend);
    // Another backend of the same process does not try it either, as after a failed start.
    let mut backend = token.open();
    locked(&mut backend);
    assert_eq!(token.logins(), 1);
    token.write_pin(PIN);
    backend.list().expect("the right PIN is tried at once");
    assert_eq!(token.logins(), 2);
}

#[test]
fn the_child_has_dropped_its_privileges() {
    let token = Token::new();
    // Open in this process and, without O_CLOEXEC, in its children.
    let leaked = fs::File::open("/dev/null").expect("opened");
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).expect("inheritable");
    let mut backend = token.open();
    key(&mut backend, "hardened");
    let process = format!("/proc/{}", token.process().expect("a child").as_raw_nonzero());
    let read = |name: &str| String::from_utf8_lossy(&fs::read(format!("{process}/{name}")).expect(name)).into_owned();
    assert_eq!(read("cmdline"), "pintle\0plugin-host\0token\0");
    for (name, value) in [("NoNewPrivs", "1"), ("Umask", "0077")] {
        let status = read("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        assert_eq!(line.map(str::trim), Some(value), "{name}");
    }
    // At most CAP_DAC_OVERRIDE and CAP_IPC_LOCK, if this process has them itself.
    let status = read("status");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let line = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(':')).expect(set);
        let capabilities = u64::from_str_radix(line.trim(), 16).expect("a number");
        if set != "CapBnd" || rustix::process::geteuid().is_root() {
            assert_eq!(capabilities & !(1 << 1 | 1 << 14), 0, "{set}: {capabilities:#x}");
        }
    }
    let limits = read("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a limit");
    assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
    let stat = read("stat");
    let fields: Vec<_> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    assert_eq!(fields[3], process.trim_start_matches("/proc/"), "it leads its own session");
    let targets: Vec<_> = fs::read_dir(format!("{process}/fd"))
        .expect("descriptors")
        .map(|entry| fs::read_link(entry.expect("an entry").path()).expect("a link").display().to_string())
        .collect();
    let of = |prefix: &str| targets.iter().filter(|target| target.starts_with(prefix)).count();
    assert_eq!((of("socket:"), of("pipe:")), (1, 1), "{targets:?}");
    // Standard input and output; an inherited descriptor would be the third.
    assert_eq!(of("/dev/null"), 2, "{targets:?}");
    drop(leaked);
    // It exits when its backend is dropped.
    let id = token.process().expect("a child");
    drop(backend);
    assert!(rustix::process::test_kill_process(id).is_err());
}

#[test]
fn the_modules_error_is_reported_when_it_cannot_be_opened() {
    let module =
        ModuleConfiguration::Plugin { library: "no_such_plugin".to_owned(), configuration: "{}".to_owned(), pin: true };
    let mut backend = IsolatedBackend::new("absent", module, ProcessIsolation::default())
        .expect("a backend")
        .with_program(env!("CARGO_BIN_EXE_pintle"));
    for _ in 0..3 {
        unavailable(backend.list(), &["there is no plugin"]);
    }
    let module = ModuleConfiguration::Plugin { library: "x".to_owned(), configuration: "{}".to_owned(), pin: true };
    let mut backend = IsolatedBackend::new("no program", module, ProcessIsolation::default())
        .expect("a backend")
        .with_program("/no/such/program");
    unavailable(backend.list(), &["cannot start a backend child"]);
}

#[test]
fn a_child_runs_as_the_configured_user() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can run a child as another user");
        return;
    }
    let token = Token::new();
    token.give_to(65534);
    let isolation = ProcessIsolation {
        user: Some("nobody".to_owned()),
        group: Some("tss".to_owned())
            .filter(|_| fs::read_to_string("/etc/group").is_ok_and(|file| file.contains("\ntss:"))),
        environment: token.environment(),
    };
    let mut backend = IsolatedBackend::new("token", token.module(), isolation)
        .expect("a backend")
        .with_program(env!("CARGO_BIN_EXE_pintle"));
    let public_key = key(&mut backend, "user");
    let process = token.process().expect("a child").as_raw_nonzero();
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("a status");
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    assert_eq!(line("Uid:"), "65534\t65534\t65534\t65534");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(line(set), "0000000000000000", "{set}");
    }
    assert!(line("Groups:").is_empty(), "the agent's other groups are not kept: {status}");
    let signature = backend.sign(&id("user"), SCHEME, b"message").expect("signed");
    assert!(public_key.verifies(SCHEME, b"message", &signature));
}
