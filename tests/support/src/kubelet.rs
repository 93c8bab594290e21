//! An unmodified kubelet with a fake container runtime.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::condition::holds_within;
use crate::control_plane::ControlPlane;
use crate::process::{ProcessCommand, TestProcess};
use crate::programs::cluster_binary;
use crate::{ReservedPorts, ScratchDirectory};

/// The settings of a kubelet.
#[derive(Clone, Debug)]
pub struct KubeletOptions {
    /// `--hostname-override`: the node's name.
    pub node_name: String,
    /// `--kubeconfig`. May be missing if there is a bootstrap kubeconfig; the kubelet then writes it.
    pub kubeconfig: PathBuf,
    /// `--bootstrap-kubeconfig`.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// `--cert-dir`; by default a directory of its own.
    pub cert_dir: Option<PathBuf>,
    /// `rotateCertificates`.
    pub rotate_certificates: bool,
}

impl KubeletOptions {
    /// A kubelet that uses `kubeconfig` unchanged and does not rotate.
    #[must_use]
    pub fn new(node_name: impl Into<String>, kubeconfig: impl Into<PathBuf>) -> Self {
        Self {
            node_name: node_name.into(),
            kubeconfig: kubeconfig.into(),
            bootstrap_kubeconfig: None,
            cert_dir: None,
            rotate_certificates: false,
        }
    }
}

/// A running kubelet; stopped on drop. Needs root for a mount namespace.
#[derive(Debug)]
pub struct Kubelet<'a> {
    // Dropped in this order: kubelet, runtime, files.
    process: TestProcess,
    _runtime: TestProcess,
    control_plane: &'a ControlPlane,
    node_name: String,
    command: ProcessCommand,
    _ports: ReservedPorts,
    _scratch: ScratchDirectory,
}

impl<'a> Kubelet<'a> {
    /// Starts a fake container runtime and a kubelet that uses it.
    #[must_use]
    pub fn start(control_plane: &'a ControlPlane, options: &KubeletOptions) -> Self {
        let scratch = ScratchDirectory::new();
        let ports = ReservedPorts::neighbouring(2);
        let socket = scratch.join("runtime.sock");
        let endpoint = format!("unix://{}", socket.display());
        let mut runtime = ProcessCommand::new(cluster_binary(), scratch.join("fake-runtime.log"))
            .argument("fake-runtime")
            .argument(&endpoint)
            .start();
        crate::eventually("the fake container runtime listens", Duration::from_secs(60), || {
            runtime.assert_running();
            socket.exists().then_some(())
        });
        let configuration = configuration(control_plane, options, &scratch, &ports, &endpoint);
        let configuration = scratch.write("kubelet.json", configuration.to_string());
        // Its device plugin socket is in this directory regardless of --root-dir, and two kubelets would both claim
        // it.
        let own_directory = r#"mkdir -p /var/lib/kubelet && mount -t tmpfs tmpfs /var/lib/kubelet && exec "$@""#;
        let mut command = ProcessCommand::new("/bin/sh", scratch.join("kubelet.log"))
            .private_mounts()
            .arguments(["-c", own_directory, "sh"])
            .argument(cluster_binary())
            .argument("kubelet")
            .flag("config", configuration)
            .flag("kubeconfig", &options.kubeconfig)
            .flag("hostname-override", &options.node_name)
            .flag("node-ip", "127.0.0.1")
            .flag("root-dir", scratch.join("root"))
            .flag("cert-dir", options.cert_dir.clone().unwrap_or_else(|| scratch.join("pki")));
        if let Some(bootstrap_kubeconfig) = &options.bootstrap_kubeconfig {
            command = command.flag("bootstrap-kubeconfig", bootstrap_kubeconfig);
        }
        Self {
            process: command.start(),
            _runtime: runtime,
            control_plane,
            node_name: options.node_name.clone(),
            command,
            _ports: ports,
            _scratch: scratch,
        }
    }

    /// The kubelet's process.
    pub fn process(&mut self) -> &mut TestProcess {
        &mut self.process
    }

    /// Kills and restarts the kubelet.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = self.command.start();
    }

    /// Waits until the node is Ready.
    #[track_caller]
    pub fn wait_ready(&mut self, deadline: Duration) {
        let ready = || {
            self.process.assert_running();
            self.is_ready().then_some(())
        };
        if holds_within(deadline, ready).is_none() {
            panic!("not within {deadline:?}: node {} is Ready\n{}", self.node_name, self.last_lines());
        }
    }

    /// Whether the node is currently Ready. The cluster reports this for a while after a kubelet has stopped; check
    /// [`Kubelet::lease_renew_time`] to see if it is running.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let path = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        self.control_plane
            .try_kubectl(&["get", "node", &self.node_name, "-o", path])
            .is_ok_and(|status| status == "True")
    }

    /// `spec.renewTime` of the node's Lease (RFC 3339 with microseconds, so it sorts as text), or `None` if there is
    /// no Lease yet. The kubelet renews it every 10 s.
    #[must_use]
    pub fn lease_renew_time(&self) -> Option<String> {
        let arguments = ["get", "lease", &self.node_name, "-n", "kube-node-lease", "-o", "jsonpath={.spec.renewTime}"];
        self.control_plane.try_kubectl(&arguments).ok().filter(|time| !time.is_empty())
    }

    /// The end of the kubelet's log.
    #[must_use]
    pub fn last_lines(&self) -> String {
        crate::process::last_lines(self.process.output_path())
    }
}

/// A KubeletConfiguration (kubelet.config.k8s.io/v1beta1) that needs neither cgroups, swap nor a container runtime,
/// and uses no directory outside `scratch`.
fn configuration(
    control_plane: &ControlPlane,
    options: &KubeletOptions,
    scratch: &ScratchDirectory,
    ports: &ReservedPorts,
    endpoint: &str,
) -> Value {
    let path = |path: &Path| path.to_string_lossy().into_owned();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "127.0.0.1",
        "port": ports.port(0),
        "healthzBindAddress": "127.0.0.1",
        "healthzPort": ports.port(1),
        "readOnlyPort": 0,
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": false},
            "x509": {"clientCAFile": path(control_plane.certificate_authority())},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "rotateCertificates": options.rotate_certificates,
        "containerRuntimeEndpoint": endpoint,
        "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        "failCgroupV1": false,
        "localStorageCapacityIsolation": false,
        "makeIPTablesUtilChains": false,
        "resolvConf": "",
        "podLogsDir": path(&scratch.join("pod-logs")),
        "volumePluginDir": path(&scratch.join("volume-plugins")),
        // Instead of the default 10 s, so that a test soon sees a Ready node.
        "nodeStatusUpdateFrequency": "2s",
    })
}
