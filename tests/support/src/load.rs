//! Load from Kubernetes' own clients, which count its results: the program `load` of the multi-call binary.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::agent::json_lines;
use crate::condition::holds_within;
use crate::process::last_lines;
use crate::{ProcessCommand, ScratchDirectory, TestProcess, cluster_binary};

/// Longer than any test, so that a load that is never stopped ends by itself.
const MAXIMUM_DURATION: &str = "5m";
/// A request in flight at the end may take 30 s.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// Clients that send requests until stopped or dropped.
#[derive(Debug)]
pub struct Load {
    process: TestProcess,
}

/// The results of a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadReport {
    /// Requests sent.
    pub requests: u64,
    /// Requests with a complete and successful response.
    pub answered: u64,
    /// Requests without one.
    pub failed: u64,
    /// Connections opened for them.
    pub connections: u64,
    /// One count per client, protocol, kind of connection and method.
    pub by: Vec<LoadCount>,
    /// The complete output, with failures by kind and examples.
    pub text: String,
}

/// The results of the requests of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadCount {
    /// `CLIENT PROTOCOL CONNECTIONS METHOD`, such as `net/http HTTP/2.0 fresh POST`.
    pub kind: String,
    /// Requests with a complete and successful response.
    pub answered: u64,
    /// Requests without one.
    pub failed: u64,
}

impl Load {
    /// Starts a load with this kubeconfig and these flags of `cluster load`.
    #[must_use]
    pub fn start(kubeconfig: &Path, scratch: &ScratchDirectory, flags: &[&str]) -> Self {
        let command = ProcessCommand::new(cluster_binary(), scratch.join("load.log"))
            .argument("load")
            .flag("kubeconfig", kubeconfig)
            .flag("duration", MAXIMUM_DURATION)
            .arguments(flags);
        Self { process: command.start() }
    }

    /// Waits until every client has received a response.
    #[track_caller]
    pub fn wait_until_running(&mut self, deadline: Duration) {
        let runs = holds_within(deadline, || {
            self.process.assert_running();
            self.line(|line| line["event"] == "running")
        });
        assert!(runs.is_some(), "not within {deadline:?}: every client is answered\n{}", self.last_lines());
    }

    /// Stops the load, waits for requests in flight, and returns the results.
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
