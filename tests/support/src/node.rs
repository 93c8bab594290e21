//! A node: the directories that the agent under test uses, and their contents.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{AgentCommand, MovableClock, ScratchDirectory};

/// A node for one test, on which no agent has run yet.
#[derive(Debug)]
pub struct Node {
    binary: PathBuf,
    name: String,
    clock: Option<MovableClock>,
    scratch: ScratchDirectory,
}

/// A credential pair as read from its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The leaf's serial number, upper-case hexadecimal.
    pub serial: String,
    /// The leaf's subject, `CN=…`.
    pub common_name: String,
    /// The leaf's notBefore.
    pub not_before: SystemTime,
    /// The leaf's notAfter.
    pub not_after: SystemTime,
    /// The leaf's SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
    /// SHA-256 of the leaf's DER in lower-case hexadecimal, as in an API server's credential ID.
    pub sha256: String,
}

/// The result of a command.
#[derive(Clone, Debug)]
pub struct Answer {
    /// `None` if it was killed by a signal.
    pub code: Option<i32>,
    /// Its standard output.
    pub output: String,
    /// Its standard error.
    pub error: String,
}

impl Node {
    /// A node for the agent `binary` (tests pass `env!("CARGO_BIN_EXE_pintle")`).
    #[must_use]
    pub fn new(binary: impl Into<PathBuf>, name: &str) -> Self {
        let scratch = ScratchDirectory::new();
        // The agent must not read the machine's configuration.
        let _ = scratch.write("config.toml", "");
        Self { binary: binary.into(), name: name.to_owned(), clock: None, scratch }
    }

    /// Gives the node a wall clock that the test can change.
    #[must_use]
    pub fn with_clock(mut self) -> Self {
        self.clock = Some(MovableClock::new(&self.scratch));
        self
    }

    /// Sets the offset of the clock of [`Node::with_clock`], in seconds.
    pub fn set_clock(&self, seconds: i64) {
        self.clock.as_ref().expect("a node with a clock").set_offset(seconds);
    }

    /// The same machine with another host name.
    #[must_use]
    pub fn renamed(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The node's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory that contains all of the node's files.
    #[must_use]
    pub fn scratch(&self) -> &ScratchDirectory {
        &self.scratch
    }

    /// `--bootstrap-kubeconfig`; missing until [`Node::give_bootstrap`].
    #[must_use]
    pub fn bootstrap_kubeconfig(&self) -> PathBuf {
        self.scratch.join("bootstrap-kubeconfig")
    }

    /// Writes the bootstrap kubeconfig.
    pub fn give_bootstrap(&self, kubeconfig: impl AsRef<[u8]>) {
        // By rename, as a provisioning system should.
        let next = self.scratch.write("bootstrap-kubeconfig.next", kubeconfig);
        std::fs::rename(next, self.bootstrap_kubeconfig()).expect("the scratch directory is writable");
    }

    /// `--kubeconfig`.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.scratch.join("kubeconfig")
    }

    /// `--cert-dir`.
    #[must_use]
    pub fn cert_dir(&self) -> PathBuf {
        self.scratch.join("pki")
    }

    /// `--state-dir`.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.scratch.join("state")
    }

    /// The symbolic link to the current pair.
    #[must_use]
    pub fn current_path(&self) -> PathBuf {
        self.cert_dir().join("kubelet-client-current.pem")
    }

    /// The current pair; `None` if there is none or it cannot be parsed.
    #[must_use]
    pub fn current(&self) -> Option<Pair> {
        Pair::read(&self.current_path())
    }

    /// The pair files without the link, sorted by name.
    #[must_use]
    pub fn pairs(&self) -> Vec<PathBuf> {
        let is_pair = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "pem");
        files(&self.cert_dir()).into_iter().filter(is_pair).collect()
    }

    /// The key files of the file backend.
    #[must_use]
    pub fn keys(&self) -> Vec<PathBuf> {
        files(&self.state_dir().join("keys"))
    }

    /// The journal of the client identity.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.state_dir().join("client.json")
    }

    /// `pintle run` on this node.
    #[must_use]
    pub fn agent(&self) -> AgentCommand {
        let command = AgentCommand::new(&self.binary, &self.scratch).argument("run").arguments(self.flags());
        match &self.clock {
            Some(clock) => command.clock(clock),
            None => command,
        }
    }

    /// Runs `pintle run --once`, and returns its exit code and log.
    pub fn enrol(&self, deadline: Duration) -> (Option<i32>, String) {
        let (status, output) = self.agent().argument("--once").run(deadline);
        (status.code(), output)
    }

    /// Runs a pintle command, such as `["status", "-o", "json"]`, on this node, with the real clock.
    pub fn run(&self, arguments: &[&str]) -> Answer {
        let mut command = Command::new(&self.binary);
        command.args(arguments).args(self.flags()).stdin(Stdio::null());
        let output = command.output().unwrap_or_else(|error| panic!("cannot start the agent: {error}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Answer { code: output.status.code(), output: text(&output.stdout), error: text(&output.stderr) }
    }

    /// The first identity of `pintle status -o json`, or `null` if there is no status.
    #[must_use]
    pub fn status(&self) -> Value {
        let answer = self.run(&["status", "-o", "json"]);
        serde_json::from_str(&answer.output)
            .map_or(Value::Null, |mut status: Value| status["identities"].get_mut(0).map_or(Value::Null, Value::take))
    }

    /// The flags that make a command use this node's directories.
    #[must_use]
    pub fn flags(&self) -> Vec<String> {
        let flag = |name: &str, path: PathBuf| format!("--{name}={}", path.display());
        vec![
            flag("config", self.scratch.join("config.toml")),
            format!("--node-name={}", self.name),
            flag("kubeconfig", self.kubeconfig()),
            flag("bootstrap-kubeconfig", self.bootstrap_kubeconfig()),
            flag("cert-dir", self.cert_dir()),
            flag("state-dir", self.state_dir()),
        ]
    }
}

impl Pair {
    /// Parses a pair file; `None` if it contains no certificate or no private key.
    #[must_use]
    pub fn read(path: &Path) -> Option<Self> {
        let blocks = pem::parse_many(std::fs::read(path).ok()?).ok()?;
        let leaf = blocks.first().filter(|block| block.tag() == "CERTIFICATE")?.contents();
        blocks.iter().find(|block| block.tag().ends_with("PRIVATE KEY"))?;
        let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
        let time = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.try_into().unwrap_or_default());
        let hexadecimal = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let common_name = certificate.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
        Some(Self {
            serial: serial_text(certificate.raw_serial()),
            common_name,
            not_before: time(certificate.validity().not_before.timestamp()),
            not_after: time(certificate.validity().not_after.timestamp()),
            public_key: certificate.public_key().raw.to_vec(),
            sha256: hexadecimal(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, leaf).as_ref()),
        })
    }
}

/// Formats a serial number's DER bytes (with a leading zero byte if it is large) in upper-case hexadecimal, like
/// openssl.
#[must_use]
pub fn serial_text(bytes: &[u8]) -> String {
    let bytes = bytes.strip_prefix(&[0]).unwrap_or(bytes);
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// The regular files in a directory, sorted by name; empty if there is no such directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()))
        .collect();
    files.sort();
    files
}
