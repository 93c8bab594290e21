//! The credential proxy of an identity: it follows the identity's credential and the cluster of its kubeconfig.

use std::io;
use std::sync::Arc;

use futures::future::BoxFuture;
use pintle_agent_core::Credential;

use super::connections::Connections;
use crate::config::{IdentityConfig, ProxySettings};
use crate::consumers::kubeconfig::Kubeconfig;
use crate::identity::StartError;
use crate::identity::ports::LocalProxy;
use crate::keys::Keyring;
use crate::kubernetes::Cluster;
use crate::proxy::{ActivatedSockets, Epoch, Proxy, ProxyHandle, Upstream};
use crate::telemetry::{Event, Telemetry};
use crate::world::{SystemFiles, User};

/// A running credential proxy, and what its next generations are made of.
pub(super) struct RunningProxy {
    handle: ProxyHandle,
    settings: ProxySettings,
    config: IdentityConfig,
    keyring: Keyring,
    connections: Arc<Connections>,
    telemetry: Arc<Telemetry>,
}

impl RunningProxy {
    /// Starts the proxy, if there is to be one. Its clients wait for the first certificate.
    ///
    /// # Errors
    /// If it cannot listen, or the local client's files cannot be written.
    pub(super) async fn start(
        config: &IdentityConfig,
        keyring: &Keyring,
        connections: &Arc<Connections>,
        telemetry: &Arc<Telemetry>,
        activated: ActivatedSockets,
    ) -> Result<Option<Self>, StartError> {
        let Some(settings) = &config.proxy else { return Ok(None) };
        let configuration = settings.configuration.clone();
        let user = configuration.user;
        let failed = |error: io::Error| StartError {
            detail: format!("the credential proxy cannot be started: {error}"),
            hint: hint(&error, user, "see the table [proxy] of the configuration file"),
        };
        let handle = Proxy::start(configuration, activated, None, Arc::clone(telemetry)).await.map_err(failed)?;
        let proxy = Self {
            handle,
            settings: settings.clone(),
            config: config.clone(),
            keyring: keyring.clone(),
            connections: Arc::clone(connections),
            telemetry: Arc::clone(telemetry),
        };
        let cluster = connections.cluster().await.ok();
        proxy.write_local_kubeconfig(cluster.as_ref().map(Cluster::url)).map_err(|(detail, error)| StartError {
            detail,
            hint: hint(&error, user, "mend or remove the file, or name another as proxy.kubeconfig"),
        })?;
        telemetry.watch_proxy(proxy.handle.gauge());
        Ok(Some(proxy))
    }

    /// Writes the kubeconfig of the proxy's client, if it is to be written and is not as it should be. `upstream` is the
    /// API server's URL, if that is known yet.
    fn write_local_kubeconfig(&self, upstream: Option<&http::Uri>) -> Result<(), (String, io::Error)> {
        let Some(path) = &self.settings.kubeconfig else { return Ok(()) };
        let written = Kubeconfig::read_or_new(&SystemFiles, path).and_then(|mut kubeconfig| {
            kubeconfig.use_proxy(self.handle.local_server(), upstream)?;
            kubeconfig.write(&SystemFiles, path, Some(self.settings.configuration.user))
        });
        let written = written.map_err(|error| {
            (format!("the local client's kubeconfig {} cannot be written: {error}", path.display()), error)
        })?;
        if written {
            self.telemetry.emit(Event::KubeconfigWritten { path: path.display().to_string() });
        }
        Ok(())
    }

    /// The epoch that should replace the current one; `None` if the current one is up to date.
    async fn next_epoch(&self, held: &Credential) -> Result<Option<Epoch>, String> {
        let cluster = self.connections.cluster().await.map_err(|failure| failure.to_string())?;
        // What is only instead of a kubeconfig that is being written just now is no reason to change.
        let follows =
            |current: &Epoch| current.upstream.is_of(&cluster) || cluster.source() != self.config.kubeconfig.as_path();
        if self.handle.current().is_some_and(|current| current.is_of(held) && follows(&current)) {
            return Ok(None);
        }
        if points_at(&cluster, &self.handle) {
            return Err(format!("{} names the proxy itself as the API server", cluster.source().display()));
        }
        // The path in the API server's URL may not have been known before.
        self.write_local_kubeconfig(Some(cluster.url())).map_err(|(detail, _)| detail)?;
        let upstream = Upstream::of(&cluster, &self.settings.api_servers).map_err(|error| error.to_string())?;
        let deadline = self.settings.configuration.signing_deadline;
        let epoch = Epoch::new(held, &self.keyring, deadline, Arc::new(upstream));
        epoch.map(Some).map_err(|error| error.to_string())
    }
}

impl LocalProxy for RunningProxy {
    fn speak_as<'a>(&'a self, credential: &'a Credential) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let next = self.next_epoch(credential).await;
            self.handle.set_certificate_error(next.as_ref().err().cloned().unwrap_or_default());
            if let Some(epoch) = next? {
                self.handle.swap(epoch);
            }
            Ok(())
        })
    }

    fn is_free_of_others(&self, credential: &Credential) -> bool {
        self.handle.current().is_none_or(|current| current.is_of(credential))
    }

    fn wait_until_only_current(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.handle.wait_until_only_current())
    }
}

/// What helps against a failure of the proxy's start: `otherwise`, unless the error says more.
fn hint(error: &io::Error, user: User, otherwise: &str) -> String {
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied if user.uid != 0 => {
            "to give files to proxy.user, and read them again, the service needs CapabilityBoundingSet=CAP_CHOWN \
             CAP_DAC_READ_SEARCH (systemctl edit pintle)"
        }
        io::ErrorKind::PermissionDenied => "run it as root, or with proxy.runtime-dir where it may write",
        // What local_authority refuses to trust.
        io::ErrorKind::NotADirectory => {
            "remove it, or name a directory that only root can write to as proxy.runtime-dir"
        }
        _ => otherwise,
    };
    hint.to_owned()
}

/// Whether this cluster's API server is the proxy: the connection would go round in circles.
fn points_at(cluster: &Cluster, handle: &ProxyHandle) -> bool {
    let (url, address) = (cluster.url(), handle.address());
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let same_host = host == "localhost" || host.parse() == Ok(address.ip());
    same_host && url.port_u16().unwrap_or(443) == address.port()
}
