//! Load by Kubernetes' own clients, counted by themselves: the program `load` of the multi-call binary.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::agent::json_lines;
use crate::condition::holds_within;
use crate::process::last_lines;
use crate::{ProcessCommand, ScratchDirectory, TestProcess, cluster_binary};

/// Longer than any test, so that a load without anybody to stop it ends.
const LONGEST: &str = "5m";
/// A request that is under way at the end may take 30 s.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// Clients that ask as long as this is there.
#[derive(Debug)]
pub struct Load {
    process: TestProcess,
}

/// What became of the requests of a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadReport {
    /// How many were begun.
    pub requests: u64,
    /// How many of them were answered, wholly and with success.
    pub answered: u64,
    /// How many were not.
    pub failed: u64,
    /// How many connections were made for them.
    pub connections: u64,
    /// One count for each client, protocol, kind of connection and method.
    pub by: Vec<LoadCount>,
    /// All of it as it was printed: the failures by kind, and some of them in full.
    pub text: String,
}

/// What became of the requests of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadCount {
    /// `CLIENT PROTOCOL CONNECTIONS METHOD`, such as `net/http HTTP/2.0 fresh POST`.
    pub kind: String,
    /// How many were answered.
    pub answered: u64,
    /// How many were not.
    pub failed: u64,
}

impl Load {
    /// Starts a load for whom this kubeconfig names, with these flags of `cluster load`.
    #[must_use]
    pub fn start(kubeconfig: &Path, scratch: &ScratchDirectory, flags: &[&str]) -> Self {
        let command = ProcessCommand::new(cluster_binary(), scratch.join("load.log"))
            .argument("load")
            .flag("kubeconfig", kubeconfig)
            .flag("duration", LONGEST)
            .arguments(flags);
        Self { process: command.start() }
    }

    /// Waits until each of its clients has had an answer.
    #[track_caller]
    pub fn wait_until_running(&mut self, deadline: Duration) {
        let runs = holds_within(deadline, || {
            self.process.assert_running();
            self.line(|line| line["event"] == "running")
        });
        assert!(runs.is_some(), "not within {deadline:?}: every client is answered\n{}", self.last_lines());
    }

    /// Ends it, and returns its counts. What is under way is waited for.
    #[must_use]
    #[track_caller]
    pub fn stop(mut self) -> LoadReport {
        self.process.assert_running();
        self.process.signal(Signal::TERM);
        let status = self.process.wait(END_DEADLINE);
        let report = self.line(|line| line["requests"].is_u64()).filter(|_| status.success());
        let report = report.unwrap_or_else(|| panic!("{status}\n{}", self.last_lines()));
        let number = |object: &Value, name: &str| object[name].as_u64().expect("a number");
        let count = |object: &Value| {
            let word = |name: &str| object[name].as_str().expect("a word").to_owned();
            LoadCount {
                kind: ["client", "protocol", "connections", "method"].map(word).join(" "),
                answered: number(object, "answered"),
                failed: number(object, "failed"),
            }
        };
        LoadReport {
            requests: number(&report, "requests"),
            answered: number(&report, "answered"),
            failed: number(&report, "failed"),
            connections: number(&report, "connections"),
            by: report["by"].as_array().expect("a list").iter().map(count).collect(),
            text: report.to_string(),
        }
    }

    fn line(&self, wanted: impl Fn(&Value) -> bool) -> Option<Value> {
        json_lines(&self.process.output()).into_iter().find(wanted)
    }

    fn last_lines(&self) -> String {
        last_lines(self.process.output_path())
    }
}
