//! `pintle kubeconfig`: creates a kubeconfig that authenticates as an identity.

use std::path::{Path, PathBuf};

use super::{CliError, Exit, print};
use crate::config::{Config, Flags, IdentityConfig, ProxyConfiguration};
use crate::consumers::kubeconfig::Kubeconfig;
use crate::kubernetes::Cluster;
use crate::node::control::{self, Request, Response};
use crate::proxy::{ClientFiles, LocalServer};
use crate::store::shared;
use crate::world::{SystemFiles, User};

/// How a client authenticates as an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Consumer {
    /// Through the credential proxy: works with any backend
    Proxy,
    /// With the path of the pair: needs a file backend; the client picks up a rotation within five minutes
    File,
    /// With `pintle credential` as exec plugin: needs a file backend; the client picks up a rotation immediately
    Exec,
}

/// The arguments of `pintle kubeconfig`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// The identity [default: the only one]
    #[arg(value_name = "IDENTITY")]
    identity: Option<String>,
    /// How the client authenticates [default: proxy if it is configured, file otherwise]
    #[arg(long = "for", value_enum)]
    consumer: Option<Consumer>,
    /// Write to this file. In an existing kubeconfig, only the current context's cluster and user change
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let config = Config::load(&self.flags)?;
        let config = config.identity(self.identity.as_deref())?;
        let consumer = self.consumer.unwrap_or(if config.proxy.is_some() { Consumer::Proxy } else { Consumer::File });
        let mut kubeconfig = match &self.write {
            Some(path) if path.exists() => {
                Kubeconfig::read_or_new(&SystemFiles, path).map_err(|error| unusable(path, &error))?
            }
            _ => of_cluster(config)?,
        };
        if consumer != Consumer::Proxy && kubeconfig.is_of_proxy(&proxy_files(config)) {
            // The proxy's listener accepts only its own client's certificate.
            kubeconfig.use_cluster(of_cluster(config)?);
        }
        match consumer {
            Consumer::Proxy => use_proxy(config, &mut kubeconfig, self.write.as_deref())?,
            Consumer::File => {
                let pair = config.pairs().current();
                kubeconfig.use_files(&pair, &pair).map_err(|error| unusable(&pair, &error))?;
            }
            Consumer::Exec => {
                let program = std::env::current_exe().map_err(|error| CliError::new(Exit::Problem, error, ""))?;
                kubeconfig.use_exec(&program.display().to_string(), &self.credential_arguments());
            }
        }
        let Some(path) = &self.write else {
            print(&kubeconfig.to_yaml().map_err(|error| CliError::new(Exit::Problem, error, ""))?)?;
            return Ok(Exit::Ok);
        };
        let owner = config.proxy.as_ref().filter(|_| consumer == Consumer::Proxy).map(|proxy| proxy.configuration.user);
        let owner = owner.filter(|user| *user != User { uid: 0, gid: 0 });
        match kubeconfig.write(&SystemFiles, path, owner) {
            Ok(true) => print(&format!("written: {}\n", path.display()))?,
            Ok(false) => print(&format!("already up to date: {}\n", path.display()))?,
            Err(error) => {
                let detail = format!("{} cannot be written: {error}", path.display());
                let hint = match error.kind() {
                    std::io::ErrorKind::PermissionDenied => "run it as the file's owner",
                    _ => "fix this, or specify another file",
                };
                return Err(CliError::new(Exit::Problem, detail, hint));
            }
        }
        Ok(Exit::Ok)
    }

    /// The arguments with which `pintle credential` finds the same identity.
    fn credential_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["credential".to_owned()];
        arguments.extend(self.identity.clone());
        arguments.extend(self.flags.node_name.iter().map(|name| format!("--node-name={name}")));
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        for (flag, path) in [("config", &self.flags.config), ("cert-dir", &self.flags.cert_dir)] {
            arguments.extend(path.iter().map(|path| format!("--{flag}={}", absolute(path).display())));
        }
        arguments
    }
}

/// A kubeconfig for the API server, from wherever the agent gets its address.
fn of_cluster(config: &IdentityConfig) -> Result<Kubeconfig, CliError> {
    let kept = config.cluster_kubeconfig();
    let sources = [&config.kubeconfig].into_iter().chain(&config.bootstrap_kubeconfig).chain([&kept]);
    let files = proxy_files(config);
    for path in sources.clone().filter(|path| path.exists()) {
        let mut found = Kubeconfig::for_cluster_of(&SystemFiles, path).map_err(|error| unusable(path, &error))?;
        // Skip one that was written for the proxy's client.
        if !found.is_of_proxy(&files) {
            return Ok(found);
        }
    }
    let names: Vec<_> = sources.map(|path| path.display().to_string()).collect();
    let detail = format!("the API server's address is unknown: none of these files exist: {}", names.join(", "));
    Err(CliError::new(Exit::Usage, detail, "specify one with --kubeconfig or --bootstrap-kubeconfig"))
}

/// The files of the proxy's client, even if the [proxy] table has been removed.
fn proxy_files(config: &IdentityConfig) -> ClientFiles {
    let default = ProxyConfiguration::default();
    let configuration = config.proxy.as_ref().map_or(&default, |proxy| &proxy.configuration);
    ClientFiles::in_directory(&configuration.runtime_directory)
}

fn use_proxy(config: &IdentityConfig, kubeconfig: &mut Kubeconfig, target: Option<&Path>) -> Result<(), CliError> {
    let Some(settings) = &config.proxy else {
        let hint = "add a [proxy] table to the configuration file, or use --for file";
        return Err(CliError::new(Exit::Usage, "no credential proxy is configured", hint));
    };
    if target.is_some_and(|target| shared::is_same(&SystemFiles, target, &config.kubeconfig)) {
        let detail = format!("the agent reads the API server's address from {}", config.kubeconfig.display());
        return Err(CliError::new(Exit::Usage, detail, "use another file for the proxy's client"));
    }
    // The service manager may have passed a socket with another address, which only the running agent knows.
    let listening = match control::ask(&config.node.control_socket(), Request::Status) {
        Ok(Response::Status { status }) => {
            let mut identities = status.identities.into_iter();
            let found = identities.find(|identity| identity.identity == config.name);
            found.and_then(|identity| Some(identity.proxy?.address))
        }
        _ => None,
    };
    let files = proxy_files(config);
    let server = LocalServer { address: listening.unwrap_or(settings.configuration.listen), files: &files };
    // The path in an existing kubeconfig may belong to another server.
    let upstream = super::runtime()?.block_on(async {
        let sources = [&config.kubeconfig].into_iter().chain(&config.bootstrap_kubeconfig);
        for path in sources {
            if let Ok(cluster) = Cluster::read(path) {
                return Some(cluster.url().clone());
            }
        }
        None
    });
    kubeconfig.use_proxy(server, upstream.as_ref()).map_err(|error| unusable(&files.key, &error))
}

fn unusable(path: &Path, error: &std::io::Error) -> CliError {
    CliError::new(
        Exit::Problem,
        format!("{} cannot be used: {error}", path.display()),
        "specify another file, or remove this one",
    )
}
