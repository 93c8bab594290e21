//! The credential proxy as the agent drives it: it follows the identity, and old keys wait for its last connections.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pintle_agent_core::{Credential, Event as Reaction, Policy};

use super::{Agent, StartError, now};
use crate::consumers::kubeconfig::Kubeconfig;
use crate::kubernetes::Cluster;
use crate::proxy::{Activated, Generation, Proxy, ProxyHandle, Upstream};
use crate::telemetry::Event;
use crate::world::User;

impl Agent {
    /// Starts the proxy, if there is to be one. It speaks as the held credential if that is good, and makes clients wait
    /// for the first one otherwise.
    ///
    /// # Errors
    /// If it cannot listen, or the local client's files cannot be written.
    pub async fn start_proxy(&mut self, activated: Activated) -> Result<(), StartError> {
        let Some(settings) = &self.config.proxy else { return Ok(()) };
        let configuration = settings.configuration.clone();
        let user = configuration.user;
        let failed = |error: io::Error| StartError {
            detail: format!("the credential proxy cannot be started: {error}"),
            hint: hint(&error, user, "see the table [proxy] of the configuration file"),
        };
        let handle = Proxy::start(configuration, activated, None, Arc::clone(&self.telemetry)).await.map_err(failed)?;
        let cluster = self.connections.cluster(&self.config).await.ok();
        let upstream = cluster.as_ref().map(Cluster::url);
        self.write_local_kubeconfig(&handle, upstream).map_err(|(detail, error)| StartError {
            detail,
            hint: hint(&error, user, "mend or remove the file, or name another as proxy.kubeconfig"),
        })?;
        self.telemetry.watch_proxy(handle.gauge());
        self.proxy = Some(handle);
        self.update_proxy().await;
        Ok(())
    }

    /// Writes the kubeconfig of the proxy's client, if it is to be written and is not as it should be. `upstream` is the
    /// API server's URL, if that is known yet.
    fn write_local_kubeconfig(
        &self,
        handle: &ProxyHandle,
        upstream: Option<&http::Uri>,
    ) -> Result<(), (String, io::Error)> {
        let Some(settings) = &self.config.proxy else { return Ok(()) };
        let Some(path) = &settings.kubeconfig else { return Ok(()) };
        let written = Kubeconfig::read_or_new(path).and_then(|mut kubeconfig| {
            kubeconfig.use_proxy(handle.local_server(), upstream)?;
            kubeconfig.write(path, Some(settings.configuration.user))
        });
        let written = written.map_err(|error| {
            (format!("the local client's kubeconfig {} cannot be written: {error}", path.display()), error)
        })?;
        if written {
            self.telemetry.emit(Event::KubeconfigWritten { path: path.display().to_string() });
        }
        Ok(())
    }

    /// Has the proxy speak as the held credential to the cluster as its kubeconfig describes it now, if it does not yet.
    /// One that is yet to be proven waits for that, where there is another to speak as.
    pub(super) async fn update_proxy(&self) {
        let (Some(handle), Some(held)) = (&self.proxy, self.state.trusted()) else { return };
        if held.has_expired(now()) {
            return;
        }
        // What fails is tried again at the next look around.
        let next = self.next_generation(handle, held).await;
        handle.note_trouble(next.as_ref().err().cloned().unwrap_or_default());
        if let Ok(Some(generation)) = next {
            handle.swap(generation);
        }
    }

    /// The generation to take the place of the current one; `None` if that is as it should be.
    async fn next_generation(&self, handle: &ProxyHandle, held: &Credential) -> Result<Option<Generation>, String> {
        let Some(settings) = &self.config.proxy else { return Err("there is no table [proxy]".to_owned()) };
        let cluster = self.connections.cluster(&self.config).await.map_err(|failure| failure.to_string())?;
        // What is only instead of a kubeconfig that is being written just now is no reason to change.
        let follows = |current: &Generation| {
            current.upstream.is_of(&cluster) || cluster.source() != self.config.kubeconfig.as_path()
        };
        if handle.current().is_some_and(|current| current.is_of(held) && follows(&current)) {
            return Ok(None);
        }
        if points_at(&cluster, handle) {
            return Err(format!("{} names the proxy itself as the API server", cluster.source().display()));
        }
        // The path in the API server's URL may not have been known before.
        self.write_local_kubeconfig(handle, Some(cluster.url())).map_err(|(detail, _)| detail)?;
        let upstream = Upstream::of(&cluster, &settings.api_servers).map_err(|error| error.to_string())?;
        let (keyring, deadline) = (&self.keyring, settings.configuration.signing_deadline);
        let generation = Generation::new(held, keyring, deadline, Arc::new(upstream));
        generation.map(Some).map_err(|error| error.to_string())
    }

    /// Waits a while for the last connections as earlier certificates; `None` once there are none, or what came up instead.
    pub(super) async fn await_last_connections(&mut self) -> Option<Reaction> {
        /// Something else may have to be looked at meanwhile, the watchdog for one.
        const HOP: Duration = Policy::LOCAL_RETRY;
        self.update_proxy().await;
        let handle = self.proxy.as_ref()?;
        tokio::select! {
            biased;
            () = handle.wait_until_only_current() => None,
            Some(command) = self.commands.recv() => Some(self.handle_command(command).await),
            () = tokio::time::sleep(HOP) => Some(Reaction::Woke),
        }
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
