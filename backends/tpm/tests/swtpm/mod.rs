//! A TPM of one test's own: swtpm (Debian package swtpm) on a pair of loopback ports.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pintle_backend_tpm::Configuration;

/// A running swtpm with its state, and a directory for keys beside it. It is stopped and removed when dropped.
pub(crate) struct Swtpm {
    scratch: tempfile::TempDir,
    port: u16,
    process: Option<Child>,
}

impl Swtpm {
    pub(crate) fn new() -> Self {
        let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory");
        std::fs::create_dir(scratch.path().join("state")).expect("a directory for the TPM's state");
        let mut swtpm = Self { scratch, port: 0, process: None };
        // Somebody else may take a free port before swtpm does.
        for _ in 0..20 {
            swtpm.port = free_port_pair();
            if swtpm.try_start() {
                return swtpm;
            }
        }
        panic!("swtpm does not start");
    }

    pub(crate) fn start(&mut self) {
        assert!(self.try_start(), "swtpm does not start again on port {}", self.port);
    }

    /// Starts it with the state that it has: a TPM that was reset.
    fn try_start(&mut self) -> bool {
        let state = self.scratch.path().join("state");
        let (server, control) = (self.port, self.port + 1);
        let mut process = command("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .arg("--tpmstate")
            .arg(format!("dir={}", state.display()))
            .arg("--server")
            .arg(format!("type=tcp,port={server},bindaddr=127.0.0.1"))
            .arg("--ctrl")
            .arg(format!("type=tcp,port={control},bindaddr=127.0.0.1"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("swtpm is installed (Debian package swtpm)");
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && process.try_wait().expect("swtpm's state is known").is_none() {
            if TcpStream::connect(("127.0.0.1", control)).is_ok() {
                self.process = Some(process);
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = process.kill();
        let _ = process.wait();
        false
    }

    pub(crate) fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("swtpm can be stopped");
            process.wait().expect("swtpm stops");
        }
    }

    pub(crate) fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    pub(crate) fn configuration(&self) -> Configuration {
        Configuration { tcti: self.tcti(), directory: self.path("keys"), make_directory: true }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Runs a program of tpm2-tools or OpenSSL with this TPM, and fails with its words.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let output = command(program)
            .args(arguments)
            .env("TPM2TOOLS_TCTI", self.tcti())
            .env("TPM2OPENSSL_TCTI", self.tcti())
            .current_dir(self.scratch.path())
            .output()
            .unwrap_or_else(|error| panic!("{program} is needed: {error}"));
        assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A command that inherits no connection to a TPM. libtss2's sockets are not closed on exec, and a swtpm whose client
/// never hangs up, because some other test's child holds the connection too, serves nobody else.
fn command(program: &str) -> Command {
    let close_all = r#"for fd in /proc/$$/fd/*; do fd=${fd##*/}; ((fd > 2)) && eval "exec $fd>&-"; done; exec "$@""#;
    let mut command = Command::new("bash");
    command.args(["-c", close_all, "bash", program]);
    command
}

/// The TCTI connects to a port for commands and to the next one for control.
fn free_port_pair() -> u16 {
    loop {
        let Ok(first) = TcpListener::bind(("127.0.0.1", 0)) else { continue };
        let port = first.local_addr().expect("it is bound").port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}
