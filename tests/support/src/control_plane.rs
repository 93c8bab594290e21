//! etcd, kube-apiserver and kube-controller-manager on 127.0.0.1.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::audit::{self, AuditEvent};
use crate::authority::{Authority, CertificatePair, new_key};
use crate::condition::eventually;
use crate::process::{ProcessCommand, Service};
use crate::request::SubmittedRequest;
use crate::{ReservedPorts, ScratchDirectory, bootstrap};

/// A cold start takes about 5 s on an idle machine with two cores; a busy one needs many times that.
const START_DEADLINE: Duration = Duration::from_secs(180);
/// How long a program may take to stop by itself. Everything it holds is thrown away, so there is little to wait for.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// How a control plane is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// `--cluster-signing-duration`: the lifetime of what the signer issues, as Go writes durations (`30s`, `1h`).
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
            cluster_signing_duration: "1h".into(),
            manual_approval: false,
            audit: true,
            static_tokens: Vec::new(),
            api_server_flags: Vec::new(),
        }
    }
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
    authority: Authority,
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
        let server_url = format!("https://127.0.0.1:{}", ports.port(2));
        let administrator =
            authority.issue_client("administrator", &["system:masters"], Duration::from_secs(24 * 3600));
        let admin_kubeconfig =
            write_kubeconfig(&scratch.join("administrator.kubeconfig"), &server_url, &authority, &administrator.into());
        let audit_log = scratch.join("audit.log");

        let etcd = Service::start_new(etcd_command(&scratch, &ports));
        let api_server = Service::start_new(api_server_command(&options, &scratch, &ports, &authority, &audit_log));
        let controller_manager =
            Service::start_new(controller_manager_command(&options, &scratch, &authority, &admin_kubeconfig));
        let control_plane = Self {
            etcd,
            api_server,
            controller_manager,
            authority,
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
        let failed = |service: &Service| format!("the control plane is ready\n{}", service.last_lines());
        let ready = || {
            self.etcd.assert_running();
            self.api_server.assert_running();
            self.try_kubectl(&["get", "--raw=/readyz"]).ok()
        };
        if crate::holds_within(START_DEADLINE, ready).is_none() {
            eventually(&failed(&self.api_server), Duration::ZERO, || None)
        }
        let signing = || {
            self.controller_manager.assert_running();
            self.controller_manager.output().contains("Caches are synced").then_some(())
        };
        if crate::holds_within(START_DEADLINE, signing).is_none() {
            eventually(&failed(&self.controller_manager), Duration::ZERO, || None)
        }
    }

    /// `https://127.0.0.1:PORT`.
    #[must_use]
    pub fn server_url(&self) -> &str {
        &self.server_url
    }

    /// The authority that issues both the API server's certificate and its clients'.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The authority's certificate, PEM.
    #[must_use]
    pub fn certificate_authority(&self) -> &Path {
        &self.authority.files().certificate
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
        write_kubeconfig(&path, &self.server_url, &self.authority, credential)
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
        let output = Command::new(cluster_binary())
            .arg("kubectl")
            .args(arguments)
            .arg("--request-timeout=20s")
            .arg(flag("kubeconfig", kubeconfig))
            .arg(flag("cache-dir", self.scratch.join("kubectl-cache")))
            .env("HOME", self.scratch.path())
            .env_remove("KUBECONFIG")
            .stdin(Stdio::null())
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
    match std::env::var_os("PINTLE_TEST_CLUSTER") {
        Some(path) => path.into(),
        None => panic!(
            "PINTLE_TEST_CLUSTER is not set\nhint: run ./tests/run, or eval \"$(./tests/run --environment)\" before cargo test"
        ),
    }
}

/// How a kubeconfig authenticates.
enum Credential {
    Pair(CertificatePair),
    Token(String),
}

impl From<CertificatePair> for Credential {
    fn from(pair: CertificatePair) -> Self {
        Self::Pair(pair)
    }
}

fn write_kubeconfig(path: &Path, server_url: &str, authority: &Authority, credential: &Credential) -> PathBuf {
    let user = match credential {
        Credential::Pair(pair) => {
            format!("client-certificate: {}\n    client-key: {}", pair.certificate.display(), pair.key.display())
        }
        Credential::Token(token) => format!("token: {token}"),
    };
    let certificate_authority = authority.files().certificate.display();
    let contents = format!(
        "\
apiVersion: v1
kind: Config
clusters:
- name: test
  cluster:
    server: {server_url}
    certificate-authority: {certificate_authority}
users:
- name: test
  user:
    {user}
contexts:
- name: test
  context:
    cluster: test
    user: test
current-context: test
"
    );
    crate::scratch::write_private(path, contents.as_bytes());
    path.to_owned()
}

fn flag(name: &str, path: impl AsRef<Path>) -> String {
    format!("--{name}={}", path.as_ref().display())
}

fn etcd_command(scratch: &ScratchDirectory, ports: &ReservedPorts) -> ProcessCommand {
    let client_url = format!("http://127.0.0.1:{}", ports.port(0));
    let peer_url = format!("http://127.0.0.1:{}", ports.port(1));
    ProcessCommand::new(cluster_binary(), scratch.join("etcd.log"))
        .argument("etcd")
        .flag("data-dir", scratch.join("etcd"))
        .flag("listen-client-urls", &client_url)
        .flag("advertise-client-urls", &client_url)
        .flag("listen-peer-urls", &peer_url)
        .flag("initial-advertise-peer-urls", &peer_url)
        .flag("initial-cluster", format!("default={peer_url}"))
        .argument("--unsafe-no-fsync")
}

fn api_server_command(
    options: &Options,
    scratch: &ScratchDirectory,
    ports: &ReservedPorts,
    authority: &Authority,
    audit_log: &Path,
) -> ProcessCommand {
    let server = authority.issue_server("kube-apiserver");
    let service_account_key = new_key();
    let service_account_public_key = scratch.write("service-account.pub", service_account_key.public_key_pem());
    let service_account_key = scratch.write("service-account.key", service_account_key.serialize_pem());
    let tokens = scratch.write("tokens.csv", bootstrap::token_file(&options.static_tokens));
    let mut command = ProcessCommand::new(cluster_binary(), scratch.join("kube-apiserver.log"))
        .argument("kube-apiserver")
        .flag("etcd-servers", format!("http://127.0.0.1:{}", ports.port(0)))
        .flag("bind-address", "127.0.0.1")
        .flag("advertise-address", "127.0.0.1")
        .flag("secure-port", ports.port(2).to_string())
        .flag("tls-cert-file", &server.certificate)
        .flag("tls-private-key-file", &server.key)
        .flag("client-ca-file", &authority.files().certificate)
        .flag("cert-dir", scratch.join("kube-apiserver"))
        .flag("service-account-key-file", &service_account_public_key)
        .flag("service-account-signing-key-file", &service_account_key)
        .flag("service-account-issuer", "https://kubernetes.default.svc")
        .flag("service-cluster-ip-range", "10.96.0.0/24")
        .flag("authorization-mode", "Node,RBAC")
        .flag("enable-admission-plugins", "NodeRestriction")
        .flag("token-auth-file", &tokens)
        .argument("--enable-bootstrap-token-auth");
    if options.audit {
        command = command
            .flag("audit-policy-file", scratch.write("audit-policy.yaml", audit::POLICY))
            .flag("audit-log-path", audit_log);
    }
    command.arguments(&options.api_server_flags)
}

fn controller_manager_command(
    options: &Options,
    scratch: &ScratchDirectory,
    authority: &Authority,
    kubeconfig: &Path,
) -> ProcessCommand {
    let mut controllers = vec![
        "certificatesigningrequest-signing-controller",
        "certificatesigningrequest-cleaner-controller",
        "bootstrap-signer-controller",
        "token-cleaner-controller",
    ];
    if !options.manual_approval {
        controllers.push("certificatesigningrequest-approving-controller");
    }
    ProcessCommand::new(cluster_binary(), scratch.join("kube-controller-manager.log"))
        .argument("kube-controller-manager")
        .flag("kubeconfig", kubeconfig)
        .argument("--authentication-skip-lookup")
        .flag("secure-port", "0")
        .flag("leader-elect", "false")
        .flag("controllers", controllers.join(","))
        .flag("cluster-signing-cert-file", &authority.files().certificate)
        .flag("cluster-signing-key-file", &authority.files().key)
        .flag("cluster-signing-duration", &options.cluster_signing_duration)
}
