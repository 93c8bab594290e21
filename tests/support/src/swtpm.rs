//! A TPM 2.0 in software (Debian package swtpm) on loopback ports of its own.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::condition::{eventually, holds_within};
use crate::ports::ReservedPorts;
use crate::process::{ProcessCommand, TestProcess};

/// A TPM with its state in one directory; stopped on drop.
#[derive(Debug)]
pub struct Swtpm {
    directory: PathBuf,
    ports: ReservedPorts,
    process: Option<TestProcess>,
}

impl Swtpm {
    /// Starts a new TPM with its state in `directory`, which is created.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        std::fs::create_dir_all(directory.join("state")).expect("a directory for the TPM's state");
        let mut swtpm = Self { directory, ports: ReservedPorts::neighbouring(2), process: None };
        swtpm.start();
        swtpm
    }

    /// Starts it with the state that it has, as a machine that boots does.
    pub fn start(&mut self) {
        let address = |index| format!("type=tcp,port={},bindaddr=127.0.0.1", self.ports.port(index));
        let command = ProcessCommand::new("swtpm", self.directory.join("swtpm.log"))
            .arguments(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"])
            .argument(format!("dir={}", self.directory.join("state").display()))
            .arguments(["--server", &address(0), "--ctrl", &address(1)]);
        let mut process = command.start();
        eventually("swtpm listens", Duration::from_secs(20), || {
            process.assert_running();
            TcpStream::connect(("127.0.0.1", self.ports.port(1))).ok()
        });
        self.process = Some(process);
    }

    /// Stops it in the middle of whatever it does.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// How libtss2 reaches it.
    #[must_use]
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.ports.port(0))
    }

    /// The fields of a backend's table in pintle's configuration; `plugin` is `libpintle_backend_tpm.so`.
    #[must_use]
    pub fn table(&self, plugin: &Path) -> String {
        format!("type = \"tpm\"\ntcti = \"{}\"\nlibrary = \"{}\"\n", self.tcti(), plugin.display())
    }

    /// The path of a file in the TPM's directory, where [`Swtpm::run`] works.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A command of tpm2-tools, or of OpenSSL with its tpm2 provider, that uses this TPM.
    #[must_use]
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("TPM2TOOLS_TCTI", self.tcti())
            .env("TPM2OPENSSL_TCTI", self.tcti())
            .current_dir(&self.directory);
        command
    }

    /// Runs such a command and answers what it prints. Tried several times: without a resource manager two users of a
    /// TPM run out of its three slots now and then.
    #[track_caller]
    pub fn run(&self, program: &str, arguments: &[&str]) -> Vec<u8> {
        let mut last = String::new();
        let found = holds_within(Duration::from_secs(5), || {
            let output = self.command(program, arguments).output().expect("tpm2-tools and openssl are installed");
            last = format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            output.status.success().then_some(output.stdout)
        });
        found.unwrap_or_else(|| panic!("{last}"))
    }
}
