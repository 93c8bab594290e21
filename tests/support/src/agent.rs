//! The agent under test as a process.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use serde_json::Value;

use crate::condition::holds_within;
use crate::process::{ProcessCommand, TestProcess, last_lines};
use crate::{MovableClock, ScratchDirectory};

/// The command that starts an agent.
#[derive(Clone, Debug)]
pub struct AgentCommand {
    command: ProcessCommand,
}

impl AgentCommand {
    /// The agent `binary` (tests pass `env!("CARGO_BIN_EXE_pintle")`). Its output is appended to `agent.log` in
    /// `scratch`.
    #[must_use]
    pub fn new(binary: impl Into<PathBuf>, scratch: &ScratchDirectory) -> Self {
        Self { command: ProcessCommand::new(binary, scratch.join("agent.log")) }
    }

    /// The same with another log file, for a second agent in the same scratch directory.
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

    /// Starts the agent in a mount namespace of its own.
    #[must_use]
    pub fn private_mounts(mut self) -> Self {
        self.command = self.command.private_mounts();
        self
    }

    /// Gives the agent a wall clock that the test can change.
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

    /// Runs the agent until it exits, and returns its exit status and output.
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
    /// The agent's process, for its id, signals and pausing.
    pub fn process(&mut self) -> &mut TestProcess {
        &mut self.process
    }

    /// The output of this run so far.
    #[must_use]
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// The log lines of this run that are JSON objects, without a last line that is incomplete.
    #[must_use]
    pub fn log(&self) -> Vec<Value> {
        json_lines(&self.output())
    }

    /// The file with the output of all runs.
    #[must_use]
    pub fn output_path(&self) -> &Path {
        self.process.output_path()
    }

    /// Kills the agent and its children with SIGKILL.
    pub fn kill(&mut self) -> ExitStatus {
        self.process.kill()
    }

    /// Sends SIGTERM and waits for the agent to exit; panics if it has not by the deadline.
    #[track_caller]
    pub fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.process.signal(rustix::process::Signal::TERM);
        self.process.wait(deadline)
    }

    /// Waits for `condition` to return `Some`. Panics with the end of the log if the agent exits first, or the
    /// deadline passes.
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

    /// Waits for the first log line of this run for which `matches` returns true.
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
    fn the_log_contains_only_lines_of_this_run() {
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
