//! A node whose clients use the credential proxy, with the real control plane.

use std::path::PathBuf;

use pintle_test_support::{Agent, BootstrapCredential, ControlPlane, ReservedPorts};
use serde_json::Value;

use super::{DEADLINE, Node, events};

/// A node whose agent runs the proxy. The caller provides the device's configuration.
pub(crate) struct Served {
    pub(crate) node: Node,
    _port: ReservedPorts,
}

impl Served {
    pub(crate) fn new(
        mut node: Node,
        environment: Vec<(&'static str, PathBuf)>,
        table: &str,
        cluster: &ControlPlane,
        drain: &str,
    ) -> Self {
        let port = ReservedPorts::one();
        let path = |name: &str| node.scratch.join(name).display().to_string();
        let proxy = format!(
            "[proxy]\nlisten = \"127.0.0.1:{}\"\ndrain = \"{drain}\"\nruntime-dir = \"{}\"\nkubeconfig = \"{}\"\n",
            port.port(0),
            path("run"),
            path("kubelet.kubeconfig"),
        );
        node.set_environment(environment);
        node.configure("device", &proxy, &[("device", table)]);
        let bootstrap = cluster.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
        node.bootstrap_with(&std::fs::read_to_string(bootstrap).expect("the bootstrap kubeconfig"));
        Self { node, _port: port }
    }

    /// The kubeconfig that pintle writes for the local client.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.node.scratch.join("kubelet.kubeconfig")
    }

    /// Starts the agent, and waits until its proxy uses the first certificate.
    pub(crate) fn start(&self) -> Agent {
        let mut agent = self.node.start();
        agent.wait_for_log("the proxy uses the first certificate", DEADLINE, |line| line["event"] == "proxy_swapped");
        agent
    }

    /// Rotates, and waits until the proxy uses the next certificate.
    #[track_caller]
    pub(crate) fn rotate(&self, agent: &mut Agent) {
        let swapped = events(agent, "proxy_swapped");
        self.node.rotate();
        agent.wait_for("the proxy uses the next certificate", DEADLINE, |agent| {
            (events(agent, "proxy_swapped") > swapped).then_some(())
        });
    }

    /// The proxy's part of `pintle status`.
    #[track_caller]
    pub(crate) fn proxy(&self) -> Value {
        self.node.status().expect("the agent answers")["proxy"].clone()
    }
}
