//! pintle accepts what kubectl accepts: kubeconfigs, API server certificates, proxies. kubectl and Go are the
//! oracles.

#[path = "../embedded/mod.rs"]
mod embedded;
mod forms;
mod go;
mod proxies;
mod server;

use std::path::Path;

use pintle::kubernetes::Cluster;
use pintle_test_support::kubectl;

/// Whether kubectl gets a response with this kubeconfig, or its error.
fn kubectl_takes(kubeconfig: &Path) -> Result<(), String> {
    let mut command = kubectl();
    command.arg("--kubeconfig").arg(kubeconfig).args(["get", "--raw", "/version"]);
    let output = command.env("HOME", "/nonexistent").output().expect("kubectl starts");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Whether pintle gets a response with this kubeconfig, or its error.
fn pintle_takes(kubeconfig: &Path) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime can be made").block_on(async {
        let cluster = Cluster::read(kubeconfig).map_err(|error| error.to_string())?;
        let api = cluster.connect().map_err(|error| error.to_string())?;
        let minor = api.server_minor().await.map_err(|failure| failure.to_string())?;
        minor.map(drop).ok_or_else(|| "there is no version".to_owned())
    })
}
