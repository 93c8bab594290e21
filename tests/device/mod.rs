//! An agent whose key is in a device: shared by the hardware tests.

#![allow(dead_code, reason = "each test file uses a part of this module")]

pub(crate) mod served;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pintle_test_support::{Agent, AgentCommand, ScratchDirectory};
use serde_json::Value;

/// Timeout for waiting, longer than any back-off in a test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(180);
const PINTLE: &str = env!("CARGO_BIN_EXE_pintle");

/// The TPM backend, built by cargo next to the program.
pub(crate) fn tpm_plugin() -> PathBuf {
    let directory = Path::new(PINTLE).parent().expect("the program is in a directory");
    let plugin = directory.join("libpintle_backend_tpm.so");
    assert!(plugin.exists(), "{} is missing: cargo build --workspace", plugin.display());
    plugin
}

/// A node: its directories and configuration, and how to start its agent.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) scratch: ScratchDirectory,
    environment: Vec<(String, PathBuf)>,
}

impl Node {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), scratch: ScratchDirectory::new(), environment: Vec::new() }
    }

    /// Sets environment variables for the agent and its module process.
    pub(crate) fn set_environment(&mut self, variables: impl IntoIterator<Item = (&'static str, PathBuf)>) {
        self.environment.extend(variables.into_iter().map(|(name, value)| (name.to_owned(), value)));
    }

    /// Writes the configuration: the backend to use, more top-level settings, and `[backends.NAME]` tables.
    pub(crate) fn configure(&self, backend: &str, more: &str, tables: &[(&str, &str)]) {
        let tables: String = tables.iter().map(|(name, table)| format!("\n[backends.{name}]\n{table}")).collect();
        let path = |name: &str| self.scratch.join(name).display().to_string();
        let text = format!(
            "node-name = \"{}\"\nkubeconfig = \"{}\"\nbootstrap-kubeconfig = \"{}\"\ncert-dir = \"{}\"\n\
             state-dir = \"{}\"\nbackend = \"{backend}\"\n{more}\n{tables}",
            self.name,
            path("kubeconfig"),
            path("bootstrap-kubeconfig"),
            path("pki"),
            path("state")
        );
        let _ = self.scratch.write("config.toml", text);
    }

    /// Writes the kubeconfig with the credential for the first certificate.
    pub(crate) fn bootstrap_with(&self, kubeconfig: &str) {
        let _ = self.scratch.write("bootstrap-kubeconfig", kubeconfig);
    }

    /// Starts the agent.
    pub(crate) fn start(&self) -> Agent {
        let command = AgentCommand::new(PINTLE, &self.scratch)
            .argument("run")
            .flag("config", self.scratch.join("config.toml"))
            .flag("log-format", "json");
        let environment = self.environment.iter().cloned();
        environment.fold(command, |command, (name, value)| command.environment(name, value)).start()
    }

    /// The current pair.
    pub(crate) fn pair(&self) -> PathBuf {
        self.scratch.join("pki/kubelet-client-current.pem")
    }

    /// Runs a pintle command with this node's configuration; returns whether it succeeded, and its standard output.
    pub(crate) fn pintle(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new(PINTLE)
            .args(arguments)
            .arg("--config")
            .arg(self.scratch.join("config.toml"))
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .output()
            .expect("pintle starts");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// The identity's part of `pintle status`; `None` if the agent does not respond.
    pub(crate) fn status(&self) -> Option<Value> {
        let (_, text) = self.pintle(&["status", "--output=json"]);
        let status: Value = serde_json::from_str(&text).ok()?;
        status["identities"].get(0).cloned()
    }

    /// Asks the running agent to rotate now.
    pub(crate) fn rotate(&self) {
        let (success, text) = self.pintle(&["rotate"]);
        assert!(success, "{text}");
    }

    /// Waits until a certificate other than `old` is in use and nothing is left to do; returns its serial number.
    #[track_caller]
    pub(crate) fn ready_after(&self, agent: &mut Agent, old: &str) -> String {
        agent.wait_for("a new certificate is held", DEADLINE, |_| {
            let status = self.status()?;
            let serial = status["serial"].as_str()?.to_owned();
            (status["state"] == "ready" && serial != old).then_some(serial)
        })
    }

    /// Waits until the status has a reason that contains one of these words, and returns it.
    #[track_caller]
    pub(crate) fn reason(&self, agent: &mut Agent, words: &[&str]) -> String {
        agent.wait_for(&format!("the status names the cause: {words:?}"), DEADLINE, |_| {
            let reason = self.status()?["reason"].as_str()?.to_owned();
            words.iter().any(|word| reason.contains(word)).then_some(reason)
        })
    }
}

/// How many events with this name the agent has logged since its start.
pub(crate) fn events(agent: &Agent, name: &str) -> usize {
    agent.log().iter().filter(|line| line["event"] == name).count()
}

/// The running children of a process.
pub(crate) fn children(process: u32) -> Vec<u32> {
    let mut children = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.extend(text.split_whitespace().filter_map(|id| id.parse::<u32>().ok()));
    }
    children
}

/// Runs a command, and returns its output; panics with it if the command fails.
#[track_caller]
pub(crate) fn succeed(command: &mut Command) -> Vec<u8> {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The public key of the first certificate in a file, as DER SubjectPublicKeyInfo.
pub(crate) fn certified_key(pair: &Path) -> Vec<u8> {
    let content = std::fs::read(pair).expect("the pair can be read");
    let blocks = pem::parse_many(content).expect("the pair is PEM");
    let leaf = blocks.iter().find(|block| block.tag() == "CERTIFICATE").expect("there is a certificate");
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf.contents()).expect("a certificate");
    leaf.public_key().raw.to_vec()
}
