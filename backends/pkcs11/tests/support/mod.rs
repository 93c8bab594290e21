//! Throwaway tokens, each in a process of its own.
//!
//! A module reads its configuration from the environment and keeps its state per process, and the environment of a
//! running process is not changed here. So a test makes its token, then runs itself again in a child process that has
//! the right environment, and there the scenario takes place.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use pintle_backend_pkcs11::{Configuration, Pkcs11Backend};
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyId};

/// The label of the throwaway token.
pub(crate) const LABEL: &str = "pintle test";
/// Its user's PIN.
pub(crate) const PIN: &str = "31415926";
const SECURITY_OFFICER_PIN: &str = "27182818";
const DIRECTORY: &str = "PINTLE_TEST_TOKEN_DIRECTORY";
const BETWEEN: &str = "PINTLE_TEST_MODULE_BETWEEN";
const KRYOPTIC_SLOT: &str = "42";

/// The module that a scenario runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// SoftHSM 2, PKCS#11 2.40, from the distribution.
    SoftHsm,
    /// Kryoptic, PKCS#11 3.2, as tests/kryoptic/build builds it.
    Kryoptic,
}

/// A token of the scenario's own.
pub(crate) struct TestToken {
    pub(crate) kind: Kind,
    pub(crate) directory: PathBuf,
    pub(crate) module: PathBuf,
    between: Option<PathBuf>,
}

/// Runs `scenario` with a fresh token; `test` is the full name of the calling test.
pub(crate) fn run(kind: Kind, test: &str, scenario: fn(&TestToken)) {
    run_with(kind, test, Between::Nothing, scenario);
}

/// As [`run`], with every call of the module written down by OpenSC's pkcs11-spy.
pub(crate) fn run_spied(kind: Kind, test: &str, scenario: fn(&TestToken)) {
    run_with(kind, test, Between::Spy, scenario);
}

/// As [`run`], with another module between, which `build` makes and which finds the real one by the environment.
pub(crate) fn run_behind(kind: Kind, test: &str, build: fn() -> PathBuf, scenario: fn(&TestToken)) {
    run_with(kind, test, Between::Module(build), scenario);
}

/// What stands between the backend and the module.
#[derive(Clone, Copy)]
enum Between {
    Nothing,
    Spy,
    Module(fn() -> PathBuf),
}

fn run_with(kind: Kind, test: &str, between: Between, scenario: fn(&TestToken)) {
    let Some(module) = module(kind) else {
        assert_ne!(env::var("CI").as_deref(), Ok("true"), "no {kind:?} module, and CI must not skip");
        eprintln!("skipped: no {kind:?} module; install softhsm2, or run tests/kryoptic/build");
        return;
    };
    let libraries = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"];
    let between = match between {
        Between::Nothing => None,
        Between::Spy => Some(find(&libraries, "pkcs11-spy.so").expect("pkcs11-spy.so of the package opensc")),
        Between::Module(build) => Some(env::var_os(BETWEEN).map_or_else(build, PathBuf::from)),
    };
    if let Some(directory) = env::var_os(DIRECTORY) {
        scenario(&TestToken { kind, directory: directory.into(), module, between });
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let token = TestToken { kind, directory: directory.path().to_owned(), module, between };
    token.create();
    let status = token
        .environment(Command::new(env::current_exe().expect("this test")).args([test, "--exact", "--nocapture"]))
        .env(DIRECTORY, &token.directory)
        .status()
        .expect("this test started again");
    assert!(status.success(), "the scenario in its own process: {status}");
}

fn module(kind: Kind) -> Option<PathBuf> {
    match kind {
        Kind::SoftHsm => find(
            &["/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib64/pkcs11", "/usr/lib64/softhsm"],
            "libsofthsm2.so",
        ),
        Kind::Kryoptic => {
            let cache = env::var_os("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
            let cached = cache.map(|cache| cache.join("pintle/kryoptic-1.5.4/libkryoptic_pkcs11.so"));
            env::var_os("PINTLE_TEST_KRYOPTIC").map(PathBuf::from).or(cached).filter(|path| path.exists())
        }
    }
}

fn find(directories: &[&str], name: &str) -> Option<PathBuf> {
    directories.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.exists())
}

impl TestToken {
    fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("SOFTHSM2_CONF", self.directory.join("softhsm2.conf"))
            .env("KRYOPTIC_CONF", self.directory.join("kryoptic.conf"))
            .env("PKCS11SPY", &self.module)
            .env("PKCS11SPY_OUTPUT", self.directory.join("spy.log"))
            .env("PINTLE_TEST_REAL_MODULE", &self.module)
            .env("PINTLE_TEST_FAULT", self.fault_file())
            .env(BETWEEN, self.between.clone().unwrap_or_default())
            .env_remove("CREDENTIALS_DIRECTORY")
    }

    fn create(&self) {
        let tokens = self.tokens();
        let _ = fs::create_dir(&tokens);
        let softhsm = format!(
            "directories.tokendir={}\nobjectstore.backend=file\nlog.level=ERROR\nslots.removable=false\n",
            tokens.display()
        );
        fs::write(self.directory.join("softhsm2.conf"), softhsm).expect("softhsm2.conf");
        let kryoptic = format!(
            "[[slots]]\nslot = {KRYOPTIC_SLOT}\ndbtype = \"sqlite\"\ndbargs = \"{}\"\n",
            tokens.join("token.sql").display()
        );
        fs::write(self.directory.join("kryoptic.conf"), kryoptic).expect("kryoptic.conf");
        match self.kind {
            Kind::SoftHsm => {
                let arguments = ["--init-token", "--free", "--label", LABEL, "--pin", PIN, "--so-pin"];
                self.succeed(Command::new("softhsm2-util").args(arguments).arg(SECURITY_OFFICER_PIN));
            }
            Kind::Kryoptic => {
                let slot = ["--slot", KRYOPTIC_SLOT, "--so-pin", SECURITY_OFFICER_PIN];
                self.pkcs11_tool(&[&slot[..], &["--init-token", "--label", LABEL]].concat());
                let login = ["--login", "--login-type", "so", "--init-pin", "--pin", PIN];
                self.pkcs11_tool(&[&slot[..], &login].concat());
            }
        }
        self.write_pin(PIN);
    }

    /// Where the module keeps its tokens.
    pub(crate) fn tokens(&self) -> PathBuf {
        self.directory.join("tokens")
    }

    /// Takes the token's storage away.
    pub(crate) fn remove(&self) {
        fs::rename(self.tokens(), self.directory.join("elsewhere")).expect("the tokens moved away");
    }

    /// Puts it back.
    pub(crate) fn put_back(&self) {
        fs::rename(self.directory.join("elsewhere"), self.tokens()).expect("the tokens moved back");
    }

    /// Destroys the token and makes a new one with the same label.
    pub(crate) fn replace(&self) {
        fs::remove_dir_all(self.tokens()).expect("the tokens removed");
        self.create();
    }

    /// Initialises the token anew, which takes its user's PIN away.
    pub(crate) fn forget_pin(&self) {
        let token = ["--token-label", LABEL, "--so-pin", SECURITY_OFFICER_PIN];
        self.pkcs11_tool(&[&token[..], &["--init-token", "--label", LABEL]].concat());
    }

    /// Writes the PIN's file.
    pub(crate) fn write_pin(&self, pin: &str) {
        let path = self.pin_file();
        let _ = fs::remove_file(&path);
        fs::write(&path, format!("{pin}\n")).expect("the PIN's file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("its mode");
    }

    pub(crate) fn pin_file(&self) -> PathBuf {
        self.directory.join("pin")
    }

    /// How often C_Login was called, as the spy wrote it down.
    pub(crate) fn logins(&self) -> u64 {
        let log = fs::read(self.directory.join("spy.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).lines().filter(|line| line.ends_with(": C_Login")).count() as u64
    }

    fn fault_file(&self) -> PathBuf {
        self.directory.join("fault")
    }

    /// Has the faulty module answer with `code` the next `times` times at this place.
    pub(crate) fn fault(&self, place: &str, code: u64, times: u32) {
        fs::write(self.fault_file(), format!("{place} {code:#x} {times}\n")).expect("the fault written");
    }

    /// How many times it still will.
    pub(crate) fn faults_left(&self) -> u32 {
        let text = fs::read_to_string(self.fault_file()).expect("the fault");
        text.split_whitespace().nth(2).and_then(|times| times.parse().ok()).expect("a number")
    }

    /// A configuration for this token, which looks for a token that is gone more often than an agent does.
    pub(crate) fn configuration(&self) -> Configuration {
        let path = self.between.as_ref().unwrap_or(&self.module);
        let (label, pin) = (LABEL.replace(' ', "%20"), self.pin_file());
        let uri = format!("pkcs11:token={label}?module-path={}&pin-source=file:{}", path.display(), pin.display());
        Configuration { reload_interval: Duration::from_millis(200), ..Configuration::new(uri) }
    }

    pub(crate) fn open(&self) -> Pkcs11Backend {
        Pkcs11Backend::open(self.configuration()).expect("a backend")
    }

    /// Another program at work on the token, logged in.
    pub(crate) fn pkcs11_tool_logged_in(&self, arguments: &[&str]) -> Output {
        self.pkcs11_tool(&[&["--token-label", LABEL, "--login", "--pin", PIN], arguments].concat())
    }

    /// Another program that tries a wrong PIN.
    pub(crate) fn refuse_login(&self, pin: &str) {
        let mut command = Command::new("pkcs11-tool");
        command.arg("--module").arg(&self.module).args([
            "--token-label",
            LABEL,
            "--login",
            "--pin",
            pin,
            "--list-objects",
        ]);
        let output = self.environment(&mut command).output().expect("pkcs11-tool started");
        assert!(!output.status.success(), "the PIN was accepted");
    }

    fn pkcs11_tool(&self, arguments: &[&str]) -> Output {
        self.succeed(Command::new("pkcs11-tool").arg("--module").arg(&self.module).args(arguments))
    }

    fn succeed(&self, command: &mut Command) -> Output {
        let output = self.environment(command).output().expect("the program started");
        assert!(
            output.status.success(),
            "{command:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        output
    }

    /// Runs a test of this binary in another process, on the same token.
    pub(crate) fn start_again(&self, test: &str, name: &str, value: &str) -> std::process::Child {
        self.environment(Command::new(env::current_exe().expect("this test")).args([test, "--exact", "--nocapture"]))
            .env(DIRECTORY, &self.directory)
            .env(name, value)
            .spawn()
            .expect("this test started again")
    }
}

/// The id with this text.
pub(crate) fn id(text: &str) -> KeyId {
    KeyId::new(text.as_bytes()).expect("an id")
}

/// Asserts the error's kind, and answers the error.
pub(crate) fn refused<T: std::fmt::Debug>(answer: Result<T, BackendError>, kind: BackendErrorKind) -> BackendError {
    let error = answer.expect_err("an error");
    assert_eq!(error.kind, kind, "{error}");
    assert!(!error.detail.contains('\n') && !format!("{error:?}").contains(PIN), "{error:?}");
    error
}

/// Repeats `call` until the backend is available again.
pub(crate) fn when_available<T>(mut call: impl FnMut() -> Result<T, BackendError>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match call() {
            Ok(result) => return result,
            Err(error) => {
                assert_eq!(error.kind, BackendErrorKind::Unavailable, "{error}");
                assert!(Instant::now() < deadline, "still {error}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
