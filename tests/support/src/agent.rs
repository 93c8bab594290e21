//! The agent under test as a process.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use serde_json::Value;

use crate::condition::holds_within;
use crate::process::{ProcessCommand, TestProcess, last_lines};
use crate::{MovableClock, ScratchDirectory};

/// How the agent is started.
#[derive(Clone, Debug)]
pub struct AgentCommand {
    command: ProcessCommand,
}

impl AgentCommand {
    /// The agent `binary` (a test passes `env!("CARGO_BIN_EXE_pintle")`), whose output goes to the file `agent.log` in
    /// `scratch`, after that of earlier starts.
    #[must_use]
    pub fn new(binary: impl Into<PathBuf>, scratch: &ScratchDirectory) -> Self {
        Self { command: ProcessCommand::new(binary, scratch.join("agent.log")) }
    }

    /// Sends the output to another file, for a second agent in the same scratch directory.
    #[must_use]
    pub fn named(binary: impl Into<PathBuf>, scratch: &ScratchDirectory, name: &str) -> Self {
        Self { command: ProcessCommand::new(binary, scratch.join(format!("{name}.log"))) }
    }

    /// Adds one argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.command = self.command.argument(argument);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command = self.command.arguments(arguments);
        self
    }

    /// Adds `--name=value`.
    #[must_use]
    pub fn flag(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command = self.command.flag(name, value);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn environment(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.command = self.command.environment(name, value);
        self
    }

    /// Starts the agent where what it mounts is its own.
    #[must_use]
    pub fn private_mounts(mut self) -> Self {
        self.command = self.command.private_mounts();
        self
    }

    /// Gives the agent a wall clock that the test can move.
    #[must_use]
    pub fn clock(mut self, clock: &MovableClock) -> Self {
        self.command = clock.apply_to(self.command);
        self
    }

    /// Starts the agent.
    #[must_use]
    pub fn start(&self) -> Agent {
        Agent { process: self.command.start() }
    }

    /// Starts the agent, waits until it ends, and returns how, and what it printed.
    #[track_caller]
    pub fn run(&self, deadline: Duration) -> (ExitStatus, String) {
        let mut process = self.command.start();
        let status = process.wait(deadline);
        (status, process.output())
    }
}

/// A running agent; killed on drop.
#[derive(Debug)]
pub struct Agent {
    process: TestProcess,
}

impl Agent {
    /// The agent's process: its id, signals, pausing.
    pub fn process(&mut self) -> &mut TestProcess {
        &mut self.process
    }

    /// What this run has printed so far.
    #[must_use]
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// The log lines of this run that are JSON objects. A line that is still being written is left for the next look.
    #[must_use]
    pub fn log(&self) -> Vec<Value> {
        json_lines(&self.output())
    }

    /// The file that takes what every run prints.
    #[must_use]
    pub fn output_path(&self) -> &Path {
        self.process.output_path()
    }

    /// Kills the agent and everything it started with SIGKILL.
    pub fn kill(&mut self) -> ExitStatus {
        self.process.kill()
    }

    /// Sends SIGTERM and waits; panics when the agent is still there at the deadline.
    #[track_caller]
    pub fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.process.signal(rustix::process::Signal::TERM);
        self.process.wait(deadline)
    }

    /// The first `Some` that `condition` gives; panics with the end of the log when the agent ends or the deadline
    /// passes first.
    #[track_caller]
    pub fn wait_for<T>(&mut self, what: &str, deadline: Duration, mut condition: impl FnMut(&Self) -> Option<T>) -> T {
        let look = || match condition(self) {
            None => {
                self.process.assert_running();
                None
            }
            found => found,
        };
        match holds_within(deadline, look) {
            Some(found) => found,
            None => panic!("not within {deadline:?}: {what}\n{}", last_lines(self.output_path())),
        }
    }

    /// Waits for the first log line of this run for which `matches` is true.
    #[track_caller]
    pub fn wait_for_log(&mut self, what: &str, deadline: Duration, matches: impl Fn(&Value) -> bool) -> Value {
        self.wait_for(what, deadline, |agent| agent.log().into_iter().find(&matches))
    }
}

pub(crate) fn json_lines(output: &str) -> Vec<Value> {
    output.lines().filter(|line| line.starts_with('{')).filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[test]
    fn log_lines_are_those_of_this_run() {
        let scratch = ScratchDirectory::new();
        let script = r#"echo plain; echo '{"run":"'"$0"'"}' >&2; [ "$0" = once ] || exec sleep 1000"#;
        let shell = |name: &str| AgentCommand::new("/bin/sh", &scratch).arguments(["-c", script, name]);
        let (status, output) = shell("once").run(DEADLINE);
        assert!(status.success());
        assert_eq!(output, "plain\n{\"run\":\"once\"}\n");
        let mut agent = shell("second").start();
        agent.wait_for_log("the second run's line", DEADLINE, |line| line["run"] == "second");
        assert_eq!(agent.log().len(), 1);
        assert!(!agent.kill().success());
    }
}
