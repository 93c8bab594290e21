//! The kubelet's kubeconfig: written where there is none, and looked at where there is one.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_yaml::{Mapping, Value};

use crate::store::durable;

/// The names that the kubelet gives to the entries of a kubeconfig that it writes after its bootstrap.
const CLUSTER: &str = "default-cluster";
const CONTEXT: &str = "default-context";
const USER: &str = "default-auth";

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ClientFiles<'a> {
    client_certificate: &'a Path,
    client_key: &'a Path,
}

/// Writes a kubeconfig for the cluster of the bootstrap kubeconfig whose user is this pair, as the kubelet does after
/// its bootstrap. Everything that the cluster's entry holds is kept: the authority, proxy-url, tls-server-name (case C08).
///
/// # Errors
/// If the bootstrap kubeconfig makes no sense, or the file cannot be written; nothing is half-written then.
pub fn write_for_pair(path: &Path, bootstrap: &Path, pair: &Path) -> io::Result<()> {
    let user = ClientFiles { client_certificate: pair, client_key: pair };
    let user = serde_yaml::to_value(user).map_err(io::Error::other)?;
    write(path, bootstrap, user)
}

/// Writes a kubeconfig for the cluster of the bootstrap kubeconfig without any credential.
///
/// # Errors
/// Those of [`write_for_pair`].
pub fn write_cluster(path: &Path, bootstrap: &Path) -> io::Result<()> {
    write(path, bootstrap, Value::Mapping(Mapping::new()))
}

fn write(path: &Path, bootstrap: &Path, user: Value) -> io::Result<()> {
    let bootstrap_text = std::fs::read_to_string(bootstrap)?;
    let mut cluster = current_cluster(&bootstrap_text)
        .ok_or_else(|| io::Error::other(format!("{} has no current context with a cluster", bootstrap.display())))?;
    // A relative path counts from the file that it stands in.
    if let Some(Value::String(authority)) = cluster.get_mut("certificate-authority")
        && let Some(directory) = bootstrap.parent()
    {
        *authority = directory.join(&*authority).display().to_string();
    }
    let text = kubeconfig_text(Value::Mapping(cluster), user).map_err(io::Error::other)?;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    durable::replace(path, text.as_bytes(), 0o600)
}

fn kubeconfig_text(cluster: Value, user: Value) -> Result<String, serde_yaml::Error> {
    let entry = |name: &str, key: &str, value: Value| {
        Value::Sequence(vec![Value::Mapping(Mapping::from_iter([("name".into(), name.into()), (key.into(), value)]))])
    };
    let context = Mapping::from_iter([
        ("cluster".into(), CLUSTER.into()),
        ("namespace".into(), "default".into()),
        ("user".into(), USER.into()),
    ]);
    serde_yaml::to_string(&Mapping::from_iter([
        ("apiVersion".into(), "v1".into()),
        ("kind".into(), "Config".into()),
        ("clusters".into(), entry(CLUSTER, "cluster", cluster)),
        ("contexts".into(), entry(CONTEXT, "context", Value::Mapping(context))),
        ("current-context".into(), CONTEXT.into()),
        ("preferences".into(), Value::Mapping(Mapping::new())),
        ("users".into(), entry(USER, "user", user)),
    ]))
}

/// Why the user of this kubeconfig does not follow the rotations of `pair`, if so: it holds a certificate itself, or
/// names other files.
pub fn staleness(path: &Path, pair: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let Some(user) = current_user(&text) else {
        return Some("its current context names no user".to_owned());
    };
    if user.contains_key("client-certificate-data") || user.contains_key("client-key-data") {
        return Some("it holds a certificate itself, which nobody renews".to_owned());
    }
    let named = user.get("client-certificate")?.as_str()?;
    let named = path.parent().map_or_else(|| PathBuf::from(named), |directory| directory.join(named));
    (named != pair).then(|| format!("it uses {}, and the pair is {}", named.display(), pair.display()))
}

fn current_cluster(text: &str) -> Option<Mapping> {
    let (config, context) = current_context(text)?;
    let cluster = entry(&config, "clusters", context.get("cluster")?.as_str()?)?;
    cluster.get("cluster")?.as_mapping().cloned()
}

fn current_user(text: &str) -> Option<Mapping> {
    let (config, context) = current_context(text)?;
    let user = entry(&config, "users", context.get("user")?.as_str()?)?;
    user.get("user")?.as_mapping().cloned()
}

fn current_context(text: &str) -> Option<(Value, Mapping)> {
    let config: Value = serde_yaml::from_str(text).ok()?;
    let name = config.get("current-context").and_then(Value::as_str).filter(|name| !name.is_empty());
    let context = match name {
        Some(name) => entry(&config, "contexts", name)?.get("context")?.as_mapping()?.clone(),
        None => return None,
    };
    Some((config, context))
}

fn entry<'a>(config: &'a Value, list: &str, name: &str) -> Option<&'a Mapping> {
    let entries = config.get(list)?.as_sequence()?;
    entries.iter().filter_map(Value::as_mapping).find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOTSTRAP: &str = "
apiVersion: v1
kind: Config
current-context: b
clusters:
- name: c
  cluster: {server: 'https://10.0.0.1:6443', certificate-authority: ca.crt, proxy-url: 'http://p:3128', tls-server-name: api}
contexts:
- name: b
  context: {cluster: c, user: u}
users:
- name: u
  user: {token: abcdef.0123456789abcdef}
";

    #[test]
    fn c08_the_cluster_is_kept_whole_and_the_token_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let (bootstrap, path) = (directory.path().join("bootstrap"), directory.path().join("etc/kubeconfig"));
        std::fs::write(&bootstrap, BOOTSTRAP).expect("written");
        write_for_pair(&path, &bootstrap, Path::new("/pki/current.pem")).expect("written");
        let text = std::fs::read_to_string(&path).expect("readable");
        for kept in ["proxy-url: http://p:3128", "tls-server-name: api", "client-key: /pki/current.pem"] {
            assert!(text.contains(kept), "{kept} in {text}");
        }
        assert!(text.contains(&directory.path().join("ca.crt").display().to_string()));
        assert!(!text.contains("abcdef"));
        assert_eq!(staleness(&path, Path::new("/pki/current.pem")), None);

        // Kept apart, and taken from there when the bootstrap kubeconfig is gone (case C23).
        let kept = directory.path().join("state/cluster.kubeconfig");
        write_cluster(&kept, &bootstrap).expect("written");
        assert!(!std::fs::read_to_string(&kept).expect("readable").contains("abcdef"));
        let again = directory.path().join("again");
        write_for_pair(&again, &kept, Path::new("/pki/current.pem")).expect("written");
        assert_eq!(std::fs::read_to_string(&again).expect("readable"), text);
        assert!(staleness(&path, Path::new("/other.pem")).is_some());
    }

    #[test]
    fn c08_an_inline_certificate_is_noticed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("kubeconfig");
        let text = BOOTSTRAP
            .replace("{token: abcdef.0123456789abcdef}", "{client-certificate-data: eA==, client-key-data: eA==}");
        std::fs::write(&path, text).expect("written");
        assert!(staleness(&path, Path::new("/pki/current.pem")).is_some_and(|reason| reason.contains("itself")));
        std::fs::write(&path, "").expect("torn");
        assert!(staleness(&path, Path::new("/pki/current.pem")).is_some());
    }
}
