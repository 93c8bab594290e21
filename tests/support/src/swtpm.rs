//! A software TPM 2.0 (Debian package swtpm) on its own loopback ports.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::condition::{eventually, holds_within};
use crate::ports::ReservedPorts;
use crate::process::{ProcessCommand, TestProcess};

/// A TPM whose state is in one directory; stopped on drop.
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

    /// Starts it with its existing state, like a machine that boots.
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

    /// Kills it, whatever it is doing.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// The TCTI string with which libtss2 connects to it.
    #[must_use]
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.ports.port(0))
    }

    /// The loopback ports that it listens on, as used in [`Swtpm::tcti`].
    #[must_use]
    pub fn ports(&self) -> [u16; 2] {
        [self.ports.port(0), self.ports.port(1)]
    }

    /// The fields of a backend's table in pintle's configuration; `plugin` is `libpintle_backend_tpm.so`.
    #[must_use]
    pub fn table(&self, plugin: &Path) -> String {
        format!("type = \"tpm\"\ntcti = \"{}\"\nlibrary = \"{}\"\n", self.tcti(), plugin.display())
    }

    /// The path of a file in the TPM's directory, the working directory of [`Swtpm::run`].
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

    /// Runs such a command and returns its output. Retries several times: without a resource manager, two users of
    /// the TPM occasionally run out of its three slots.
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

/// A resource manager for a TPM, like the kernel's for `/dev/tpmrm0`, with which several programs share the TPM's
/// three slots (Debian packages tpm2-abrmd, libtss2-tcti-tabrmd0 and dbus). Stopped on drop.
#[derive(Debug)]
pub struct ResourceManager {
    // In this order: the resource manager before the bus that it needs.
    _manager: TestProcess,
    _bus: TestProcess,
    address: String,
}

impl ResourceManager {
    /// The TCTI string; the bus is given by `DBUS_SESSION_BUS_ADDRESS`.
    pub const TCTI: &str = "tabrmd:bus_name=com.intel.tss2.Tabrmd,bus_type=session";

    /// Starts a resource manager with its own message bus. Nothing else may use the TPM directly while it runs.
    #[must_use]
    pub fn new(swtpm: &Swtpm) -> Self {
        let (socket, log) = (swtpm.join("bus"), swtpm.join("tpm2-abrmd.log"));
        let address = format!("unix:path={}", socket.display());
        let bus = ProcessCommand::new("dbus-daemon", swtpm.join("dbus.log"))
            .arguments(["--session", "--nofork"])
            .flag("address", &address)
            .start();
        eventually("the bus is there", Duration::from_secs(10), || socket.exists().then_some(()));
        let manager = ProcessCommand::new("tpm2-abrmd", log)
            .arguments(["--session", "--allow-root"])
            .flag("tcti", swtpm.tcti())
            .environment("DBUS_SESSION_BUS_ADDRESS", &address)
            .start();
        let manager = Self { _manager: manager, _bus: bus, address };
        eventually("the resource manager answers", Duration::from_secs(20), || {
            let mut command = swtpm.command("tpm2_getcap", &["handles-transient"]);
            let output = manager.apply_to(&mut command).output().expect("tpm2-tools are installed");
            output.status.success().then_some(())
        });
        manager
    }

    /// Makes a command of tpm2-tools or OpenSSL use the TPM through this manager.
    pub fn apply_to<'command>(&self, command: &'command mut Command) -> &'command mut Command {
        command
            .env("TPM2TOOLS_TCTI", Self::TCTI)
            .env("TPM2OPENSSL_TCTI", Self::TCTI)
            .env("DBUS_SESSION_BUS_ADDRESS", &self.address)
    }
}
