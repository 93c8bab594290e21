//! The local client's kubeconfig: it names the proxy as the API server, and the local certificates by their files.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use serde_yaml::{Mapping, Value};

use super::local_authority::{ClientFiles, User};
use crate::store::durable;

/// The proxy as a client sees it.
#[derive(Clone, Copy, Debug)]
pub struct LocalServer<'a> {
    /// Where it listens.
    pub address: SocketAddr,
    /// What the client needs.
    pub files: &'a ClientFiles,
}

const CLUSTER: &str = "default-cluster";
const CONTEXT: &str = "default-context";
const USER: &str = "default-auth";

/// `existing` (or, where it is empty, a new kubeconfig) with its current context pointing at the proxy.
///
/// Whatever is not replaced is kept: other contexts, clusters and users, the namespace, extensions, preferences, and the
/// path of the server's URL. What would contradict the proxy goes: the cluster's other ways of verifying a server and
/// its own proxy-url, and the user's other credentials.
///
/// # Errors
/// If `existing` is no kubeconfig, or its current context is not in it.
pub fn kubeconfig(existing: &str, server: LocalServer<'_>) -> io::Result<String> {
    let wrong = |detail: String| io::Error::new(io::ErrorKind::InvalidData, detail);
    let mut config = match existing.trim() {
        "" => new(),
        text => serde_yaml::from_str::<Mapping>(text).map_err(|error| wrong(error.to_string()))?,
    };
    let current = config.get("current-context").and_then(Value::as_str).unwrap_or_default().to_owned();
    let context = entry(&mut config, "contexts", &current, "context");
    let context = context.ok_or_else(|| wrong(format!("its current context {current:?} is not in it")))?;
    let named = |key: &str| context.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (cluster_name, user_name) = (named("cluster"), named("user"));

    let cluster = entry(&mut config, "clusters", &cluster_name, "cluster")
        .ok_or_else(|| wrong(format!("its cluster {cluster_name:?} is not in it")))?;
    let path = cluster.get("server").and_then(Value::as_str).and_then(|url| url.parse::<http::Uri>().ok());
    let path = path.map(|url| url.path().trim_end_matches('/').to_owned()).unwrap_or_default();
    for key in ["certificate-authority-data", "insecure-skip-tls-verify", "tls-server-name", "proxy-url"] {
        cluster.remove(key);
    }
    cluster.insert("server".into(), format!("https://{}{path}", server.address).into());
    cluster.insert("certificate-authority".into(), text(&server.files.certificate_authority)?);

    let user = entry(&mut config, "users", &user_name, "user")
        .ok_or_else(|| wrong(format!("its user {user_name:?} is not in it")))?;
    user.retain(|key, _| key.as_str() == Some("extensions"));
    user.insert("client-certificate".into(), text(&server.files.certificate)?);
    user.insert("client-key".into(), text(&server.files.key)?);
    serde_yaml::to_string(&config).map_err(io::Error::other)
}

/// Writes the kubeconfig of the local client: the one in `path` changed as [`kubeconfig`] does, or a new one. It belongs
/// to `user`. False if it is as it should be already.
///
/// # Errors
/// If what is there is no kubeconfig, or whatever the file system says; the file is then as it was.
pub fn write_kubeconfig(path: &Path, server: LocalServer<'_>, user: User) -> io::Result<bool> {
    let existing = match std::fs::read_to_string(path) {
        Ok(existing) => existing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let wanted = kubeconfig(&existing, server)?;
    if wanted == existing {
        return Ok(false);
    }
    std::fs::create_dir_all(durable::directory_of(path))?;
    durable::replace(path, wanted.as_bytes(), 0o600)?;
    // It holds no secret, so that the short moment of another owner does not matter.
    std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))?;
    Ok(true)
}

fn text(path: &Path) -> io::Result<Value> {
    path.to_str().map(Value::from).ok_or_else(|| io::Error::other(format!("{} is no text", path.display())))
}

/// The mapping under `key` of the entry of this name in a list.
fn entry<'a>(config: &'a mut Mapping, list: &str, name: &str, key: &str) -> Option<&'a mut Mapping> {
    let entries = config.get_mut(list)?.as_sequence_mut()?;
    let entry = entries
        .iter_mut()
        .filter_map(Value::as_mapping_mut)
        .find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))?;
    let value = entry.entry(key.into()).or_insert_with(|| Mapping::new().into());
    if value.is_null() {
        *value = Mapping::new().into();
    }
    value.as_mapping_mut()
}

fn new() -> Mapping {
    let list = |name: &str, key: &str, value: Mapping| {
        Value::Sequence(vec![Mapping::from_iter([("name".into(), name.into()), (key.into(), value.into())]).into()])
    };
    let context = Mapping::from_iter([("cluster".into(), CLUSTER.into()), ("user".into(), USER.into())]);
    Mapping::from_iter([
        ("apiVersion".into(), "v1".into()),
        ("kind".into(), "Config".into()),
        ("clusters".into(), list(CLUSTER, "cluster", Mapping::new())),
        ("contexts".into(), list(CONTEXT, "context", context)),
        ("current-context".into(), CONTEXT.into()),
        ("users".into(), list(USER, "user", Mapping::new())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXISTING: &str = "
apiVersion: v1
kind: Config
current-context: mine
clusters:
- name: other
  cluster: {server: 'https://other'}
- name: c
  cluster: {server: 'https://10.0.0.1/k8s/clusters/c-1', certificate-authority-data: eA==, proxy-url: 'http://p', extensions: [{name: e, extension: {a: b}}]}
contexts:
- name: mine
  context: {cluster: c, user: u, namespace: here}
users:
- name: u
  user: {client-certificate-data: eA==, client-key-data: eA==}
- name: v
  user: {token: secret}
";

    #[test]
    fn c08_what_is_not_ours_is_kept() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("kubelet.conf");
        std::fs::write(&path, EXISTING).expect("written");
        let files = ClientFiles::in_directory(Path::new("/run/x"));
        let server = LocalServer { address: ([127, 0, 0, 1], 6444).into(), files: &files };
        let user = User { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() };
        assert!(write_kubeconfig(&path, server, user).expect("written"));
        assert!(!write_kubeconfig(&path, server, user).expect("the same"));
        let text = std::fs::read_to_string(&path).expect("readable");
        for kept in ["https://127.0.0.1:6444/k8s/clusters/c-1", "https://other", "namespace: here", "a: b", "secret"] {
            assert!(text.contains(kept), "{kept} in {text}");
        }
        for gone in ["-data", "proxy-url"] {
            assert!(!text.contains(gone), "{gone} in {text}");
        }
        assert!(text.contains("/run/x/client.key"));
    }

    #[test]
    fn a_new_one_is_whole() {
        let files = ClientFiles::in_directory(Path::new("/run/x"));
        let server = LocalServer { address: ([127, 0, 0, 1], 6444).into(), files: &files };
        let text = kubeconfig("", server).expect("made");
        assert!(text.contains("current-context: default-context") && text.contains("/run/x/ca.crt"));
        assert!(kubeconfig("current-context: x", server).is_err());
    }
}
