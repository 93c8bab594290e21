//! A Kubernetes control plane inside the process: the CertificateSigningRequest API, its approver and its signer.
//!
//! It speaks HTTPS on 127.0.0.1 and is faithful enough that the agent (kube) and an unmodified kubectl work against
//! it: `kubectl get csr [-w]`, `describe csr`, `certificate approve`, `delete csr`, `auth whoami`. Behaviour follows
//! kube-apiserver and kube-controller-manager 1.36; where it is simpler, the item says so.
//!
//! # Flow
//! [`start`] makes two certificate authorities in memory (one for the serving certificate, one for clients), binds a
//! port and answers until the [`ControlPlane`] is dropped. A request becomes a stored object, the approver approves
//! it after [`Options::approval_delay`], the signer issues the leaf, and every step is an [`Observation`].
//!
//! # Guarantees
//! A client certificate is checked on every request, not only at the handshake, as kube-apiserver does: once
//! notAfter has passed, an open connection gets 401 like a new one.
//!
//! # Assumptions
//! One process uses it and throws it away: nothing is stored, and objects are never garbage-collected.

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

/// How the control plane behaves; everything else is as Kubernetes has it.
#[derive(Debug, Clone)]
pub struct Options {
    /// The longest life that the signer grants, as kube-controller-manager's `--cluster-signing-duration`.
    /// Seconds-long lives are possible; leaves are backdated by five minutes all the same.
    pub cluster_signing_duration: Duration,
    /// Leave every request Pending until somebody approves it (`kubectl certificate approve NAME`).
    pub manual_approval: bool,
    /// How long the approver lets a request be Pending, so that a watcher can see it.
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
/// When no key can be generated or no port bound.
pub async fn start(options: Options) -> io::Result<ControlPlane> {
    let cluster = Arc::new(Cluster::new(options)?);
    let (address, listening, serving) = server::start(Arc::clone(&cluster)).await?;
    let controllers = tokio::spawn(controllers::run(Arc::clone(&cluster)));
    Ok(ControlPlane { cluster, address, listening, tasks: vec![serving, controllers] })
}

impl ControlPlane {
    /// `https://127.0.0.1:PORT`, as a kubeconfig's `server`.
    #[must_use]
    pub fn server_url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The certificate (PEM) that a client verifies the server by. [`ControlPlane::replace_client_certificate_authority`]
    /// leaves it as it is.
    #[must_use]
    pub fn certificate_authority_pem(&self) -> &str {
        self.cluster.serving_authority_pem()
    }

    /// The certificate (PEM) of the authority that signs and verifies client certificates at present.
    #[must_use]
    pub fn client_certificate_authority_pem(&self) -> String {
        self.cluster.client_authority().certificate_pem().to_owned()
    }

    /// A kubeconfig (YAML) with a bootstrap token: user `system:bootstrap:ID`, group `system:bootstrappers`.
    #[must_use]
    pub fn bootstrap_kubeconfig(&self) -> String {
        kubeconfig::with_token(&self.server_url(), self.certificate_authority_pem(), self.cluster.bootstrap_token())
    }

    /// A kubeconfig (YAML) for kubectl with an inline client certificate in group `system:masters`, by the present
    /// client certificate authority.
    ///
    /// # Errors
    /// When no key can be generated.
    pub fn admin_kubeconfig(&self) -> io::Result<String> {
        self.client_kubeconfig("kubernetes-admin", &["system:masters"], Duration::from_secs(8760 * 3600))
    }

    /// A kubeconfig (YAML) with an inline client certificate: `user` is its CN, `groups` its O (at most one, because
    /// the encoder of distinguished names holds one value a type).
    ///
    /// # Errors
    /// When no key can be generated, or more than one group is asked for.
    pub fn client_kubeconfig(&self, user: &str, groups: &[&str], life: Duration) -> io::Result<String> {
        let pair = self.cluster.client_authority().issue_client_pair(user, groups, life)?;
        Ok(kubeconfig::with_client_certificate(&self.server_url(), self.certificate_authority_pem(), &pair))
    }

    /// What the server sees from now on. A reader that falls more than 1024 behind is told that it lagged.
    #[must_use]
    pub fn observe(&self) -> broadcast::Receiver<Observation> {
        self.cluster.observe()
    }

    /// The stored requests, in order of name.
    #[must_use]
    pub fn certificate_signing_requests(&self) -> Vec<CertificateSigningRequest> {
        self.cluster.registry.list().1.iter().map(|object| (**object).clone()).collect()
    }

    /// The faults as they stand: those that count down show what is left.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.cluster.faults.borrow().clone()
    }

    /// Changes the faults; requests that arrive afterwards meet the new ones.
    pub fn change_faults(&self, change: impl FnOnce(&mut Faults)) {
        self.cluster.faults.send_modify(change);
    }

    /// Closes the port and every connection, and returns when that is done. The port stays reserved.
    pub async fn go_away(&self) {
        self.change_faults(|faults| faults.unreachable = true);
        self.until_listening_is(false).await;
    }

    /// Listens on the same port again, and returns when connections are accepted.
    pub async fn come_back(&self) {
        self.change_faults(|faults| faults.unreachable = false);
        self.until_listening_is(true).await;
    }

    async fn until_listening_is(&self, wanted: bool) {
        // An error means that the server's task has ended, which it does only when self is dropped.
        let _ = self.listening.clone().wait_for(|listening| *listening == wanted).await;
    }

    /// Removes a request, as an administrator or the cleaner would. False when there is none of that name.
    pub fn delete_certificate_signing_request(&self, name: &str) -> bool {
        self.cluster.delete(name, None).is_ok()
    }

    /// Replaces the authority that signs and verifies client certificates: every certificate issued before gets 401
    /// from now on. Bootstrap tokens go on working.
    ///
    /// # Errors
    /// When no key can be generated.
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
