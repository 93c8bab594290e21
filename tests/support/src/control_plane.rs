//! etcd, kube-apiserver and kube-controller-manager on 127.0.0.1.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use crate::audit::{self, AuditEvent};
use crate::authority::{Authority, CertificatePair};
use crate::condition::{eventually, holds_within};
use crate::kubeconfig::{self, Credential};
use crate::process::{ProcessCommand, Service, lock};
use crate::request::SubmittedRequest;
use crate::scratch::write_private;
use crate::{ReservedPorts, ScratchDirectory, bootstrap, programs};

/// A cold start takes about 5 s on an idle machine with two cores; a busy one needs many times that.
const START_DEADLINE: Duration = Duration::from_secs(180);
/// Longer than any test.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long a program may take to stop by itself. Everything it holds is thrown away, so there is little to wait for.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// How a control plane is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The release of kube-apiserver and kube-controller-manager.
    pub release: Release,
    /// `--cluster-signing-duration`: the lifetime of what the signer issues, as Go writes durations (`30s`, `1h`). Empty
    /// leaves the flag out.
    pub cluster_signing_duration: String,
    /// Leave kubelets' requests pending until somebody approves them: the approving controller is not started.
    pub manual_approval: bool,
    /// Write the audit log that [`ControlPlane::audit_events`] reads.
    pub audit: bool,
    /// More bearer tokens for `--token-auth-file`.
    pub static_tokens: Vec<StaticToken>,
    /// More flags for kube-apiserver; a flag given here overrides the same flag of the test bed.
    pub api_server_flags: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            release: Release::Newest,
            cluster_signing_duration: "1h".into(),
            manual_approval: false,
            audit: true,
            static_tokens: Vec::new(),
            api_server_flags: Vec::new(),
        }
    }
}

/// A release of Kubernetes that the test bed can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// That of `tests/cluster`.
    Newest,
    /// 1.21, of `tests/cluster-1.21`: its signer counts lifetimes from five minutes before the present, and its API server
    /// has no SelfSubjectReview, so [`ControlPlane::who_is`] always fails.
    V1_21,
}

/// A line of `--token-auth-file`.
#[derive(Clone, Debug)]
pub struct StaticToken {
    /// The bearer token.
    pub token: String,
    /// The user it stands for.
    pub username: String,
    /// The user's groups.
    pub groups: Vec<String>,
}

/// Who the API server takes a client for (SelfSubjectReview).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// For example `system:node:NAME`.
    pub username: String,
    /// For example `system:nodes`, `system:authenticated`.
    pub groups: Vec<String>,
    /// SHA-256 of the leaf's DER in lower-case hexadecimal, when the client showed a certificate.
    pub certificate_sha256: Option<String>,
}

/// A real control plane; stopped, and its files removed, on drop.
#[derive(Debug)]
pub struct ControlPlane {
    etcd: Service,
    api_server: Service,
    controller_manager: Service,
    /// Issues the API server's certificate, and those of clients until it is replaced.
    authority: Mutex<Arc<Authority>>,
    /// Issues the administrator's certificate, which must go on working when the other authority is replaced.
    administrators: Authority,
    certificate_authority: PathBuf,
    server_url: String,
    admin_kubeconfig: PathBuf,
    audit_log: PathBuf,
    sequence: AtomicU32,
    _ports: ReservedPorts,
    // Last, so that the files go when nothing writes them any more.
    scratch: ScratchDirectory,
}

impl ControlPlane {
    /// Starts a control plane and waits until it is ready, with the role bindings that let bootstrap credentials ask for
    /// a node's certificate and nodes renew their own.
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
        control_plane.create(&bootstrap::role_bindings());
        control_plane
    }

    /// Waits until the API server and the signer do their work, for example after one of them was started again.
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
            self.controller_manager.assert_running();
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

    /// The authority whose clients the API server accepts, and with which the signer signs.
    #[must_use]
    pub fn authority(&self) -> Arc<Authority> {
        Arc::clone(&lock(&self.authority))
    }

    /// The certificate of the authority that issued the API server's certificate, PEM.
    #[must_use]
    pub fn certificate_authority(&self) -> &Path {
        &self.certificate_authority
    }

    /// Replaces the authority of clients: certificates issued so far are answered with 401 while they are unexpired,
    /// and the signer signs with the new one. The API server keeps its own certificate.
    pub fn replace_client_authority(&self) {
        let replacement =
            Arc::new(Authority::new(&format!("replacement-ca-{}", self.next_number()), self.scratch.path()));
        let old = std::mem::replace(&mut *lock(&self.authority), Arc::clone(&replacement));
        let [refused, accepted] = [&old, &replacement]
            .map(|authority| self.kubeconfig_for(&authority.issue_client("probe", &["probes"], DAY)));
        trust_clients_of(&[&self.administrators, &replacement], &self.scratch);
        sign_with(&replacement, &self.scratch);
        self.controller_manager.kill(); // it would notice the new files by itself, within a minute
        self.controller_manager.start();
        eventually("the API server accepts the new authority's clients alone", START_DEADLINE, || {
            (self.who_is_in(&accepted).is_ok() && self.who_is_in(&refused).is_err()).then_some(())
        });
        self.wait_until_ready();
    }

    /// The signer signs with an authority that the API server does not know, as after a restart with the wrong files.
    pub fn sign_with_unknown_authority(&self) {
        let unknown = Authority::new(&format!("unknown-ca-{}", self.next_number()), self.scratch.path());
        self.restart_signer_with(&unknown);
    }

    /// The signer signs again with the authority that the API server knows.
    pub fn sign_with_known_authority(&self) {
        self.restart_signer_with(&self.authority());
    }

    fn restart_signer_with(&self, authority: &Authority) {
        sign_with(authority, &self.scratch);
        self.controller_manager.kill(); // it would notice the new files by itself, within a minute
        self.controller_manager.start();
        self.wait_until_ready();
    }

    /// A kubeconfig that may do everything (group system:masters).
    #[must_use]
    pub fn admin_kubeconfig(&self) -> &Path {
        &self.admin_kubeconfig
    }

    /// kube-apiserver. After starting it again, call [`ControlPlane::wait_until_ready`].
    #[must_use]
    pub fn api_server(&self) -> &Service {
        &self.api_server
    }

    /// kube-controller-manager: the approving, signing and cleaning controllers.
    #[must_use]
    pub fn controller_manager(&self) -> &Service {
        &self.controller_manager
    }

    /// Writes a new kubeconfig for this API server that names a pair by its files.
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

    /// Runs kubectl as the administrator and returns what it prints; panics when it fails.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        match self.try_kubectl(arguments) {
            Ok(output) => output,
            Err(error) => panic!("kubectl {}: {error}", arguments.join(" ")),
        }
    }

    /// Runs kubectl as the administrator.
    ///
    /// # Errors
    /// What kubectl printed to standard error, when it fails.
    pub fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        self.try_kubectl_as(&self.admin_kubeconfig, arguments)
    }

    /// Runs kubectl with a kubeconfig.
    ///
    /// # Errors
    /// What kubectl printed to standard error, when it fails.
    pub fn try_kubectl_as(&self, kubeconfig: &Path, arguments: &[&str]) -> Result<String, String> {
        let output = kubectl()
            .args(arguments)
            .arg("--request-timeout=20s")
            .arg(flag("kubeconfig", kubeconfig))
            .arg(flag("cache-dir", self.scratch.join("kubectl-cache")))
            .env("HOME", self.scratch.path())
            .output()
            .unwrap_or_else(|error| panic!("cannot start kubectl: {error}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// kubectl as a process to start in a test's own time, for watches; its output goes to a file of the control plane.
    #[must_use]
    pub fn kubectl_command(&self, kubeconfig: &Path, arguments: &[&str]) -> ProcessCommand {
        ProcessCommand::new(cluster_binary(), self.scratch.join(format!("kubectl-{}.log", self.next_number())))
            .argument("kubectl")
            .arguments(arguments)
            .flag("kubeconfig", kubeconfig)
            .flag("cache-dir", self.scratch.join("kubectl-cache"))
            .environment("HOME", self.scratch.path())
    }

    /// Runs kubectl as the administrator and parses the JSON that it prints; `arguments` should ask for `-o json`.
    #[track_caller]
    pub fn kubectl_json(&self, arguments: &[&str]) -> Value {
        let output = self.kubectl(arguments);
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("kubectl {}: {error}", arguments.join(" ")))
    }

    /// Creates an object, or the objects of a List.
    #[track_caller]
    pub fn create(&self, object: &Value) {
        let file = self.scratch.write(format!("object-{}.json", self.next_number()), object.to_string());
        self.kubectl(&["create", "-f", &file.to_string_lossy()]);
    }

    /// Every CertificateSigningRequest that the cluster holds.
    #[must_use]
    pub fn requests(&self) -> Vec<SubmittedRequest> {
        let mut list = self.kubectl_json(&["get", "certificatesigningrequests", "-o", "json"]);
        match list["items"].take() {
            Value::Array(items) => items.into_iter().map(SubmittedRequest::from_object).collect(),
            _ => Vec::new(),
        }
    }

    /// The CertificateSigningRequest with this name, or `None`.
    #[must_use]
    pub fn request(&self, name: &str) -> Option<SubmittedRequest> {
        self.requests().into_iter().find(|request| request.name == name)
    }

    /// Approves a CertificateSigningRequest, as a person would.
    pub fn approve(&self, name: &str) {
        self.kubectl(&["certificate", "approve", name]);
    }

    /// Denies a CertificateSigningRequest, as a person would.
    pub fn deny(&self, name: &str) {
        self.kubectl(&["certificate", "deny", name]);
    }

    /// The audit log so far: every request that was answered, oldest first. Empty without [`Options::audit`].
    #[must_use]
    pub fn audit_events(&self) -> Vec<AuditEvent> {
        audit::read(&self.audit_log)
    }

    /// Who the API server takes the holder of a pair for.
    ///
    /// # Errors
    /// What kubectl printed, when the API server refuses the pair.
    pub fn who_is(&self, pair: &CertificatePair) -> Result<Identity, String> {
        self.who_is_in(&self.kubeconfig_for(pair))
    }

    /// Who the API server takes the user of a kubeconfig for.
    ///
    /// # Errors
    /// What kubectl printed, when the API server refuses the credential.
    pub fn who_is_in(&self, kubeconfig: &Path) -> Result<Identity, String> {
        let output = self.try_kubectl_as(kubeconfig, &["auth", "whoami", "-o", "json"])?;
        let review: Value = serde_json::from_str(&output).map_err(|error| error.to_string())?;
        let user = &review["status"]["userInfo"];
        Ok(Identity {
            username: user["username"].as_str().unwrap_or_default().to_owned(),
            groups: audit::texts(&user["groups"]),
            certificate_sha256: audit::certificate_sha256(&user["extra"]),
        })
    }

    /// The directory of the control plane's files and logs.
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

/// The multi-call binary built from `tests/cluster`: the environment variable `PINTLE_TEST_CLUSTER`.
#[must_use]
pub fn cluster_binary() -> PathBuf {
    binary_named_by("PINTLE_TEST_CLUSTER")
}

/// kube-apiserver and kube-controller-manager of a release in one binary.
pub(crate) fn binary_of(release: Release) -> PathBuf {
    match release {
        Release::Newest => cluster_binary(),
        Release::V1_21 => binary_named_by("PINTLE_TEST_CLUSTER_1_21"),
    }
}

fn binary_named_by(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!(
            "{variable} is not set\nhint: run ./tests/run, or eval \"$(./tests/run --environment)\" before cargo test"
        ),
    }
}

/// kubectl, the one of the test bed, without the configuration of whoever runs the tests.
#[must_use]
pub fn kubectl() -> Command {
    let mut command = Command::new(cluster_binary());
    command.arg("kubectl").env_remove("KUBECONFIG").stdin(Stdio::null());
    command
}

fn flag(name: &str, path: impl AsRef<Path>) -> String {
    format!("--{name}={}", path.as_ref().display())
}

/// Writes the bundle of authorities whose clients the API server accepts; it looks at the file again by itself.
fn trust_clients_of(authorities: &[&Authority], scratch: &ScratchDirectory) -> PathBuf {
    let bundle: Vec<String> = authorities.iter().map(|authority| authority.certificate_pem()).collect();
    replace_file(scratch, "client-authorities.crt", &bundle.concat())
}

/// Writes the pair with which the signer signs.
fn sign_with(authority: &Authority, scratch: &ScratchDirectory) -> CertificatePair {
    CertificatePair {
        certificate: replace_file(scratch, "signing.crt", &authority.certificate_pem()),
        key: replace_file(scratch, "signing.key", &authority.key_pem()),
    }
}

/// By rename, so that a running server never reads half a file.
fn replace_file(scratch: &ScratchDirectory, name: &str, contents: &str) -> PathBuf {
    let (path, next) = (scratch.join(name), scratch.join(format!("{name}.next")));
    write_private(&next, contents.as_bytes());
    std::fs::rename(&next, &path).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    path
}
