//! A Debian that has booted: systemd is its process 1.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use pintle_test_support::{ProcessCommand, TestProcess, eventually};

use super::network::Network;
use super::packages::repository;
use super::{Debian, PATIENCE_SECONDS, output, succeed, text};

/// A boot takes a second; a busy machine needs many times that.
const BOOT: Duration = Duration::from_secs(60);

/// A machine with the kernel of this one and everything else of its own. Switched off on drop, as by a power cut.
pub(crate) struct Machine {
    // In this order: first what runs in it, last the directories that it was in.
    processes: TestProcess,
    network: Network,
    init: u32,
    name: String,
    _groups: Sweeper,
    debian: Debian,
}

impl Machine {
    /// Boots a Debian under this name. Each of `files` is a file of this machine, and where it is in there.
    pub(crate) fn boot(debian: Debian, name: &str, files: &[(PathBuf, &str)]) -> Self {
        let script = repository().join("tests/debian/boot");
        let group = debian.root().file_name().expect("the directory has a name").to_owned();
        let sweeper = Sweeper::new(&script, Path::new(&group));
        let mut processes = ProcessCommand::new(script, debian.path("/var/log/boot.log"))
            .private_mounts()
            .argument(debian.root())
            .argument(group)
            .argument(name)
            .arguments(files.iter().map(|(file, path)| format!("{}={path}", file.display())))
            .start();
        let init = eventually("systemd is process 1", BOOT, || {
            processes.assert_running();
            child(processes.id()).filter(|child| name_of(*child).as_deref() == Some("systemd"))
        });
        let machine =
            Self { processes, network: Network::of(init), init, name: name.to_owned(), _groups: sweeper, debian };
        let state = eventually("it has booted", BOOT, || {
            let output = machine.output(&["systemctl", "is-system-running", "--wait"]);
            // Until systemd answers, nothing is said but that.
            Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|state| !state.is_empty())
        });
        assert_eq!(state, "running", "{}", machine.run(&["systemctl", "--failed", "--no-pager"]));
        machine
    }

    /// Its host name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A command in it.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", PATIENCE_SECONDS, "nsenter", "--mount", "--uts", "--ipc", "--net", "--pid"])
            .args(["--cgroup", "--target", &self.init.to_string(), "--"])
            .args(words)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("HOME", "/root")
            .current_dir("/");
        command
    }

    /// Runs a command that must succeed, and returns what it prints.
    #[track_caller]
    pub(crate) fn run(&self, words: &[&str]) -> String {
        succeed(&mut self.command(words))
    }

    /// Runs a command to its end.
    pub(crate) fn output(&self, words: &[&str]) -> Output {
        output(&mut self.command(words))
    }

    /// Runs a script of bash, which ends with the first command that fails; none may.
    #[track_caller]
    pub(crate) fn script(&self, script: &str) -> String {
        self.run(&["bash", "-euo", "pipefail", "-c", script])
    }

    /// A property of a unit, as `systemctl show` has it.
    #[track_caller]
    pub(crate) fn property(&self, unit: &str, name: &str) -> String {
        self.run(&["systemctl", "show", "--value", "--property", name, unit]).trim_end().to_owned()
    }

    /// What a unit has logged.
    pub(crate) fn journal(&self, unit: &str) -> String {
        text(&self.output(&["journalctl", "--no-pager", "--output=cat", "--unit", unit]))
    }

    /// Its network.
    pub(crate) fn network(&self) -> &Network {
        &self.network
    }
}

impl Deref for Machine {
    type Target = Debian;

    fn deref(&self) -> &Debian {
        &self.debian
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() && self.processes.is_running() {
            let log = self.output(&["journalctl", "--no-pager", "--output=short-precise", "--lines=80"]);
            println!("--- the end of the machine's log:\n{}\n---", text(&log));
        }
    }
}

/// The only child of a process.
fn child(process: u32) -> Option<u32> {
    std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).ok()?.trim().parse().ok()
}

fn name_of(process: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{process}/comm")).ok().map(|name| name.trim_end().to_owned())
}

/// Removes the control groups once the machine is off, also when nothing of this process is dropped.
struct Sweeper(Child);

impl Sweeper {
    fn new(script: &Path, group: &Path) -> Self {
        use std::os::unix::process::CommandExt as _;
        let sweeper = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(script)
            .arg("sweep")
            .arg(group)
            .stdin(Stdio::piped())
            .process_group(0) // an interrupt from the terminal must not stop the sweeping
            .spawn();
        Self(sweeper.expect("unshare starts"))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
