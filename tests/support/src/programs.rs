//! The control plane's programs, which are one binary, and their command lines.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::authority::{CertificatePair, new_key};
use crate::options::{Options, Release};
use crate::process::ProcessCommand;
use crate::{ReservedPorts, ScratchDirectory, audit, permissions};

/// The multi-call binary built from `tests/cluster`: the environment variable `PINTLE_TEST_CLUSTER`.
#[must_use]
pub fn cluster_binary() -> PathBuf {
    binary_named_by("PINTLE_TEST_CLUSTER")
}

/// kube-apiserver and kube-controller-manager of a release in one binary.
fn binary_of(release: Release) -> PathBuf {
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

pub(crate) fn etcd(scratch: &ScratchDirectory, ports: &ReservedPorts) -> ProcessCommand {
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

pub(crate) fn api_server(
    options: &Options,
    scratch: &ScratchDirectory,
    ports: &ReservedPorts,
    server: &CertificatePair,
    client_authorities: &Path,
    audit_log: &Path,
) -> ProcessCommand {
    let service_account_key = new_key();
    let service_account_public_key = scratch.write("service-account.pub", service_account_key.public_key_pem());
    let service_account_key = scratch.write("service-account.key", service_account_key.serialize_pem());
    let tokens = scratch.write("tokens.csv", permissions::token_file(&options.static_tokens));
    let mut command = ProcessCommand::new(binary_of(options.release), scratch.join("kube-apiserver.log"))
        .argument("kube-apiserver")
        .flag("etcd-servers", format!("http://127.0.0.1:{}", ports.port(0)))
        .flag("bind-address", "127.0.0.1")
        .flag("advertise-address", "127.0.0.1")
        .flag("secure-port", ports.port(2).to_string())
        .flag("tls-cert-file", &server.certificate)
        .flag("tls-private-key-file", &server.key)
        .flag("client-ca-file", client_authorities)
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

pub(crate) fn controller_manager(
    options: &Options,
    scratch: &ScratchDirectory,
    signing: &CertificatePair,
    kubeconfig: &Path,
) -> ProcessCommand {
    // They have other names since 1.28.
    let [signing_controller, cleaning, bootstrap_signer, token_cleaner, approving] = match options.release {
        Release::Newest => [
            "certificatesigningrequest-signing-controller",
            "certificatesigningrequest-cleaner-controller",
            "bootstrap-signer-controller",
            "token-cleaner-controller",
            "certificatesigningrequest-approving-controller",
        ],
        Release::V1_21 => ["csrsigning", "csrcleaner", "bootstrapsigner", "tokencleaner", "csrapproving"],
    };
    let mut controllers = vec![signing_controller, cleaning, bootstrap_signer, token_cleaner];
    if !options.manual_approval {
        controllers.push(approving);
    }
    let mut command = ProcessCommand::new(binary_of(options.release), scratch.join("kube-controller-manager.log"))
        .argument("kube-controller-manager")
        .flag("kubeconfig", kubeconfig)
        .argument("--authentication-skip-lookup")
        .flag("secure-port", "0")
        .flag("leader-elect", "false")
        // By default it sends 20 requests a second, some five certificates' worth, which every test would wait for.
        .flag("kube-api-qps", "1000")
        .flag("kube-api-burst", "1000")
        .flag("controllers", controllers.join(","))
        .flag("cluster-signing-cert-file", &signing.certificate)
        .flag("cluster-signing-key-file", &signing.key);
    if options.release == Release::V1_21 {
        command = command.flag("port", "0"); // it would serve without TLS, on a port that others may have
    }
    if !options.cluster_signing_duration.is_empty() {
        command = command.flag("cluster-signing-duration", &options.cluster_signing_duration);
    }
    command
}
