//! A temporary SoftHSM token behind a module that injects faults.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pintle::config::ProcessIsolation;
use pintle::keys::ModuleConfiguration;
use pintle::keys::isolation::{Deadlines, IsolatedBackend};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) const PIN: &str = "31415926";

pub(crate) struct Token {
    directory: tempfile::TempDir,
}

impl Token {
    pub(crate) fn new() -> Self {
        let token = Self { directory: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory") };
        fs::create_dir(token.path("tokens")).expect("a directory for tokens");
        let configuration = format!("directories.tokendir={}\nlog.level=ERROR\n", token.path("tokens").display());
        fs::write(token.path("softhsm2.conf"), configuration).expect("softhsm2.conf");
        let status = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", "isolated", "--pin", PIN, "--so-pin", "27182818"])
            .env("SOFTHSM2_CONF", token.path("softhsm2.conf"))
            .stdout(Stdio::null())
            .status()
            .expect("softhsm2-util starts (Debian package softhsm2)");
        assert!(status.success());
        token.write_pin(PIN);
        token
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The real module.
    pub(crate) fn softhsm() -> PathBuf {
        [
            "/usr/lib/softhsm",
            "/usr/lib/x86_64-linux-gnu/softhsm",
            "/usr/lib/aarch64-linux-gnu/softhsm",
            "/usr/lib64/pkcs11",
        ]
        .iter()
        .map(|directory| Path::new(directory).join("libsofthsm2.so"))
        .find(|path| path.exists())
        .expect("libsofthsm2.so (Debian package softhsm2)")
    }

    /// The module that injects faults.
    pub(crate) fn faulty_module() -> PathBuf {
        pintle_test_support::faulty_module(Path::new(env!("CARGO_TARGET_TMPDIR")))
    }

    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let path = |name| self.path(name).display().to_string();
        [
            ("SOFTHSM2_CONF", path("softhsm2.conf")),
            ("PINTLE_TEST_REAL_MODULE", Self::softhsm().display().to_string()),
            ("PINTLE_TEST_FAULT", path("fault")),
            ("PINTLE_TEST_LOGINS", path("logins")),
            ("PINTLE_TEST_PROCESS", path("process")),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    pub(crate) fn module(&self) -> ModuleConfiguration {
        ModuleConfiguration::Pkcs11 {
            uri: "pkcs11:token=isolated".to_owned(),
            module: Some(Self::faulty_module()),
            pin_file: Some(self.path("pin")),
        }
    }

    pub(crate) fn open(&self) -> IsolatedBackend {
        let isolation = ProcessIsolation { environment: self.environment(), ..ProcessIsolation::default() };
        IsolatedBackend::new("token", self.module(), isolation)
            .expect("a backend")
            .with_program(env!("CARGO_BIN_EXE_pintle"))
    }

    pub(crate) fn open_with_deadlines(&self, deadlines: Deadlines) -> IsolatedBackend {
        self.open().with_deadlines(deadlines)
    }

    /// Replaces the PIN file.
    pub(crate) fn write_pin(&self, pin: &str) {
        let path = self.path("pin");
        let _ = fs::remove_file(&path);
        fs::write(&path, format!("{pin}\n")).expect("the PIN's file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("its mode");
    }

    /// Changes the user PIN of the token.
    pub(crate) fn change_pin(&self, new: &str) {
        let status = Command::new("pkcs11-tool")
            .arg("--module")
            .arg(Self::softhsm())
            .args(["--token-label", "isolated", "--login", "--pin", PIN, "--change-pin", "--new-pin", new])
            .env("SOFTHSM2_CONF", self.path("softhsm2.conf"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("pkcs11-tool starts (Debian package opensc)");
        assert!(status.success());
    }

    /// Makes the module inject this fault from now on.
    pub(crate) fn fault(&self, place: &str, action: &str) {
        fs::write(self.path("fault.new"), format!("{place} {action}\n")).expect("the fault");
        fs::rename(self.path("fault.new"), self.path("fault")).expect("the fault");
    }

    pub(crate) fn clear_fault(&self) {
        fs::remove_file(self.path("fault")).expect("there was a fault");
    }

    /// Changes the owner of all files to this user.
    pub(crate) fn give_to(&self, user: u32) {
        fn give(path: &Path, user: u32) {
            std::os::unix::fs::chown(path, Some(user), None).expect("a new owner");
            if path.is_dir() {
                for entry in fs::read_dir(path).expect("a directory") {
                    give(&entry.expect("an entry").path(), user);
                }
            }
        }
        give(self.directory.path(), user);
    }

    /// How often a login was attempted.
    pub(crate) fn logins(&self) -> u64 {
        fs::metadata(self.path("logins")).map_or(0, |metadata| metadata.len())
    }

    /// The process that loaded the module last.
    pub(crate) fn process(&self) -> Option<Pid> {
        Pid::from_raw(fs::read_to_string(self.path("process")).ok()?.parse().ok()?)
    }

    /// Waits until the child has exited but has not been reaped.
    pub(crate) fn await_death(&self) {
        pintle_test_support::eventually("the child is dead", Duration::from_secs(10), || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.process()?.as_raw_nonzero())).ok()?;
            stat.contains(") Z ").then_some(())
        });
    }

    pub(crate) fn kill_child(&self) {
        kill_process(self.process().expect("a child has the module open"), Signal::KILL).expect("it can be killed");
    }
}
