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
mod tests {
    use super::*;
    use crate::world::SystemFiles;

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

    fn pair() -> &'static Path {
        Path::new("/pki/current.pem")
    }

    #[test]
    fn c08_the_cluster_is_kept_whole_and_the_token_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let (bootstrap, path) = (directory.path().join("bootstrap"), directory.path().join("etc/kubeconfig"));
        std::fs::write(&bootstrap, BOOTSTRAP).expect("written");
        let mut kubeconfig = Kubeconfig::for_cluster_of(&SystemFiles, &bootstrap).expect("a kubeconfig");
        kubeconfig.use_files(pair(), pair()).expect("text");
        assert!(kubeconfig.write(&SystemFiles, &path, None).expect("written"));
        let text = std::fs::read_to_string(&path).expect("readable");
        for kept in ["http://p:3128", "tls-server-name: api", "client-key: /pki/current.pem"] {
            assert!(text.contains(kept), "{kept} in {text}");
        }
        assert!(text.contains(&directory.path().join("ca.crt").display().to_string()));
        assert!(!text.contains("abcdef"));
        assert_eq!(staleness(&SystemFiles, &path, pair()), None);
        assert!(staleness(&SystemFiles, &path, Path::new("/other.pem")).is_some());

        // Kept apart, and taken from there when the bootstrap kubeconfig is gone (case C23).
        let kept = directory.path().join("state/cluster.kubeconfig");
        Kubeconfig::for_cluster_of(&SystemFiles, &bootstrap)
            .expect("a kubeconfig")
            .write(&SystemFiles, &kept, None)
            .expect("written");
        assert!(!std::fs::read_to_string(&kept).expect("readable").contains("abcdef"));
        let mut again = Kubeconfig::for_cluster_of(&SystemFiles, &kept).expect("a kubeconfig");
        again.use_files(pair(), pair()).expect("text");
        assert_eq!(again, kubeconfig);
        assert!(!again.write(&SystemFiles, &path, None).expect("the same"));
    }

    #[test]
    fn c08_an_inline_certificate_is_noticed_and_mended() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, EXISTING).expect("written");
        assert!(staleness(&SystemFiles, &path, pair()).is_some_and(|reason| reason.contains("itself")));
        let mut kubeconfig = Kubeconfig::read_or_new(&SystemFiles, &path).expect("a kubeconfig");
        kubeconfig.use_files(pair(), pair()).expect("text");
        assert!(kubeconfig.write(&SystemFiles, &path, None).expect("written"));
        assert_eq!(staleness(&SystemFiles, &path, pair()), None);
        assert!(staleness(&SystemFiles, directory.path(), pair()).is_some());
        std::fs::write(&path, "").expect("torn");
        assert!(staleness(&SystemFiles, &path, pair()).is_some());
    }

    #[test]
    fn c08_what_is_not_ours_is_kept() {
        let mut kubeconfig = Kubeconfig::parse(EXISTING).expect("a kubeconfig");
        let files = ClientFiles::in_directory(Path::new("/run/x"));
        kubeconfig
            .use_proxy(LocalServer { address: ([127, 0, 0, 1], 6444).into(), files: &files }, None)
            .expect("text");
        let text = kubeconfig.to_yaml().expect("YAML");
        for kept in ["https://127.0.0.1:6444/k8s/clusters/c-1", "https://other", "namespace: here", "a: b", "secret"] {
            assert!(text.contains(kept), "{kept} in {text}");
        }
        for gone in ["-data", "proxy-url"] {
            assert!(!text.contains(gone), "{gone} in {text}");
        }
        assert!(text.contains("/run/x/client.key"));
        assert_eq!(Kubeconfig::parse(&text).expect("a kubeconfig"), kubeconfig);
        assert!(!format!("{kubeconfig:?}").contains("secret"));

        assert!(kubeconfig.is_of_proxy(&files));
        kubeconfig.use_cluster(Kubeconfig::parse(BOOTSTRAP).expect("a kubeconfig"));
        let text = kubeconfig.to_yaml().expect("YAML");
        assert!(
            text.contains("https://10.0.0.1:6443") && text.contains("a: b") && !text.contains("127.0.0.1"),
            "{text}"
        );
        assert!(!kubeconfig.is_of_proxy(&files));
    }

    #[test]
    fn c08_numbers_are_what_go_reads() {
        let text = EXISTING.replace("a: b", "octal: 010, decimal: 10, text: '010'");
        let text = Kubeconfig::parse(&text).and_then(|kubeconfig| kubeconfig.to_yaml()).expect("YAML");
        for kept in ["octal: 8\n", "decimal: 10\n"] {
            assert!(text.contains(kept), "{kept} in {text}");
        }
        assert!(text.contains("text: '010'") || text.contains("text: \"010\""), "{text}");
    }

    #[test]
    fn a_new_one_is_whole_and_one_without_its_context_is_none() {
        let mut kubeconfig = Kubeconfig::new();
        kubeconfig.use_exec("/usr/bin/pintle", &["credential".to_owned()]);
        let text = kubeconfig.to_yaml().expect("YAML");
        assert!(text.contains("current-context: default-context") && text.contains("interactiveMode: Never"), "{text}");
        for wrong in ["current-context: x", "[]", ": {", "current-context: mine\ncontexts: [{name: mine, context: {}}]"]
        {
            assert!(Kubeconfig::parse(wrong).is_err(), "{wrong}");
        }
    }

    /// Other YAML parsers read what is written here: Go's take the words and numbers of YAML 1.1 for what they were there.
    #[test]
    fn what_might_be_no_text_elsewhere_is_quoted() {
        for word in
            ["yes", "on", "n", "null", "~", "0123", "0x1F", "1_000", "12:30:45", "1e3", "1.5", "", "- a", "a: b"]
        {
            let mut kubeconfig = Kubeconfig::new();
            kubeconfig.use_exec(word, &[]);
            let text = kubeconfig.to_yaml().expect("YAML");
            let line = text.lines().find(|line| line.trim_start().starts_with("command:")).expect("a line");
            assert!(line.contains(['\'', '"']), "{line}");
        }
    }
}
