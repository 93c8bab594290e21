//! The API server as the held identity, or as the bootstrap credential.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pintle_agent_core::rotation::{ApiFailure, Authority};
use pintle_agent_core::{Credential, KeyName};
use pintle_plugins_api::BackendError;
use tokio::sync::oneshot;

use super::changes::SeenFiles;
use crate::config::IdentityConfig;
use crate::consumers::kubeconfig::Kubeconfig;
use crate::keys::{HeldCertificate, Keyring, certified_key};
use crate::kubernetes::{Api, Cluster, ClusterError};

/// One client for each authority, made when it is first needed.
///
/// The client of the held identity belongs to one certificate: a new certificate gets a new client with connections of
/// its own, and the old one is dropped, connections and all (case C19).
#[derive(Default)]
pub(super) struct Connections {
    held: Option<([u8; 32], Arc<Api>)>,
    bootstrap: Option<Arc<Api>>,
    connecting: Option<Connecting>,
    /// The files of the bootstrap credential as they were when it was last read.
    seen: Option<SeenFiles>,
}

/// A bootstrap credential that is being obtained. One at a time: an exec plugin that hangs would otherwise be started
/// again and again.
struct Connecting {
    answer: oneshot::Receiver<Result<Api, ClusterError>>,
}

/// An exec plugin that takes longer is said to hang. It is waited for all the same.
const CREDENTIAL_TIMEOUT: Duration = Duration::from_secs(30);

impl Connections {
    /// The API server as this credential.
    pub(super) async fn held(
        &mut self,
        config: &IdentityConfig,
        keyring: &Keyring,
        credential: &Credential,
    ) -> Result<Arc<Api>, ApiFailure> {
        if let Some((fingerprint, api)) = &self.held
            && fingerprint == credential.fingerprint()
        {
            return Ok(Arc::clone(api));
        }
        let api = self.fresh(config, keyring, credential).await?;
        self.held = Some((*credential.fingerprint(), Arc::clone(&api)));
        Ok(api)
    }

    /// The API server as this credential, over a connection of its own.
    pub(super) async fn fresh(
        &self,
        config: &IdentityConfig,
        keyring: &Keyring,
        credential: &Credential,
    ) -> Result<Arc<Api>, ApiFailure> {
        let key = certified_key(credential, keyring).map_err(|error| ApiFailure::NoCredential(error.to_string()))?;
        let cluster = self.cluster(config).await?;
        let api = cluster
            .connect_with(Arc::new(HeldCertificate(key)))
            .map_err(|error| ApiFailure::NoCredential(error.to_string()))?;
        Ok(Arc::new(api))
    }

    /// Keeps the client with which this credential was proven: it is the held one next.
    pub(super) fn keep(&mut self, credential: &Credential, api: Arc<Api>) {
        self.held = Some((*credential.fingerprint(), api));
    }

    /// The API server as the bootstrap credential. The kubeconfig is read anew after each failure, so a credential that
    /// was replaced is noticed; one that was deleted after it was read goes on being used (case C23).
    pub(super) async fn bootstrap(&mut self, config: &IdentityConfig) -> Result<Arc<Api>, ApiFailure> {
        if let Some(api) = &self.bootstrap {
            return Ok(Arc::clone(api));
        }
        let Some(path) = &config.bootstrap_kubeconfig else {
            return Err(ApiFailure::NoCredential("there is no certificate and no bootstrap kubeconfig".to_owned()));
        };
        let no_credential = |error: ClusterError| ApiFailure::NoCredential(error.to_string());
        // Another kubeconfig is worth another try.
        let unchanged = self.seen.as_ref().is_some_and(|seen| !seen.changed());
        let mut connecting = match self.connecting.take().filter(|_| unchanged) {
            Some(connecting) => connecting,
            None => {
                let seen = self.seen.insert(SeenFiles::default());
                seen.note(path);
                let cluster = Cluster::read(path).await.map_err(no_credential)?;
                cluster.token_file().into_iter().for_each(|token| seen.note(&token));
                Connecting { answer: cluster.connect() }
            }
        };
        let api = match tokio::time::timeout(CREDENTIAL_TIMEOUT, &mut connecting.answer).await {
            Ok(Ok(answer)) => Arc::new(answer.map_err(no_credential)?),
            Ok(Err(_)) => return Err(ApiFailure::NoCredential("the thread that asks for it has ended".to_owned())),
            Err(_) => {
                self.connecting = Some(connecting);
                let (path, limit) = (path.display(), CREDENTIAL_TIMEOUT.as_secs());
                let detail =
                    format!("the kubeconfig {path} has given no credential within {limit} s: its exec plugin hangs");
                return Err(ApiFailure::NoCredential(detail));
            }
        };
        if !config.kubeconfig.exists() {
            let kept = config.cluster_kubeconfig();
            Kubeconfig::for_cluster_of(path).and_then(|kubeconfig| kubeconfig.write(&kept, None)).map_err(|error| {
                ApiFailure::NoCredential(format!("the cluster of {} cannot be kept: {error}", path.display()))
            })?;
        }
        self.bootstrap = Some(Arc::clone(&api));
        Ok(api)
    }

    /// Where the API server is: the kubelet's kubeconfig says so, and before there is one, the bootstrap kubeconfig or
    /// what was kept of it. One that is torn or makes no sense is as good as none.
    pub(super) async fn cluster(&self, config: &IdentityConfig) -> Result<Cluster, ApiFailure> {
        let mut found = Cluster::read(&config.kubeconfig).await;
        for path in config.bootstrap_kubeconfig.iter().chain([&config.cluster_kubeconfig()]) {
            let Err(error) = &found else { break };
            let other = Cluster::read(path).await;
            // Of two that cannot be used, the one that exists says more.
            if other.is_ok() || error.missing {
                found = other;
            }
        }
        found.map_err(|error| ApiFailure::NoCredential(error.to_string()))
    }

    /// Forgets a client after a failure, unless it may be the only way to go on.
    pub(super) fn forget(&mut self, config: &IdentityConfig, authority: Authority) {
        match authority {
            Authority::Held => self.held = None,
            // Each proof has a client of its own.
            Authority::Issued => {}
            Authority::Bootstrap if config.bootstrap_kubeconfig.as_ref().is_some_and(|path| path.exists()) => {
                self.bootstrap = None;
            }
            Authority::Bootstrap => {}
        }
    }

    /// Notes the bootstrap kubeconfig as it is, so that another one is noticed also before this one is read.
    pub(super) fn note_bootstrap(&mut self, path: &Path) {
        self.seen.get_or_insert_default().note(path);
    }

    /// Whether the bootstrap credential was replaced since it was last read; each change is told of once.
    pub(super) fn bootstrap_changed(&mut self) -> bool {
        self.seen.take_if(|seen| seen.changed()).is_some()
    }

    /// Drops the bootstrap client, which is not needed while a certificate is held.
    pub(super) fn close_bootstrap(&mut self) {
        self.bootstrap = None;
    }
}

/// Whether the key of this name is in its backend, and is the one that this certificate is for.
pub(super) async fn check_key(
    keyring: &Keyring,
    key: &KeyName,
    subject_public_key_info: &[u8],
) -> Result<bool, BackendError> {
    Ok(keyring.public_key(key).await?.as_der() == subject_public_key_info)
}
