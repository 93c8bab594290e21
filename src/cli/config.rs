//! `pintle config`.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::{CliError, Exit, print};
use crate::config::{Config, Flags, IdentityConfig, ProxySettings};
use crate::kubernetes::{Cluster, ClusterError};
use crate::proxy::Upstream;

/// The commands under `pintle config`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Check the configuration file and the flags, and show the resulting settings
    Check {
        #[command(flatten)]
        flags: Box<Flags>,
    },
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let Self::Check { flags } = self;
        let config = Config::load(&flags)?;
        for identity in &config.identities {
            if let Some(proxy) = &identity.proxy {
                check_cluster(identity, proxy)?;
            }
        }
        let node = &config.node;
        let backends: Vec<_> = node.backends.keys().map(String::as_str).collect();
        let address = |address: SocketAddr| address.to_string();
        print_lines(&[
            ("node-name", node.name.clone()),
            ("state-dir", node.state_dir.display().to_string()),
            ("backends", backends.join(", ")),
            ("metrics-address", node.metrics_address.map_or_else(|| "none".to_owned(), address)),
        ])?;
        for identity in &config.identities {
            print(&format!("\nidentity {}\n", identity.name))?;
            print_lines(&identity_lines(identity))?;
        }
        Ok(Exit::Ok)
    }
}

fn print_lines(lines: &[(&str, String)]) -> Result<(), CliError> {
    lines.iter().try_for_each(|(name, value)| print(&format!("{name:<27}{value}\n")))
}

/// Checks that the proxy can reach the kubeconfig's cluster. An unreadable kubeconfig is not an error: the agent
/// waits for it.
fn check_cluster(config: &IdentityConfig, proxy: &ProxySettings) -> Result<(), CliError> {
    let refused = |error: ClusterError| {
        CliError::new(Exit::Usage, error, "correct the cluster in that kubeconfig, or remove the [proxy] table")
    };
    match Cluster::read(&config.kubeconfig) {
        Ok(cluster) => Upstream::of(&cluster, &proxy.api_servers).map(drop).map_err(refused),
        Err(_) => Ok(()),
    }
}

fn path_or_none(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or_else(|| "none".to_owned(), |path| path.display().to_string())
}

/// An identity's settings, one per line.
fn identity_lines(identity: &IdentityConfig) -> Vec<(&'static str, String)> {
    let expiration = identity.expiration_seconds;
    let mut lines = vec![
        ("kind", identity.kind.word().to_owned()),
        ("kubeconfig", identity.kubeconfig.display().to_string()),
        ("bootstrap-kubeconfig", path_or_none(&identity.bootstrap_kubeconfig)),
        ("cert-dir", identity.cert_dir.display().to_string()),
        ("rotate-certificates", identity.rotate_certificates.to_string()),
        ("client-ca-file", path_or_none(&identity.client_ca_file)),
        ("backend", identity.backend.clone()),
        ("key-algorithm", identity.key_algorithm.to_string()),
        ("on-key-loss", if identity.enrol_after_key_loss { "enrol" } else { "wait" }.to_owned()),
        ("keep-pairs", identity.keep_pairs.to_string()),
        (
            "expiration-seconds",
            expiration.map_or_else(|| "what the signer gives".to_owned(), |seconds| seconds.to_string()),
        ),
    ];
    match &identity.proxy {
        Some(proxy) => lines.extend(proxy_lines(proxy)),
        None => lines.push(("proxy", "none".to_owned())),
    }
    lines
}

/// The settings of the `[proxy]` table, one per line.
fn proxy_lines(proxy: &ProxySettings) -> Vec<(&'static str, String)> {
    let ProxySettings { configuration, kubeconfig, api_servers } = proxy;
    let servers: Vec<_> = api_servers.iter().map(ToString::to_string).collect();
    let duration = |duration: std::time::Duration| format!("{duration:?}");
    vec![
        ("proxy.listen", configuration.listen.to_string()),
        ("proxy.unix-socket", path_or_none(&configuration.unix_socket)),
        ("proxy.user", format!("uid {}, gid {}", configuration.user.uid, configuration.user.gid)),
        ("proxy.runtime-dir", configuration.runtime_directory.display().to_string()),
        ("proxy.kubeconfig", path_or_none(kubeconfig)),
        ("proxy.api-servers", if servers.is_empty() { "none".to_owned() } else { servers.join(", ") }),
        ("proxy.drain", duration(configuration.drain)),
        ("proxy.connect-timeout", duration(configuration.connect_timeout)),
        ("proxy.handshake-timeout", duration(configuration.handshake_timeout)),
        ("proxy.signing-deadline", duration(configuration.signing_deadline)),
        ("proxy.idle-timeout", duration(configuration.idle_timeout)),
        ("proxy.maximum-connections", configuration.maximum_connections.to_string()),
        ("proxy.maximum-handshakes", configuration.maximum_handshakes.to_string()),
    ]
}
