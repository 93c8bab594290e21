//! Several identities of one node in one process, and what a release that knew a single one has left behind.

#[path = "../embedded/mod.rs"]
mod embedded;
mod faults;
mod interceptor;
mod once;
mod several;
mod upgrade;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use pintle_test_support::{AgentCommand, Answer, ScratchDirectory};
use serde_json::Value;

const PINTLE: &str = env!("CARGO_BIN_EXE_pintle");

/// A node with a configuration file and nothing else: what each identity is to do is in there.
pub(crate) struct Machine {
    pub(crate) scratch: ScratchDirectory,
    environment: Vec<(String, PathBuf)>,
}

impl Machine {
    /// A node of this name.
    pub(crate) fn new() -> Self {
        Self { scratch: ScratchDirectory::new(), environment: Vec::new() }
    }

    /// Gives the agent environment variables.
    pub(crate) fn set_environment(&mut self, variables: Vec<(&'static str, PathBuf)>) {
        self.environment.extend(variables.into_iter().map(|(name, value)| (name.to_owned(), value)));
    }

    /// Writes the configuration: the node's name, and whatever else; `$DIR` is the machine's directory.
    pub(crate) fn configure(&self, node_name: &str, rest: &str) {
        let text = format!("node-name = \"{node_name}\"\nstate-dir = \"$DIR/state\"\n{rest}");
        let _ = self.scratch.write("config.toml", text.replace("$DIR", &self.scratch.path().display().to_string()));
    }

    /// `pintle run`.
    pub(crate) fn agent(&self) -> AgentCommand {
        self.run_by(AgentCommand::new(PINTLE, &self.scratch))
    }

    /// `pintle run` with a tmpfs of 64 KiB, which goes with it, as one of the machine's directories.
    pub(crate) fn agent_with_small_disk(&self, directory: &str) -> AgentCommand {
        let script = r#"mkdir -p "$0" && mount -t tmpfs -o size=64k,mode=700 tmpfs "$0" && exec "$@""#;
        let shell = AgentCommand::new("/bin/sh", &self.scratch).private_mounts();
        self.run_by(shell.arguments(["-c", script]).argument(self.scratch.join(directory)).argument(PINTLE))
    }

    fn run_by(&self, command: AgentCommand) -> AgentCommand {
        let command = command.argument("run").flag("config", self.scratch.join("config.toml"));
        let environment = self.environment.iter().cloned();
        environment.fold(command, |command, (name, value)| command.environment(name, value))
    }

    /// Runs another command.
    pub(crate) fn run(&self, arguments: &[&str]) -> Answer {
        let mut command = Command::new(PINTLE);
        command.args(arguments).arg("--config").arg(self.scratch.join("config.toml"));
        command.envs(self.environment.iter().cloned()).stdin(Stdio::null());
        let output = command.output().expect("the agent starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Answer { code: output.status.code(), output: text(&output.stdout), error: text(&output.stderr) }
    }

    /// `pintle status -o json`: the entry of this identity, or `null`.
    pub(crate) fn status(&self, identity: &str) -> Value {
        let answer = self.run(&["status", "-o", "json"]);
        let status: Value = serde_json::from_str(&answer.output).unwrap_or_default();
        let identities = status["identities"].as_array().cloned().unwrap_or_default();
        identities.into_iter().find(|known| known["identity"] == identity).unwrap_or_default()
    }

    /// `pintle keys list --json`: where the key stands of each id, as `backend:id`.
    pub(crate) fn keys(&self) -> Vec<(String, String)> {
        let answer = self.run(&["keys", "list", "--json"]);
        let inventory: Value = serde_json::from_str(&answer.output).unwrap_or_default();
        let keys = inventory["keys"].as_array().cloned().unwrap_or_default();
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        keys.iter().map(|key| (format!("{}:{}", word(&key["backend"]), word(&key["id"])), key.to_string())).collect()
    }
}
