//! The clients with which an identity asks the API server: as itself, and as the bootstrap credential.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use pintle_agent_core::Credential;
use pintle_agent_core::rotation::ApiFailure;
use tokio::sync::oneshot;

use crate::config::IdentityConfig;
use crate::consumers::kubeconfig::Kubeconfig;
use crate::keys::{HeldCertificate, Keyring, certified_key};
use crate::kubernetes::port::{ApiClient, ApiServer, Caller};
use crate::kubernetes::{Api, Cluster};
use crate::store::FileStamp;
use crate::world::task::{self, timeout};
use crate::world::{Files as _, SystemFiles};

/// An exec plugin that takes longer is said to hang. It is waited for all the same.
const CREDENTIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// One client for each caller, made when it is first needed.
///
/// The client of a certificate belongs to it alone: a new certificate gets a new client with connections of its own, and
/// the old one is dropped, connections and all (case C19).
pub(super) struct Connections {
    config: IdentityConfig,
    keyring: Keyring,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// By the fingerprint of the certificate.
    certificates: BTreeMap<[u8; 32], Arc<Api>>,
    bootstrap: Option<Arc<Api>>,
    connecting: Option<Connecting>,
    /// The files of the bootstrap credential as they were when it was last read.
    seen: Option<SeenFiles>,
}

/// A bootstrap credential that is being obtained. One at a time: an exec plugin that hangs would otherwise be started
/// again and again.
struct Connecting {
    answer: oneshot::Receiver<Result<Api, ApiFailure>>,
}

/// Files as they were when they were last read.
#[derive(Default)]
struct SeenFiles(Vec<(PathBuf, Option<FileStamp>)>);

impl SeenFiles {
    /// Notes a file as it is before it is read.
    fn note(&mut self, path: &Path) {
        self.0.push((path.to_owned(), FileStamp::of(&SystemFiles, path)));
    }

    /// Whether one of them is another now, or is there, or is gone.
    fn changed(&self) -> bool {
        self.0.iter().any(|(path, stamp)| FileStamp::of(&SystemFiles, path) != *stamp)
    }
}

impl Connections {
    /// The clients of this identity, none of which is made yet. The bootstrap kubeconfig counts as it is now: another one
    /// is noticed also before this one is read.
    pub(super) fn new(config: IdentityConfig, keyring: Keyring) -> Self {
        let mut known = Known::default();
        if let Some(path) = &config.bootstrap_kubeconfig {
            known.seen.get_or_insert_default().note(path);
        }
        Self { config, keyring, known: Mutex::new(known) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn as_certificate(&self, credential: &Credential) -> Result<Arc<Api>, ApiFailure> {
        if let Some(api) = self.known().certificates.get(credential.fingerprint()) {
            return Ok(Arc::clone(api));
        }
        let no_credential = |error: &dyn std::fmt::Display| ApiFailure::NoCredential(error.to_string());
        let key = certified_key(credential, &self.keyring).map_err(|error| no_credential(&error))?;
        let cluster = self.cluster().await?;
        let api =
            Arc::new(cluster.connect_with(Arc::new(HeldCertificate(key))).map_err(|error| no_credential(&error))?);
        self.known().certificates.insert(*credential.fingerprint(), Arc::clone(&api));
        Ok(api)
    }

    /// The kubeconfig is read anew after each failure, so a credential that was replaced is noticed; one that was deleted
    /// after it was read goes on being used (case C23).
    async fn as_bootstrap(&self) -> Result<Arc<Api>, ApiFailure> {
        if let Some(api) = &self.known().bootstrap {
            return Ok(Arc::clone(api));
        }
        let Some(path) = &self.config.bootstrap_kubeconfig else {
            return Err(ApiFailure::NoCredential("there is no certificate and no bootstrap kubeconfig".to_owned()));
        };
        self.begin_bootstrap(path)?;
        let Some(mut connecting) = self.known().connecting.take() else {
            return Err(ApiFailure::NoCredential("another call waits for the credential".to_owned()));
        };
        let api = match timeout(CREDENTIAL_TIMEOUT, &mut connecting.answer).await {
            Ok(Ok(answer)) => Arc::new(answer?),
            Ok(Err(_)) => return Err(ApiFailure::NoCredential("the thread that asks for it has ended".to_owned())),
            Err(_) => {
                self.known().connecting = Some(connecting);
                let (path, limit) = (path.display(), CREDENTIAL_TIMEOUT.as_secs());
                let detail =
                    format!("the kubeconfig {path} has given no credential within {limit} s: its exec plugin hangs");
                return Err(ApiFailure::NoCredential(detail));
            }
        };
        self.known().bootstrap = Some(Arc::clone(&api));
        Ok(api)
    }

    /// Begins to obtain the bootstrap credential, unless that has begun already, and nothing has changed since: another
    /// kubeconfig is worth another try.
    fn begin_bootstrap(&self, path: &Path) -> Result<(), ApiFailure> {
        let mut known = self.known();
        let unchanged = known.seen.as_ref().is_some_and(|seen| !seen.changed());
        if unchanged && known.connecting.is_some() {
            return Ok(());
        }
        let mut seen = SeenFiles::default();
        seen.note(path);
        known.seen = Some(seen);
        let cluster = Cluster::read(path).map_err(|error| ApiFailure::NoCredential(error.to_string()))?;
        if let Some(seen) = &mut known.seen {
            cluster.token_file().into_iter().for_each(|token| seen.note(&token));
        }
        let kept = (!SystemFiles.exists(&self.config.kubeconfig)).then(|| self.config.cluster_kubeconfig());
        let (sender, answer) = oneshot::channel();
        task::spawn_thread(move || {
            // Nobody may be waiting any more.
            let _ = sender.send(connect(&cluster, kept.as_deref()));
        });
        known.connecting = Some(Connecting { answer });
        Ok(())
    }

    /// Where the API server is: the kubelet's kubeconfig says so, and before there is one, the bootstrap kubeconfig or
    /// what was kept of it. One that is torn or invalid is as good as none.
    pub(super) async fn cluster(&self) -> Result<Cluster, ApiFailure> {
        let mut found = Cluster::read(&self.config.kubeconfig);
        for path in self.config.bootstrap_kubeconfig.iter().chain([&self.config.cluster_kubeconfig()]) {
            let Err(error) = &found else { break };
            let other = Cluster::read(path);
            // Of two that cannot be used, the one that exists says more.
            if other.is_ok() || error.missing {
                found = other;
            }
        }
        found.map_err(|error| ApiFailure::NoCredential(error.to_string()))
    }
}

/// A client as the bootstrap credential. Where the cluster is, is kept in a file of our own if one is named: the
/// kubeconfig may be gone when it is needed (case C23).
fn connect(cluster: &Cluster, kept: Option<&Path>) -> Result<Api, ApiFailure> {
    let api = cluster.connect().map_err(|error| ApiFailure::NoCredential(error.to_string()))?;
    if let Some(kept) = kept {
        let written = Kubeconfig::for_cluster_of(&SystemFiles, cluster.source())
            .and_then(|kubeconfig| kubeconfig.write(&SystemFiles, kept, None));
        written.map_err(|error| {
            let source = cluster.source().display();
            ApiFailure::NoCredential(format!("the cluster of {source} cannot be kept: {error}"))
        })?;
    }
    Ok(api)
}

impl ApiServer for Connections {
    fn connect<'a>(&'a self, caller: &'a Caller) -> BoxFuture<'a, Result<Arc<dyn ApiClient>, ApiFailure>> {
        Box::pin(async move {
            let api = match caller {
                Caller::Bootstrap => self.as_bootstrap().await?,
                Caller::Certificate(credential) => self.as_certificate(credential).await?,
            };
            Ok(api as Arc<dyn ApiClient>)
        })
    }

    fn prepare(&self, caller: &Caller) {
        if let (Caller::Bootstrap, Some(path)) = (caller, &self.config.bootstrap_kubeconfig)
            && self.known().bootstrap.is_none()
        {
            // What is wrong is told when a client is asked for.
            let _ = self.begin_bootstrap(path);
        }
    }

    fn forget(&self, caller: &Caller) {
        let bootstrap_exists =
            || self.config.bootstrap_kubeconfig.as_ref().is_some_and(|path| SystemFiles.exists(path));
        let mut known = self.known();
        match caller {
            Caller::Certificate(credential) => {
                known.certificates.remove(credential.fingerprint());
            }
            Caller::Bootstrap if bootstrap_exists() => known.bootstrap = None,
            Caller::Bootstrap => {}
        }
    }

    fn bootstrap_changed(&self) -> bool {
        self.known().seen.take_if(|seen| seen.changed()).is_some()
    }

    fn keep_only(&self, caller: &Caller) {
        let mut known = self.known();
        match caller {
            Caller::Certificate(credential) => {
                known.bootstrap = None;
                known.certificates.retain(|fingerprint, _| fingerprint == credential.fingerprint());
            }
            Caller::Bootstrap => known.certificates.clear(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_written_moved_or_removed_has_changed() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, other) = (directory.path().join("kubeconfig"), directory.path().join("other"));
        let noted = || {
            let mut seen = SeenFiles::default();
            seen.note(&path);
            seen
        };
        let missing = noted();
        std::fs::write(&other, "a").expect("written");
        assert!(!missing.changed());
        // Longer than the kernel's clock for files needs to go on.
        std::thread::sleep(Duration::from_millis(50));
        std::fs::rename(&other, &path).expect("moved");
        assert!(missing.changed());
        let there = noted();
        assert!(!there.changed());
        std::thread::sleep(Duration::from_millis(50));
        std::fs::write(&path, "b").expect("written");
        assert!(there.changed());
        let there = noted();
        std::fs::remove_file(&path).expect("removed");
        assert!(there.changed());
    }
}
