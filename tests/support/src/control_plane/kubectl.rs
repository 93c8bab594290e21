//! kubectl against the control plane.

use std::path::Path;

use serde_json::Value;

use super::ControlPlane;
use crate::process::ProcessCommand;
use crate::programs::{cluster_binary, kubectl};

impl ControlPlane {
    /// Runs kubectl as the administrator and returns what it prints; panics when it fails.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        match self.try_kubectl(arguments) {
            Ok(output) => output,
            Err(error) => panic!("kubectl {}: {error}", arguments.join(" ")),
        }
    }

    /// Runs kubectl as the administrator.
    ///
    /// # Errors
    /// What kubectl printed to standard error, when it fails.
    pub fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        self.try_kubectl_as(&self.admin_kubeconfig, arguments)
    }

    /// Runs kubectl with a kubeconfig.
    ///
    /// # Errors
    /// What kubectl printed to standard error, when it fails.
    pub fn try_kubectl_as(&self, kubeconfig: &Path, arguments: &[&str]) -> Result<String, String> {
        let output = kubectl()
            .args(arguments)
            .arg("--request-timeout=20s")
            .arg(flag("kubeconfig", kubeconfig))
            .arg(flag("cache-dir", self.scratch.join("kubectl-cache")))
            .env("HOME", self.scratch.path())
            .output()
            .unwrap_or_else(|error| panic!("cannot start kubectl: {error}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// kubectl as a process to start in a test's own time, for watches; its output goes to a file of the control plane.
    #[must_use]
    pub fn kubectl_command(&self, kubeconfig: &Path, arguments: &[&str]) -> ProcessCommand {
        ProcessCommand::new(cluster_binary(), self.scratch.join(format!("kubectl-{}.log", self.next_number())))
            .argument("kubectl")
            .arguments(arguments)
            .flag("kubeconfig", kubeconfig)
            .flag("cache-dir", self.scratch.join("kubectl-cache"))
            .environment("HOME", self.scratch.path())
    }

    /// Runs kubectl as the administrator and parses the JSON that it prints; `arguments` should ask for `-o json`.
    #[track_caller]
    pub fn kubectl_json(&self, arguments: &[&str]) -> Value {
        let output = self.kubectl(arguments);
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("kubectl {}: {error}", arguments.join(" ")))
    }
}

fn flag(name: &str, path: impl AsRef<Path>) -> String {
    format!("--{name}={}", path.as_ref().display())
}
