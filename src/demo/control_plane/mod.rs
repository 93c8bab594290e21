//! A Kubernetes control plane inside the process: the CertificateSigningRequest API, its approver and its signer.
//!
//! It serves HTTPS on 127.0.0.1, and is faithful enough for the agent (kube) and an unmodified kubectl: `kubectl get
//! csr [-w]`, `describe csr`, `certificate approve`, `delete csr`, `auth whoami`. Behaviour follows kube-apiserver
//! and kube-controller-manager 1.36; simplifications are documented where they are.
//!
//! # Flow
//! [`start`] creates two CAs in memory (one for serving certificates, one for clients), binds a port, and serves
//! until the [`ControlPlane`] is dropped. A request is stored as an object, the approver approves it after
//! [`Options::approval_delay`], and the signer issues the leaf. Every step is reported as an [`Observation`].
//!
//! # Guarantees
//! A client certificate is checked on every request, not only at the handshake, as in kube-apiserver: once it has
//! expired, requests on an open connection get 401 too.
//!
//! # Assumptions
//! It is used by one process and short-lived: nothing is persisted, and objects are never garbage-collected.

mod api;
mod authentication;
mod authorization;
mod certificate_authority;
mod certification_request;
mod cluster;
mod connection;
mod controllers;
mod faults;
mod kubeconfig;
mod object;
mod observation;
mod registry;
mod server;
mod status;
mod strategy;
mod table;
mod watching;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

use self::cluster::Cluster;
pub use self::faults::Faults;
pub use self::observation::Observation;

/// The settings of the control plane. Everything else is as in Kubernetes.
#[derive(Debug, Clone)]
pub struct Options {
    /// The signer's maximum lifetime, like kube-controller-manager's `--cluster-signing-duration`. May be seconds;
    /// leaves are backdated by five minutes regardless.
    pub cluster_signing_duration: Duration,
    /// Leave every request Pending until it is approved manually (`kubectl certificate approve NAME`).
    pub manual_approval: bool,
    /// How long a request stays Pending before it is approved, so that watchers can see it.
    pub approval_delay: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cluster_signing_duration: Duration::from_secs(8760 * 3600),
            manual_approval: false,
            approval_delay: Duration::from_millis(500),
        }
    }
}

/// A running control plane. Dropping it closes the port and every connection.
pub struct ControlPlane {
    cluster: Arc<Cluster>,
    address: SocketAddr,
    listening: watch::Receiver<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ControlPlane").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Starts a control plane on a free port of 127.0.0.1.
///
/// # Errors
/// If no key can be generated or no port bound.
pub async fn start(options: Options) -> io::Result<ControlPlane> {
    let cluster = Arc::new(Cluster::new(options)?);
    let (address, listening, serving) = server::start(Arc::clone(&cluster)).await?;
    let controllers = tokio::spawn(controllers::run(Arc::clone(&cluster)));
    Ok(ControlPlane { cluster, address, listening, tasks: vec![serving, controllers] })
}

impl ControlPlane {
    /// `https://127.0.0.1:PORT`, for the `server` field of a kubeconfig.
    #[must_use]
    pub fn server_url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The CA certificate (PEM) of the server. Not changed by [`ControlPlane::replace_client_certificate_authority`].
    #[must_use]
    pub fn certificate_authority_pem(&self) -> &str {
        self.cluster.serving_authority_pem()
    }

    /// The CA certificate (PEM) that client certificates are currently signed and verified with.
    #[must_use]
    pub fn client_certificate_authority_pem(&self) -> String {
        self.cluster.client_authority().certificate_pem().to_owned()
    }

    /// A kubeconfig (YAML) with a bootstrap token: user `system:bootstrap:ID`, group `system:bootstrappers`.
    #[must_use]
    pub fn bootstrap_kubeconfig(&self) -> String {
        kubeconfig::with_token(&self.server_url(), self.certificate_authority_pem(), self.cluster.bootstrap_token())
    }

    /// A kubeconfig (YAML) for kubectl with an inline client certificate in group `system:masters`, issued by the
    /// current client CA.
    ///
    /// # Errors
    /// If no key can be generated.
    pub fn admin_kubeconfig(&self) -> io::Result<String> {
        self.client_kubeconfig("kubernetes-admin", &["system:masters"], Duration::from_secs(8760 * 3600))
    }

    /// A kubeconfig (YAML) with an inline client certificate: `user` is its CN, and `groups` its O (at most one,
    /// because the DN encoder supports one value per type).
    ///
    /// # Errors
    /// If no key can be generated, or there is more than one group.
    pub fn client_kubeconfig(&self, user: &str, groups: &[&str], life: Duration) -> io::Result<String> {
        let pair = self.cluster.client_authority().issue_client_pair(user, groups, life)?;
        Ok(kubeconfig::with_client_certificate(&self.server_url(), self.certificate_authority_pem(), &pair))
    }

    /// Subscribes to observations from now on. A receiver that falls more than 1024 behind loses the oldest.
    #[must_use]
    pub fn observe(&self) -> broadcast::Receiver<Observation> {
        self.cluster.observe()
    }

    /// The stored requests, sorted by name.
    #[must_use]
    pub fn certificate_signing_requests(&self) -> Vec<CertificateSigningRequest> {
        self.cluster.registry.list().1.iter().map(|object| (**object).clone()).collect()
    }

    /// The current faults. Counted faults show how many are left.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.cluster.faults.borrow().clone()
    }

    /// Changes the faults, with effect for requests that arrive afterwards.
    pub fn change_faults(&self, change: impl FnOnce(&mut Faults)) {
        self.cluster.faults.send_modify(change);
    }

    /// Closes the port and every connection, and returns when they are closed. The port stays reserved.
    pub async fn go_away(&self) {
        self.change_faults(|faults| faults.unreachable = true);
        self.until_listening_is(false).await;
    }

    /// Listens on the same port again, and returns once connections are accepted.
    pub async fn come_back(&self) {
        self.change_faults(|faults| faults.unreachable = false);
        self.until_listening_is(true).await;
    }

    async fn until_listening_is(&self, wanted: bool) {
        // Fails only if the server's task has ended, which happens when self is dropped.
        let _ = self.listening.clone().wait_for(|listening| *listening == wanted).await;
    }

    /// Deletes a request, as an administrator or the cleaner controller would. Returns false if there is none with
    /// that name.
    pub fn delete_certificate_signing_request(&self, name: &str) -> bool {
        self.cluster.delete(name, None).is_ok()
    }

    /// Replaces the client CA: certificates issued before get 401 from now on. Bootstrap tokens continue to work.
    ///
    /// # Errors
    /// If no key can be generated.
    pub fn replace_client_certificate_authority(&self) -> io::Result<()> {
        self.cluster.replace_client_authority()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
