//! Kubeconfig files: made for the kubelet and for the credential proxy's client, and mended where they do not follow the
//! rotations.
//!
//! What belongs to others is kept: other contexts, clusters and users, the namespace, extensions, and whatever a later
//! Kubernetes adds. Only the current context's cluster and user are touched.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::kubernetes::kubeconfig::{KubeconfigFile, SecretsOfCluster};
use crate::proxy::{ClientFiles, LocalServer};
use crate::store::shared;
use crate::world::files::FileKind;
use crate::world::{Files, User};

/// The names that the kubelet gives to the entries of a kubeconfig that it writes after its bootstrap.
const CLUSTER: &str = "default-cluster";
const CONTEXT: &str = "default-context";
const USER: &str = "default-auth";

/// A kubeconfig with a current context whose cluster and user are there.
#[derive(Clone, PartialEq)]
pub struct Kubeconfig {
    config: Map<String, Value>,
    cluster: String,
    user: String,
}

/// Without its users' tokens and keys.
impl fmt::Debug for Kubeconfig {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Kubeconfig").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Kubeconfig {
    /// A kubeconfig like the one that the kubelet writes after its bootstrap, whose cluster and user are yet to be said.
    pub fn new() -> Self {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": CLUSTER, "cluster": {} }],
            "contexts": [{ "name": CONTEXT, "context": { "cluster": CLUSTER, "namespace": "default", "user": USER } }],
            "current-context": CONTEXT,
            "preferences": {},
            "users": [{ "name": USER, "user": {} }],
        });
        let Value::Object(config) = config else { unreachable!("an object was written down") };
        Self { config, cluster: CLUSTER.to_owned(), user: USER.to_owned() }
    }

    /// A kubeconfig as it stands in a file.
    ///
    /// # Errors
    /// Those of [`KubeconfigFile::parse`].
    pub fn parse(content: impl AsRef<[u8]>) -> io::Result<Self> {
        KubeconfigFile::parse(content.as_ref()).map(Self::from)
    }

    /// The kubeconfig in this file; a new one if there is none.
    ///
    /// # Errors
    /// Those of [`KubeconfigFile::read`].
    pub fn read_or_new(files: &dyn Files, path: &Path) -> io::Result<Self> {
        match files.metadata(path) {
            Ok(found) if found.kind == FileKind::File && found.size == 0 => Ok(Self::new()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::new()),
            _ => KubeconfigFile::read_on(files, path).map(Self::from),
        }
    }

    /// A new kubeconfig for the cluster of another one, and without its user. Everything that the cluster's entry holds is
    /// kept: the authority, proxy-url, tls-server-name (case C08).
    ///
    /// # Errors
    /// Those of [`KubeconfigFile::read`], also if there is no such file.
    pub fn for_cluster_of(files: &dyn Files, path: &Path) -> io::Result<Self> {
        let file = KubeconfigFile::read_on(files, path)?;
        let SecretsOfCluster { server, authority } = file.secrets_of_cluster()?;
        let mut other = Self::from(file);
        let mut new = Self::new();
        *new.cluster() = std::mem::take(other.cluster());
        // A user in the URL is a credential, which the new kubeconfig has one of its own for.
        if let Some(url) = server {
            new.cluster().insert("server".to_owned(), url.to_string().into());
        }
        if let Some(authority) = authority {
            new.cluster().insert("certificate-authority-data".to_owned(), authority.into());
        }
        // A relative path counts from the file that it stands in.
        if let (Some(Value::String(authority)), Some(directory)) =
            (new.cluster().get_mut("certificate-authority"), path.parent())
        {
            *authority = text(&directory.join(&*authority))?;
        }
        Ok(new)
    }

    fn cluster(&mut self) -> &mut Map<String, Value> {
        entry(&mut self.config, "clusters", &self.cluster, "cluster").expect("it was there when this was parsed")
    }

    fn user(&mut self) -> &mut Map<String, Value> {
        entry(&mut self.config, "users", &self.user, "user").expect("it was there when this was parsed")
    }

    /// Whether the cluster is the credential proxy that these files are for.
    pub fn is_of_proxy(&mut self, files: &ClientFiles) -> bool {
        let authority = self.cluster().get("certificate-authority").and_then(Value::as_str);
        authority.is_some_and(|authority| Path::new(authority) == files.certificate_authority)
    }

    /// Has the cluster be that of another kubeconfig; extensions are kept.
    pub fn use_cluster(&mut self, mut other: Self) {
        let extensions = self.cluster().remove("extensions");
        *self.cluster() = std::mem::take(other.cluster());
        self.cluster().extend(extensions.map(|extensions| ("extensions".to_owned(), extensions)));
    }

    /// Has the user be a certificate and a key in files, which its client reads anew when they change.
    ///
    /// # Errors
    /// If a path is not UTF-8.
    pub fn use_files(&mut self, certificate: &Path, key: &Path) -> io::Result<()> {
        let (certificate, key) = (text(certificate)?, text(key)?);
        let user = self.without_credential();
        user.insert("client-certificate".to_owned(), certificate.into());
        user.insert("client-key".to_owned(), key.into());
        Ok(())
    }

    /// Has the user be what this program prints, as an exec credential plugin (client.authentication.k8s.io/v1).
    pub fn use_exec(&mut self, program: &str, arguments: &[String]) {
        let exec = json!({
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": program,
            "args": arguments,
            "interactiveMode": "Never",
            "provideClusterInfo": false,
        });
        self.without_credential().insert("exec".to_owned(), exec);
    }

    /// Has the cluster be the credential proxy, and the user its client. The proxy passes requests on as they are, so its
    /// URL has the path of the API server's (case C40): of `upstream` if that is known, and otherwise the path that is
    /// there. What would contradict the proxy is removed: the other ways of verifying a server, and a proxy-url.
    ///
    /// # Errors
    /// If a path is not UTF-8.
    pub fn use_proxy(&mut self, server: LocalServer<'_>, upstream: Option<&http::Uri>) -> io::Result<()> {
        let authority = text(&server.files.certificate_authority)?;
        let cluster = self.cluster();
        let there = || cluster.get("server").and_then(Value::as_str).and_then(|url| url.parse().ok());
        let path = upstream.cloned().or_else(there).map(|url| url.path().trim_end_matches('/').to_owned());
        let path = path.unwrap_or_default();
        for key in ["certificate-authority-data", "insecure-skip-tls-verify", "tls-server-name", "proxy-url"] {
            cluster.remove(key);
        }
        cluster.insert("server".to_owned(), format!("https://{}{path}", server.address).into());
        cluster.insert("certificate-authority".to_owned(), authority.into());
        self.use_files(&server.files.certificate, &server.files.key)
    }

    fn without_credential(&mut self) -> &mut Map<String, Value> {
        let user = self.user();
        user.retain(|key, _| key == "extensions");
        user
    }

    /// Why the user does not follow the rotations of `pair`, if so: it holds a certificate itself, or names other files.
    /// `path` is where this kubeconfig was read from.
    fn staleness(&mut self, path: &Path, pair: &Path) -> Option<String> {
        let user = self.user();
        if user.contains_key("client-certificate-data") || user.contains_key("client-key-data") {
            return Some("it holds a certificate itself, which nobody renews".to_owned());
        }
        let named = user.get("client-certificate")?.as_str()?;
        let named = path.parent().map_or_else(|| PathBuf::from(named), |directory| directory.join(named));
        (named != pair).then(|| format!("it uses {}, and the pair is {}", named.display(), pair.display()))
    }

    /// The kubeconfig as YAML.
    ///
    /// # Errors
    /// If something in it cannot be said in YAML, which nothing that was read from YAML is.
    pub fn to_yaml(&self) -> io::Result<String> {
        serde_saphyr::to_string(&self.config).map_err(io::Error::other)
    }

    /// Writes it to this path as [`shared::replace`] does; false if the same is there already, and `owner`'s.
    ///
    /// # Errors
    /// Whatever the file system says; the file is then as it was.
    pub fn write(&self, files: &dyn Files, path: &Path, owner: Option<User>) -> io::Result<bool> {
        let same = KubeconfigFile::read_on(files, path).is_ok_and(|there| Self::from(there) == *self);
        let owned = |owner: User| files.metadata(path).is_ok_and(|there| there.uid == owner.uid);
        if same && owner.is_none_or(owned) {
            return Ok(false);
        }
        shared::replace(files, path, self.to_yaml()?.as_bytes(), owner)?;
        Ok(true)
    }
}

impl From<KubeconfigFile> for Kubeconfig {
    /// With a user to edit, also where the current context names none.
    fn from(file: KubeconfigFile) -> Self {
        let KubeconfigFile { root: mut config, cluster, user } = file;
        if entry(&mut config, "users", &user, "user").is_some() {
            return Self { config, cluster, user };
        }
        let user = if user.is_empty() { USER.to_owned() } else { user };
        let current = config.get("current-context").and_then(Value::as_str).unwrap_or_default().to_owned();
        if let Some(context) = entry(&mut config, "contexts", &current, "context") {
            context.insert("user".to_owned(), user.clone().into());
        }
        if let Value::Array(users) = config.entry("users").or_insert_with(|| json!([])) {
            users.retain(|entry| entry.get("name").and_then(Value::as_str) != Some(&user));
            users.push(json!({ "name": user, "user": {} }));
        } else {
            config.insert("users".to_owned(), json!([{ "name": user, "user": {} }]));
        }
        Self { config, cluster, user }
    }
}

impl Default for Kubeconfig {
    fn default() -> Self {
        Self::new()
    }
}

/// Why the kubeconfig in this file does not follow the rotations of `pair`, if so; one that is not there does not matter.
pub fn staleness(files: &dyn Files, path: &Path, pair: &Path) -> Option<String> {
    match KubeconfigFile::read_on(files, path) {
        Ok(file) => Kubeconfig::from(file).staleness(path, pair),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(format!("it cannot be used: {error}")),
    }
}

/// The mapping under `key` of the entry of this name in a list.
fn entry<'a>(
    config: &'a mut Map<String, Value>,
    list: &str,
    name: &str,
    key: &str,
) -> Option<&'a mut Map<String, Value>> {
    let entries = config.get_mut(list)?.as_array_mut()?;
    let entry = entries.iter_mut().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))?;
    let value = entry.as_object_mut()?.entry(key).or_insert_with(|| json!({}));
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut()
}

fn text(path: &Path) -> io::Result<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| io::Error::other(format!("{} is not UTF-8", path.display())))
}

#[cfg(test)]
mod tests;
