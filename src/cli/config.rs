//! `pintle config`.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::{CliError, Exit, print};
use crate::config::{Config, Flags, ProxySettings};
use crate::kubernetes::{Cluster, ClusterError};
use crate::proxy::Upstream;

/// The commands under `pintle config`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Check the configuration file and the flags, and show what they amount to
    Check {
        #[command(flatten)]
        flags: Box<Flags>,
    },
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let Self::Check { flags } = self;
        let config = Config::load(&flags)?;
        if let Some(proxy) = &config.proxy {
            check_cluster(&config, proxy)?;
        }
        let path =
            |path: &Option<PathBuf>| path.as_ref().map_or_else(|| "none".to_owned(), |path| path.display().to_string());
        let backends: Vec<_> = config.backends.keys().map(String::as_str).collect();
        let expiration = config.expiration_seconds;
        let address = |address: SocketAddr| address.to_string();
        let mut lines = vec![
            ("node-name", config.node_name.clone()),
            ("kubeconfig", config.kubeconfig.display().to_string()),
            ("bootstrap-kubeconfig", path(&config.bootstrap_kubeconfig)),
            ("cert-dir", config.cert_dir.display().to_string()),
            ("state-dir", config.state_dir.display().to_string()),
            ("rotate-certificates", config.rotate_certificates.to_string()),
            ("client-ca-file", path(&config.client_ca_file)),
            ("backend", config.backend.clone()),
            ("backends", backends.join(", ")),
            ("key-algorithm", config.key_algorithm.to_string()),
            ("on-key-loss", if config.enrol_after_key_loss { "enrol" } else { "wait" }.to_owned()),
            ("keep-pairs", config.keep_pairs.to_string()),
            (
                "expiration-seconds",
                expiration.map_or_else(|| "what the signer gives".to_owned(), |seconds| seconds.to_string()),
            ),
            ("metrics-address", config.metrics_address.map_or_else(|| "none".to_owned(), address)),
        ];
        match &config.proxy {
            Some(proxy) => lines.extend(proxy_lines(proxy)),
            None => lines.push(("proxy", "none".to_owned())),
        }
        for (name, value) in lines {
            print(&format!("{name:<27}{value}\n"))?;
        }
        Ok(Exit::Ok)
    }
}

/// Whether the proxy can reach the cluster of the kubeconfig. One that cannot be read is the agent's to wait for.
fn check_cluster(config: &Config, proxy: &ProxySettings) -> Result<(), CliError> {
    let refused = |error: ClusterError| {
        CliError::new(Exit::Usage, error, "mend the cluster's entry there, or remove the table [proxy]")
    };
    match super::runtime()?.block_on(Cluster::read(&config.kubeconfig)) {
        Ok(cluster) => Upstream::of(&cluster, &proxy.api_servers).map(drop).map_err(refused),
        Err(_) => Ok(()),
    }
}

/// The table `[proxy]`, line by line.
fn proxy_lines(proxy: &ProxySettings) -> Vec<(&'static str, String)> {
    let ProxySettings { configuration, kubeconfig, api_servers } = proxy;
    let path =
        |path: &Option<PathBuf>| path.as_ref().map_or_else(|| "none".to_owned(), |path| path.display().to_string());
    let servers: Vec<_> = api_servers.iter().map(ToString::to_string).collect();
    let duration = |duration: std::time::Duration| format!("{duration:?}");
    vec![
        ("proxy.listen", configuration.listen.to_string()),
        ("proxy.unix-socket", path(&configuration.unix_socket)),
        ("proxy.user", format!("uid {}, gid {}", configuration.user.uid, configuration.user.gid)),
        ("proxy.runtime-dir", configuration.runtime_directory.display().to_string()),
        ("proxy.kubeconfig", path(kubeconfig)),
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
