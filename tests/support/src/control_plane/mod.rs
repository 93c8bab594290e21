//! etcd, kube-apiserver and kube-controller-manager on 127.0.0.1.

mod clients;
mod kubectl;

pub use clients::Identity;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use crate::audit::{self, AuditEvent};
use crate::authority::{Authority, CertificatePair};
use crate::condition::{eventually, holds_within};
use crate::kubeconfig::{self, Credential};
use crate::options::Options;
use crate::process::{Service, lock};
use crate::scratch::write_private;
use crate::{ReservedPorts, ScratchDirectory, permissions, programs};

/// A cold start takes about 5 s on an idle machine with two cores, and much longer on a busy one.
const START_DEADLINE: Duration = Duration::from_secs(180);
/// Longer than any test.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long a program may take to stop. Its data is discarded, so there is little to wait for.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// A real control plane. Dropping it stops its processes and removes its files.
#[derive(Debug)]
pub struct ControlPlane {
    etcd: Service,
    api_server: Service,
    controller_manager: Service,
    /// Issues the API server's certificate, and those of clients until it is replaced.
    authority: Mutex<Arc<Authority>>,
    /// Issues the administrator's certificate, which must remain valid when the other CA is replaced.
    administrators: Authority,
    certificate_authority: PathBuf,
    server_url: String,
    admin_kubeconfig: PathBuf,
    audit_log: PathBuf,
    sequence: AtomicU32,
    _ports: ReservedPorts,
    // Last, so that the files are removed after the processes have stopped.
    scratch: ScratchDirectory,
}

impl ControlPlane {
    /// Starts a control plane and waits until it is ready. Role bindings allow bootstrap credentials to request node
    /// certificates, and nodes to renew their own.
    #[must_use]
    pub fn start(options: Options) -> Self {
        let scratch = ScratchDirectory::new();
        let ports = ReservedPorts::neighbouring(3);
        let authority = Authority::new("kubernetes-ca", scratch.path());
        let administrators = Authority::new("administrators-ca", scratch.path());
        let certificate_authority = authority.files().certificate.clone();
        let server_url = format!("https://127.0.0.1:{}", ports.port(2));
        let administrator = administrators.issue_client("administrator", &["system:masters"], DAY);
        let admin_kubeconfig = kubeconfig::write(
            &scratch.join("administrator.kubeconfig"),
            &server_url,
            &certificate_authority,
            &administrator.into(),
        );
        let audit_log = scratch.join("audit.log");
        let trust = trust_clients_of(&[&administrators, &authority], &scratch);
        let signing = sign_with(&authority, &scratch);
        let server = authority.issue_server("kube-apiserver");

        let etcd = Service::start_new(programs::etcd(&scratch, &ports));
        let api_server =
            Service::start_new(programs::api_server(&options, &scratch, &ports, &server, &trust, &audit_log));
        let controller_manager =
            Service::start_new(programs::controller_manager(&options, &scratch, &signing, &admin_kubeconfig));
        let control_plane = Self {
            etcd,
            api_server,
            controller_manager,
            authority: Mutex::new(Arc::new(authority)),
            administrators,
            certificate_authority,
            server_url,
            admin_kubeconfig,
            audit_log,
            sequence: AtomicU32::new(0),
            _ports: ports,
            scratch,
        };
        control_plane.wait_until_ready();
        control_plane.create(&permissions::role_bindings());
        control_plane
    }

    /// Waits until the API server and the signer work, for example after one of them was restarted.
    pub fn wait_until_ready(&self) {
        let not_ready = |what: &str, service: &Service| -> ! {
            panic!("not within {START_DEADLINE:?}: {what} is ready\n{}", service.last_lines())
        };
        let ready = || {
            self.etcd.assert_running();
            self.api_server.assert_running();
            self.try_kubectl(&["get", "--raw=/readyz"]).ok()
        };
        if holds_within(START_DEADLINE, ready).is_none() {
            not_ready("kube-apiserver", &self.api_server)
        }
        let signing = || {
            // On a busy machine it may have given up on the API server, which it gives ten seconds to become healthy.
            self.controller_manager.start();
            self.controller_manager.has_printed("Caches are synced").then_some(())
        };
        if holds_within(START_DEADLINE, signing).is_none() {
            not_ready("kube-controller-manager", &self.controller_manager)
        }
    }

    /// `https://127.0.0.1:PORT`.
    #[must_use]
    pub fn server_url(&self) -> &str {
        &self.server_url
    }

    /// The CA that the API server verifies clients with, and the signer signs with.
    #[must_use]
    pub fn authority(&self) -> Arc<Authority> {
        Arc::clone(&lock(&self.authority))
    }

    /// The file of the CA certificate for the API server's certificate, PEM.
    #[must_use]
    pub fn certificate_authority(&self) -> &Path {
        &self.certificate_authority
    }

    /// Replaces the CA for clients: certificates issued before get 401 although they have not expired, and the signer
    /// uses the new CA. The API server keeps its own certificate.
    pub fn replace_client_authority(&self) {
        let replacement =
            Arc::new(Authority::new(&format!("replacement-ca-{}", self.next_number()), self.scratch.path()));
        let old = std::mem::replace(&mut *lock(&self.authority), Arc::clone(&replacement));
        let [refused, accepted] = [&old, &replacement]
            .map(|authority| self.kubeconfig_for(&authority.issue_client("probe", &["probes"], DAY)));
        trust_clients_of(&[&self.administrators, &replacement], &self.scratch);
        sign_with(&replacement, &self.scratch);
        self.controller_manager.kill(); // it would reload the files by itself, but only within a minute
        self.controller_manager.start();
        eventually("the API server accepts the new authority's clients alone", START_DEADLINE, || {
            (self.who_is_in(&accepted).is_ok() && self.who_is_in(&refused).is_err()).then_some(())
        });
        self.wait_until_ready();
    }

    /// Makes the signer use a CA that the API server does not trust, as after a restart with the wrong files.
    pub fn sign_with_unknown_authority(&self) {
        let unknown = Authority::new(&format!("unknown-ca-{}", self.next_number()), self.scratch.path());
        self.restart_signer_with(&unknown);
    }

    /// Makes the signer use the CA that the API server trusts again.
    pub fn sign_with_known_authority(&self) {
        self.restart_signer_with(&self.authority());
    }

    fn restart_signer_with(&self, authority: &Authority) {
        sign_with(authority, &self.scratch);
        self.controller_manager.kill(); // it would reload the files by itself, but only within a minute
        self.controller_manager.start();
        self.wait_until_ready();
    }

    /// A kubeconfig with all permissions (group system:masters).
    #[must_use]
    pub fn admin_kubeconfig(&self) -> &Path {
        &self.admin_kubeconfig
    }

    /// kube-apiserver. After restarting it, call [`ControlPlane::wait_until_ready`].
    #[must_use]
    pub fn api_server(&self) -> &Service {
        &self.api_server
    }

    /// kube-controller-manager: the approving, signing and cleaning controllers.
    #[must_use]
    pub fn controller_manager(&self) -> &Service {
        &self.controller_manager
    }

    /// Writes a new kubeconfig for this API server that refers to the files of a pair.
    #[must_use]
    pub fn kubeconfig_for(&self, pair: &CertificatePair) -> PathBuf {
        self.write_kubeconfig(&pair.clone().into())
    }

    /// Writes a new kubeconfig for this API server with an inline bearer token.
    #[must_use]
    pub fn kubeconfig_with_token(&self, token: &str) -> PathBuf {
        self.write_kubeconfig(&Credential::Token(token.to_owned()))
    }

    fn write_kubeconfig(&self, credential: &Credential) -> PathBuf {
        let path = self.scratch.join(format!("kubeconfig-{}", self.next_number()));
        kubeconfig::write(&path, &self.server_url, &self.certificate_authority, credential)
    }

    /// Numbers that are unique within this control plane.
    pub(crate) fn next_number(&self) -> u32 {
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    /// Creates an object, or the objects of a List.
    #[track_caller]
    pub fn create(&self, object: &Value) {
        let file = self.scratch.write(format!("object-{}.json", self.next_number()), object.to_string());
        self.kubectl(&["create", "-f", &file.to_string_lossy()]);
    }

    /// The audit log so far, oldest request first. Empty without [`Options::audit`].
    #[must_use]
    pub fn audit_events(&self) -> Vec<AuditEvent> {
        audit::read(&self.audit_log)
    }

    /// The directory with the control plane's files and logs.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.scratch.path()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // Clients before servers: an API server that has lost its etcd hangs on shutdown for up to a minute.
        for service in [&self.controller_manager, &self.api_server, &self.etcd] {
            service.stop(STOP_GRACE);
        }
    }
}

/// Writes the CA bundle that the API server verifies clients with; it reloads the file by itself.
fn trust_clients_of(authorities: &[&Authority], scratch: &ScratchDirectory) -> PathBuf {
    let bundle: Vec<String> = authorities.iter().map(|authority| authority.certificate_pem()).collect();
    replace_file(scratch, "client-authorities.crt", &bundle.concat())
}

/// Writes the CA pair that the signer uses.
fn sign_with(authority: &Authority, scratch: &ScratchDirectory) -> CertificatePair {
    CertificatePair {
        certificate: replace_file(scratch, "signing.crt", &authority.certificate_pem()),
        key: replace_file(scratch, "signing.key", &authority.key_pem()),
    }
}

/// By rename, so that a running server never reads an incomplete file.
fn replace_file(scratch: &ScratchDirectory, name: &str, contents: &str) -> PathBuf {
    let (path, next) = (scratch.join(name), scratch.join(format!("{name}.next")));
    write_private(&next, contents.as_bytes());
    std::fs::rename(&next, &path).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    path
}
