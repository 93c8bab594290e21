//! A booted Debian with systemd as process 1.

use std::ffi::{OsStr, OsString};
use std::ops::Deref;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use pintle_test_support::{ProcessCommand, TestProcess, eventually};

use super::network::Network;
use super::packages::repository;
use super::{Debian, PATIENCE_SECONDS, output, succeed, text};

/// A boot takes a second on an idle machine, and much longer on a busy one.
const BOOT: Duration = Duration::from_secs(60);

/// A machine that shares only this one's kernel. Dropping it kills everything in it, like a power cut.
pub(crate) struct Machine {
    // In this order: the processes before the directories.
    running: Running,
    name: String,
    files: Vec<(PathBuf, &'static str)>,
    groups: CgroupCleanup,
    debian: Debian,
}

/// A running machine.
struct Running {
    processes: TestProcess,
    /// The pid of its process 1 on this machine.
    init: u32,
    network: Network,
}

impl Machine {
    /// Boots a Debian with this host name. `files` are files of this machine, and their paths on the booted one.
    pub(crate) fn boot(debian: Debian, name: &str, files: &[(PathBuf, &'static str)]) -> Self {
        let groups = CgroupCleanup::new(debian.root().file_name().expect("the directory has a name"));
        let running = start(&debian, &groups, name, files);
        let machine = Self { running, name: name.to_owned(), files: files.to_vec(), groups, debian };
        machine.wait_until_booted();
        machine
    }

    /// Shuts the machine down and boots it again.
    pub(crate) fn reboot(&mut self) {
        self.run(&["systemctl", "--no-block", "poweroff"]);
        self.running.processes.wait(BOOT);
        let ports = self.running.network.ports();
        self.running = start(&self.debian, &self.groups, &self.name, &self.files);
        for port in ports {
            self.running.network.reach(port);
        }
        self.wait_until_booted();
    }

    fn wait_until_booted(&self) {
        // Until systemd responds, its state is reported as offline.
        let unfinished = ["", "offline", "unknown", "initializing", "starting"];
        let state = eventually("it has booted", BOOT, || {
            let output = self.output(&["systemctl", "is-system-running", "--wait"]);
            let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            (!unfinished.contains(&state.as_str())).then_some(state)
        });
        assert_eq!(state, "running", "{}", text(&self.output(&["systemctl", "--failed", "--no-pager"])));
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A command on the machine.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", PATIENCE_SECONDS, "nsenter", "--mount", "--uts", "--ipc", "--net", "--pid"])
            .args(["--cgroup", "--target", &self.running.init.to_string(), "--"])
            .args(words)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("HOME", "/root")
            .current_dir("/");
        command
    }

    /// Runs a command that must succeed, and returns its output.
    #[track_caller]
    pub(crate) fn run(&self, words: &[&str]) -> String {
        succeed(&mut self.command(words))
    }

    /// Runs a command, and returns its result.
    pub(crate) fn output(&self, words: &[&str]) -> Output {
        output(&mut self.command(words))
    }

    /// Runs a bash script, all of whose commands must succeed.
    #[track_caller]
    pub(crate) fn script(&self, script: &str) -> String {
        self.run(&["bash", "-euo", "pipefail", "-c", script])
    }

    /// A unit's property, as printed by `systemctl show`.
    #[track_caller]
    pub(crate) fn property(&self, unit: &str, name: &str) -> String {
        self.run(&["systemctl", "show", "--value", "--property", name, unit]).trim_end().to_owned()
    }

    /// A unit's log.
    pub(crate) fn journal(&self, unit: &str) -> String {
        text(&self.output(&["journalctl", "--no-pager", "--output=cat", "--unit", unit]))
    }

    pub(crate) fn network(&self) -> &Network {
        &self.running.network
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
        if std::thread::panicking() && self.running.processes.is_running() {
            let log = self.output(&["journalctl", "--no-pager", "--output=short-precise", "--lines=80"]);
            println!("--- the end of the machine's log:\n{}\n---", text(&log));
        }
    }
}

/// Starts a machine.
fn start(debian: &Debian, groups: &CgroupCleanup, name: &str, files: &[(PathBuf, &str)]) -> Running {
    let mut processes = ProcessCommand::new(script(), debian.path("/var/log/boot.log"))
        .private_mounts()
        .argument(debian.root())
        .argument(&groups.name)
        .argument(name)
        .arguments(files.iter().map(|(file, path)| format!("{}={path}", file.display())))
        .start();
    let init = eventually("systemd is process 1", BOOT, || {
        processes.assert_running();
        child(processes.id()).filter(|child| name_of(*child).as_deref() == Some("systemd"))
    });
    Running { processes, init, network: Network::of(init) }
}

fn script() -> PathBuf {
    repository().join("tests/debian/boot")
}

/// The only child of a process.
fn child(process: u32) -> Option<u32> {
    std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).ok()?.trim().parse().ok()
}

fn name_of(process: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{process}/comm")).ok().map(|name| name.trim_end().to_owned())
}

/// Removes the machine's control groups once it is off, even if this process is killed.
struct CgroupCleanup {
    name: OsString,
    process: Child,
}

impl CgroupCleanup {
    /// For the control group with this name.
    fn new(name: &OsStr) -> Self {
        let process = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(script())
            .arg("sweep")
            .arg(name)
            .stdin(Stdio::piped())
            .process_group(0) // an interrupt from the terminal must not stop the sweeping
            .spawn()
            .expect("unshare starts");
        Self { name: name.to_owned(), process }
    }
}

impl Drop for CgroupCleanup {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}
