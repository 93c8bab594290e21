//! A node that kubeadm has joined to a cluster, with the kubelet as a systemd service.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use pintle_test_support::{ControlPlane, ScratchDirectory, cluster_binary, eventually};

use super::machine::Machine;
use super::succeed;

/// The files of Kubernetes' Debian packages (kubernetes/release, cmd/krel/templates/latest).
const KUBELET_SERVICE: &str = include_str!("kubernetes/kubelet.service");
const KUBEADM_CONF: &str = include_str!("kubernetes/10-kubeadm.conf");
const CONTAINERD_SERVICE: &str = include_str!("kubernetes/containerd.service");
const CLUSTER: &str = include_str!("kubernetes/kubeadm.yaml");
const TOKEN: &str = "abcdef.0123456789abcdef";
/// For operations that take seconds.
const DEADLINE: Duration = Duration::from_secs(120);

/// The path of the multi-call binary with Kubernetes' programs, here and on the machine.
pub(crate) fn programs() -> (PathBuf, &'static str) {
    (cluster_binary(), "/usr/lib/kubernetes/cluster")
}

/// Installs Kubernetes' programs, which are all the same binary.
pub(crate) fn install(machine: &Machine) {
    // Its preflight checks require control groups for containers, IP forwarding, and Internet access.
    let unchecked = "case $1 in join | upgrade) set -- \"$@\" --ignore-preflight-errors=all ;; esac\n";
    for (program, first) in [("kubeadm", unchecked), ("kubelet", ""), ("kubectl", "")] {
        let script = format!("#!/bin/sh\n{first}exec {} {program} \"$@\"\n", programs().1);
        machine.write(&format!("/usr/bin/{program}"), 0o755, script);
    }
}

/// Joins the machine to the cluster, and waits until the node is Ready. Installs the administrator's kubeconfig on
/// it.
pub(crate) fn join(machine: &Machine, cluster: &ControlPlane) {
    let server = cluster.server_url().trim_start_matches("https://");
    let port = server.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("the API server has a port");
    machine.network().reach(port);
    install(machine);
    machine.write("/usr/lib/systemd/system/containerd.service", 0o644, CONTAINERD_SERVICE);
    machine.write("/usr/lib/systemd/system/kubelet.service", 0o644, KUBELET_SERVICE);
    machine.write("/usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf", 0o644, KUBEADM_CONF);
    std::fs::create_dir_all(machine.path("/etc/kubernetes/manifests")).expect("the directory is made");
    // With only a loopback interface, the kubelet cannot determine its address.
    machine.write("/etc/default/kubelet", 0o644, "KUBELET_EXTRA_ARGS=--node-ip=127.0.0.1\n");
    let administrator = prepare(cluster, server);
    machine.write("/root/.kube/config", 0o600, administrator);
    machine.run(&["systemctl", "daemon-reload"]);
    machine.run(&["systemctl", "enable", "--now", "containerd.service"]);
    machine.run(&["systemctl", "enable", "kubelet.service"]);
    let discovery = "--discovery-token-unsafe-skip-ca-verification";
    machine.run(&["kubeadm", "join", server, "--token", TOKEN, discovery]);
    wait_ready(cluster, machine.name());
}

/// Waits until the kubelet reports Ready to the cluster from now on.
pub(crate) fn wait_ready(cluster: &ControlPlane, node: &str) {
    let condition = || {
        let path = r#"jsonpath={range .status.conditions[?(@.type=="Ready")]}{.lastHeartbeatTime} {.status}{end}"#;
        let said = cluster.try_kubectl(&["get", "node", node, "-o", path]).unwrap_or_default();
        said.split_once(' ').map(|(heard, status)| (heard.to_owned(), status.to_owned()))
    };
    let before = condition().map(|(heard, _)| heard).unwrap_or_default();
    eventually("the node is Ready", DEADLINE, || {
        condition().filter(|(heard, status)| *heard > before && status == "True").map(drop)
    });
}

/// Creates what `kubeadm init` creates for nodes: ConfigMaps, a bootstrap token, and its permissions. Returns the
/// administrator's kubeconfig, with inline data.
fn prepare(cluster: &ControlPlane, server: &str) -> String {
    let scratch = ScratchDirectory::new();
    let administrator = cluster.kubectl(&["config", "view", "--raw", "--flatten"]);
    let kubeconfig = scratch.write("administrator.kubeconfig", &administrator);
    let version = cluster.kubectl_json(&["version", "-o", "json"])["serverVersion"]["gitVersion"].clone();
    let version = version.as_str().expect("the API server says its version");
    let text = CLUSTER.replace("SERVER", server).replace("TOKEN", TOKEN).replace("VERSION", version);
    let configuration = scratch.write("kubeadm.yaml", text);
    for phase in [&["upload-config", "all"][..], &["bootstrap-token"]] {
        let mut command = Command::new(cluster_binary());
        command.args(["kubeadm", "init", "phase"]).args(phase);
        command.arg("--config").arg(&configuration).arg("--kubeconfig").arg(&kubeconfig);
        succeed(command.env("HOME", scratch.path()));
    }
    eventually("the bootstrap signer has signed for the token", DEADLINE, || {
        let signed = cluster.kubectl(&["get", "configmap", "cluster-info", "-n", "kube-public", "-o", "yaml"]);
        signed.contains("jws-kubeconfig-").then_some(())
    });
    administrator
}
