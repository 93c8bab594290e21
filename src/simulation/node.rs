//! The nodes: processes that run the real loop of an identity, are started, killed, and started again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pintle_agent_core::State as Rotation;
use pintle_plugins_api::KeyAlgorithm;
use tokio::sync::{mpsc, watch};

use super::time::Task;
use super::world::{BACKENDS, NodeClock, Route, World, keyring};
use crate::config::{IdentityConfig, IdentityKind, NodeConfig};
use crate::identity::ports::Ports;
use crate::identity::report::status_of;
use crate::identity::{Agent, Command, Parts};
use crate::telemetry::{Log, Status, Telemetry};

/// The link to the current pair on every node.
pub(super) const CURRENT: &str = "/pki/kubelet-client-current.pem";
/// The journal on every node.
pub(super) const JOURNAL: &str = "/state/client.json";
const BOOTSTRAP: &str = "/etc/bootstrap.kubeconfig";

/// One node, whether or not its process runs.
pub(super) struct Node {
    pub(super) number: usize,
    pub(super) config: IdentityConfig,
    /// How to reach the process.
    pub(super) commands: Option<mpsc::Sender<Command>>,
    status: Option<watch::Receiver<Status>>,
}

impl Node {
    pub(super) fn new(world: &World, number: usize) -> Self {
        let node = Arc::new(NodeConfig {
            name: format!("node-{number}"),
            state_dir: "/state".into(),
            backends: BACKENDS.into_iter().map(|name| (name.to_owned(), file_backend())).collect(),
            metrics_address: None,
        });
        let config = IdentityConfig {
            node,
            name: "client".to_owned(),
            kind: IdentityKind::KubeletClient,
            kubeconfig: "/etc/kubeconfig".into(),
            owns_kubeconfig: true,
            bootstrap_kubeconfig: Some(BOOTSTRAP.into()),
            cert_dir: "/pki".into(),
            rotate_certificates: true,
            client_ca_file: None,
            keep_pairs: 2,
            backend: BACKENDS[number % 2].to_owned(),
            configured_backend: BACKENDS[number % 2].to_owned(),
            key_algorithm: KeyAlgorithm::Ed25519,
            expiration_seconds: None,
            enrol_after_key_loss: true,
            proxy: None,
        };
        let kubeconfig = "clusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}]\n\
                          users: [{name: u, user: {token: a.b}}]\n\
                          contexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n";
        let disk = world.lock().nodes[number].disk.clone();
        disk.put(Path::new(BOOTSTRAP), kubeconfig.as_bytes());
        Self { number, config, commands: None, status: None }
    }

    /// A process of this node: it ends only by a crash, or where it cannot be started.
    pub(super) fn process(&mut self, world: &Arc<World>) -> Task {
        let status = status_of(&Rotation::default(), &self.config);
        let telemetry = Arc::new(Telemetry::new(Log::silent()).for_identity(status));
        self.status = Some(telemetry.status());
        let (sender, commands) = mpsc::channel(8);
        self.commands = Some(sender);
        let (config, world, number) = (self.config.clone(), Arc::clone(world), self.number);
        Task::new(async move {
            let keyring = keyring(&world, number);
            let for_installation = Arc::clone(&world);
            let ports = Ports {
                clock: Arc::new(NodeClock { world: Arc::clone(&world), node: number }),
                files: Arc::new(world.lock().nodes[number].disk.clone()),
                api: Arc::new(Route { world: Arc::clone(&world), node: number, keyring: keyring.clone() }),
                keyring,
                installation: Arc::new(move || Ok(format!("{:08x}", for_installation.lock().random.below(1 << 32)))),
                proxy: None,
            };
            let installed = watch::Sender::new(false);
            match Agent::start(Parts { config, ports, telemetry, commands, installed }).await {
                Ok(agent) => {
                    let (_stop, stopping) = watch::channel(false);
                    agent.run(stopping).await;
                }
                Err(error) => {
                    world.visit(format!("start refused: {}", error.detail.split(':').next().unwrap_or_default()));
                    world.timers.sleep(Duration::from_secs(10)).await;
                }
            }
        })
    }

    /// What the process says of itself.
    pub(super) fn status(&self) -> Status {
        self.status.as_ref().map(|status| status.borrow().clone()).unwrap_or_default()
    }
}

fn file_backend() -> crate::config::BackendConfiguration {
    crate::config::BackendConfiguration::File { directory: Some(PathBuf::from("/nowhere")) }
}
