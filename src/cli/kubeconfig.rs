//! `pintle kubeconfig`: a kubeconfig that speaks as an identity.

use std::path::{Path, PathBuf};

use super::{CliError, Exit, print};
use crate::config::{Config, Flags, IdentityConfig, ProxyConfiguration};
use crate::consumers::kubeconfig::Kubeconfig;
use crate::kubernetes::Cluster;
use crate::node::control::{self, Request, Response};
use crate::proxy::{ClientFiles, LocalServer};
use crate::store::shared;
use crate::world::{SystemFiles, User};

/// How a client comes to speak as an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Consumer {
    /// Through the credential proxy: the key may be anywhere
    Proxy,
    /// With the pair's file: the key must be in a file, and a rotation is noticed within five minutes
    File,
    /// With `pintle credential` as its exec plugin: the key must be in a file, and a rotation is noticed at once
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
    /// How the client comes to speak as the identity [default: proxy if the configuration has one, file otherwise]
    #[arg(long = "for", value_enum)]
    consumer: Option<Consumer>,
    /// Write it to this file instead: of a kubeconfig that is there, only the current context's server and user change
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
            // The listener knows its own client's certificate alone.
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
            Ok(false) => print(&format!("as it should be already: {}\n", path.display()))?,
            Err(error) => {
                let detail = format!("{} cannot be written: {error}", path.display());
                let hint = match error.kind() {
                    std::io::ErrorKind::PermissionDenied => "run it as the file's owner",
                    _ => "see to that, or name another file",
                };
                return Err(CliError::new(Exit::Problem, detail, hint));
            }
        }
        Ok(Exit::Ok)
    }

    /// What `pintle credential` is to be called with, so that it finds the same identity.
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

/// A kubeconfig for the API server, from wherever the agent knows it.
fn of_cluster(config: &IdentityConfig) -> Result<Kubeconfig, CliError> {
    let kept = config.cluster_kubeconfig();
    let sources = [&config.kubeconfig].into_iter().chain(&config.bootstrap_kubeconfig).chain([&kept]);
    let files = proxy_files(config);
    for path in sources.clone().filter(|path| path.exists()) {
        let mut found = Kubeconfig::for_cluster_of(&SystemFiles, path).map_err(|error| unusable(path, &error))?;
        // It was the proxy's client's once.
        if !found.is_of_proxy(&files) {
            return Ok(found);
        }
    }
    let names: Vec<_> = sources.map(|path| path.display().to_string()).collect();
    let detail = format!("nothing says where the API server is: there is none of {}", names.join(", "));
    Err(CliError::new(Exit::Usage, detail, "name one with --kubeconfig or --bootstrap-kubeconfig"))
}

/// The files of the proxy's client, also where the table [proxy] is gone.
fn proxy_files(config: &IdentityConfig) -> ClientFiles {
    let default = ProxyConfiguration::default();
    let configuration = config.proxy.as_ref().map_or(&default, |proxy| &proxy.configuration);
    ClientFiles::in_directory(&configuration.runtime_directory)
}

fn use_proxy(config: &IdentityConfig, kubeconfig: &mut Kubeconfig, target: Option<&Path>) -> Result<(), CliError> {
    let Some(settings) = &config.proxy else {
        let hint = "add the table [proxy] to the configuration file, or say --for file";
        return Err(CliError::new(Exit::Usage, "there is no credential proxy", hint));
    };
    if target.is_some_and(|target| shared::is_same(&SystemFiles, target, &config.kubeconfig)) {
        let detail = format!("{} tells the agent where the API server is", config.kubeconfig.display());
        return Err(CliError::new(Exit::Usage, detail, "give the proxy's client another file"));
    }
    // A socket of the service manager may be another than the configured one; only the running agent knows.
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
    // Of one that was written before, the path may be another server's.
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
        "name another file, or remove this one",
    )
}
