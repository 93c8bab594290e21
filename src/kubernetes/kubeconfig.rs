//! The one reader of kubeconfig files, which takes what kubectl takes.
//!
//! As in client-go, only the first YAML document counts, the last of several equal keys wins, UTF-16 with a byte order mark
//! is read, base64 may be broken into lines, inline data comes before files, and relative paths count from the file's own
//! directory. Unlike kubectl, a kubeconfig must have a current context with a cluster, be a regular file, and have at most
//! [`MAXIMUM_LENGTH`] bytes: it is read again and again, by a process that runs as root.

use std::io;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{GeneralPurpose, GeneralPurposeConfig};
use pintle_agent_core::pem_block::PemBlocks;
use serde::Deserialize;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use crate::parse_error;
use crate::world::{Files, SystemFiles};

/// A kubeconfig that is longer is not read, and neither is a file that it names.
pub const MAXIMUM_LENGTH: u64 = 1 << 20;

/// Go's `base64.StdEncoding`, which does not look at the unused bits of the last character.
const BASE64: GeneralPurpose =
    GeneralPurpose::new(&STANDARD, GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true));

/// A kubeconfig whose current context has a cluster.
pub struct KubeconfigFile {
    /// Everything that it holds.
    pub root: Map<String, Value>,
    /// The name of the current context's cluster, which is there.
    pub cluster: String,
    /// The name of the current context's user; empty if it names none, and the user need not be there.
    pub user: String,
}

/// What a cluster's entry holds although it is secret, and what to put in its place.
pub struct SecretsOfCluster {
    /// The API server's URL without the user and password in it.
    pub server: Option<http::Uri>,
    /// The certificates alone, where a private key may stand beside them: certificate-authority-data.
    pub authority: Option<String>,
}

/// The entry of a cluster, as far as it matters here. Whatever is empty is as good as missing.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ClusterEntry {
    server: Option<String>,
    certificate_authority: Option<String>,
    certificate_authority_data: Option<String>,
    insecure_skip_tls_verify: Option<bool>,
    tls_server_name: Option<String>,
    proxy_url: Option<String>,
}

/// The entry of a user, as far as pintle itself acts on it.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct UserEntry {
    pub(super) client_certificate: Option<String>,
    pub(super) client_certificate_data: Option<String>,
    pub(super) client_key: Option<String>,
    pub(super) client_key_data: Option<String>,
    pub(super) token: Option<String>,
    #[serde(rename = "tokenFile")]
    pub(super) token_file: Option<String>,
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
}

impl KubeconfigFile {
    /// Reads the file.
    ///
    /// # Errors
    /// `InvalidData` if it is not a kubeconfig that can be used; otherwise whatever the file system says.
    pub fn read(path: &Path) -> io::Result<Self> {
        Self::read_on(&SystemFiles, path)
    }

    /// As [`read`](Self::read), on this file system.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_on(files: &dyn Files, path: &Path) -> io::Result<Self> {
        Self::parse(&read_file(files, path)?)
    }

    /// Parses the content of a file.
    ///
    /// # Errors
    /// `InvalidData` if it is not a kubeconfig, or its current context, or that one's cluster, is not in it.
    pub fn parse(content: &[u8]) -> io::Result<Self> {
        let text = text_of(content)?;
        // 010 is 8 to Go's parser too, and !!binary a string.
        let options = serde_saphyr::options! {
            legacy_octal_numbers: true,
            duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        };
        let mut reader = text.as_bytes();
        let first = serde_saphyr::read_with_options::<_, Value>(&mut reader, options).next();
        let first = match first {
            Some(parsed) => parsed.map_err(|error| invalid(parse_error::yaml(&error)))?,
            None => return Err(invalid("it is empty".to_owned())),
        };
        let Value::Object(root) = first else { return Err(invalid("it is not a mapping".to_owned())) };
        let name = |of: &Value, key: &str| of.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let current = root.get("current-context").and_then(Value::as_str).unwrap_or_default();
        if current.is_empty() {
            return Err(invalid("it has no current-context".to_owned()));
        }
        let context = entry(&root, "contexts", current, "context")
            .ok_or_else(|| invalid(format!("its current context{} is not in it", quoted(current))))?;
        let (cluster, user) = (name(context, "cluster"), name(context, "user"));
        if entry(&root, "clusters", &cluster, "cluster").is_none() {
            return Err(invalid(format!("its cluster{} is not in it", quoted(&cluster))));
        }
        Ok(Self { root, cluster, user })
    }

    /// What must not be copied into another kubeconfig along with the cluster.
    ///
    /// # Errors
    /// `InvalidData` if the cluster cannot be used.
    pub fn secrets_of_cluster(&self) -> io::Result<SecretsOfCluster> {
        let entry = self.cluster_entry()?;
        let (url, user_info) = entry.server().map_err(invalid)?;
        let mut secrets = SecretsOfCluster { server: user_info.map(|_| url), authority: None };
        if filled(&entry.certificate_authority_data).is_none() {
            return Ok(secrets);
        }
        let pem = Zeroizing::new(entry.certificate_authority(Path::new("")).map_err(invalid)?.unwrap_or_default());
        let blocks = PemBlocks::of(&*pem);
        let certificates =
            blocks.certificates().map_err(|error| invalid(format!("its certificate-authority-data: {error}")))?;
        if blocks.damaged.is_some() || blocks.blocks.len() != certificates.len() {
            let blocks: Vec<_> = certificates.into_iter().map(|der| pem::Pem::new("CERTIFICATE", der)).collect();
            secrets.authority = Some(BASE64.encode(pem::encode_many(&blocks)));
        }
        Ok(secrets)
    }

    pub(super) fn cluster_entry(&self) -> io::Result<ClusterEntry> {
        typed(entry(&self.root, "clusters", &self.cluster, "cluster"), "cluster")
    }

    pub(super) fn user_entry(&self) -> io::Result<UserEntry> {
        typed(self.user_value(), "user")
    }

    /// What kube does for a user: exec plugins, the auth-providers that came before them, and impersonation.
    pub(super) fn exec_and_impersonation(&self) -> io::Result<kube::config::AuthInfo> {
        let keys = ["exec", "auth-provider", "as", "as-uid", "as-groups", "as-user-extra"];
        let user = self.user_value().and_then(Value::as_object);
        let chosen = user.into_iter().flatten().filter(|(key, _)| keys.contains(&key.as_str()));
        let chosen: Map<_, _> = chosen.map(|(key, value)| (key.clone(), value.clone())).collect();
        typed(Some(&Value::Object(chosen)), "user")
    }

    /// What a cluster's entry has for exec plugins.
    pub(super) fn exec_extension(&self) -> Option<Value> {
        let extensions = entry(&self.root, "clusters", &self.cluster, "cluster")?.get("extensions")?.as_array()?;
        let extension = extensions.iter().find(|extension| {
            extension.get("name").and_then(Value::as_str) == Some("client.authentication.k8s.io/exec")
        });
        extension?.get("extension").cloned()
    }

    fn user_value(&self) -> Option<&Value> {
        entry(&self.root, "users", &self.user, "user")
    }
}

impl ClusterEntry {
    /// The API server's URL without user and query, and the user and password that it may hold.
    pub(super) fn server(&self) -> Result<(http::Uri, Option<String>), String> {
        let server = filled(&self.server).ok_or("its cluster has no server")?;
        let wrong = || "its server is not a URL such as https://api.example:6443".to_owned();
        let url: http::Uri = server.parse().map_err(|_| wrong())?;
        let authority =
            url.authority().filter(|_| url.host().is_some_and(|host| !host.is_empty())).ok_or_else(wrong)?;
        // http takes any number for a port.
        if authority.as_str().rsplit(['@', ']']).next().is_some_and(|end| end.contains(':')) && url.port_u16().is_none()
        {
            return Err("the port of its server is not a number below 65536".to_owned());
        }
        match url.scheme_str() {
            Some("https") => {}
            // A certificate cannot be used there, and a token could be read by anybody on the way.
            Some("http") => return Err("its server is http://, and a certificate needs https://".to_owned()),
            _ => return Err(wrong()),
        }
        let (user_info, host) = match authority.as_str().rsplit_once('@') {
            Some((user_info, host)) => (Some(user_info.to_owned()), host),
            None => (None, authority.as_str()),
        };
        let plain = format!("https://{host}{}", url.path());
        Ok((plain.parse().map_err(|_| wrong())?, user_info))
    }

    /// The authority's certificates, PEM; `None` if the system's authorities are meant.
    pub(super) fn certificate_authority(&self, directory: &Path) -> Result<Option<Vec<u8>>, String> {
        let what = "certificate-authority";
        Ok(data_or_file(what, &self.certificate_authority_data, &self.certificate_authority, directory)?
            .map(|content| content.to_vec()))
    }

    pub(super) fn is_insecure(&self) -> bool {
        self.insecure_skip_tls_verify == Some(true)
    }

    pub(super) fn tls_server_name(&self) -> Option<&str> {
        filled(&self.tls_server_name)
    }

    pub(super) fn proxy_url(&self) -> Option<&str> {
        filled(&self.proxy_url)
    }
}

impl UserEntry {
    /// The certificates and the key with which the user authenticates, PEM, if it does so.
    pub(super) fn client_certificate(&self, directory: &Path) -> Result<Option<ClientPair>, String> {
        let chain =
            data_or_file("client-certificate", &self.client_certificate_data, &self.client_certificate, directory)?;
        let key = data_or_file("client-key", &self.client_key_data, &self.client_key, directory)?;
        match (chain, key) {
            (Some(chain), Some(key)) => Ok(Some(ClientPair { chain, key })),
            (None, None) => Ok(None),
            (Some(_), None) => Err("it has a client-certificate and no client-key".to_owned()),
            (None, Some(_)) => Err("it has a client-key and no client-certificate".to_owned()),
        }
    }

    /// The file of its token.
    pub(super) fn token_file(&self, directory: &Path) -> Option<PathBuf> {
        filled(&self.token_file).map(|path| directory.join(path))
    }

    /// Its bearer token. What stands in a token file counts more than a token beside it, as in client-go.
    pub(super) fn bearer_token(&self, directory: &Path) -> Result<Option<Zeroizing<String>>, String> {
        let inline = filled(&self.token).map(|token| Zeroizing::new(token.to_owned()));
        let Some(path) = self.token_file(directory) else { return Ok(inline) };
        let words = |error: &str| format!("its token file {} cannot be read: {error}", path.display());
        let token = read_file(&SystemFiles, &path).map_err(|error| words(&error.to_string())).and_then(|content| {
            let token = std::str::from_utf8(&content).map(str::trim).unwrap_or_default();
            let token = Some(token).filter(|token| !token.is_empty());
            token.map(|token| Zeroizing::new(token.to_owned())).ok_or_else(|| words("it is empty or not UTF-8"))
        });
        match (token, inline) {
            (Err(_), Some(inline)) => Ok(Some(inline)),
            (token, _) => token.map(Some),
        }
    }

    /// Its name and password for HTTP basic authentication.
    pub(super) fn basic(&self) -> Option<(&str, &str)> {
        Some((filled(&self.username)?, self.password.as_deref().unwrap_or_default()))
    }
}

/// A certificate chain and its key, both PEM.
pub(super) struct ClientPair {
    pub(super) chain: Zeroizing<Vec<u8>>,
    pub(super) key: Zeroizing<Vec<u8>>,
}

/// The content of a regular file of at most [`MAXIMUM_LENGTH`] bytes. A pipe is not waited for.
pub(super) fn read_file(files: &dyn Files, path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    files.read(path, MAXIMUM_LENGTH).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => invalid(
            "it must be a regular file, since it is read again and again; a pipe, as <(…) is, cannot be".to_owned(),
        ),
        io::ErrorKind::FileTooLarge => invalid(format!("it is longer than {} KiB", MAXIMUM_LENGTH >> 10)),
        _ => error,
    })
}

/// The text of a file in UTF-8, or in UTF-16 with a byte order mark.
fn text_of(content: &[u8]) -> io::Result<Zeroizing<String>> {
    let not_text = || invalid("it is not UTF-8".to_owned());
    let utf16 = |content: &[u8], unit: fn([u8; 2]) -> u16| {
        let units = content.chunks_exact(2).map(|pair| unit([pair[0], pair[1]]));
        char::decode_utf16(units).collect::<Result<String, _>>().map_err(|_| not_text())
    };
    let text = match content {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes)?,
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes)?,
        [0xef, 0xbb, 0xbf, rest @ ..] => std::str::from_utf8(rest).map_err(|_| not_text())?.to_owned(),
        _ => std::str::from_utf8(content).map_err(|_| not_text())?.to_owned(),
    };
    Ok(Zeroizing::new(text))
}

/// The value under `key` of the entry of this name in a list.
fn entry<'a>(root: &'a Map<String, Value>, list: &str, name: &str, key: &str) -> Option<&'a Value> {
    let entries = root.get(list)?.as_array()?;
    let entry = entries.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))?;
    Some(entry.get(key).unwrap_or(&Value::Null))
}

fn typed<T: Default + for<'de> Deserialize<'de>>(value: Option<&Value>, what: &str) -> io::Result<T> {
    match value {
        None | Some(Value::Null) => Ok(T::default()),
        Some(value) => {
            T::deserialize(value).map_err(|error| invalid(format!("its {what}: {}", parse_error::json_value(&error))))
        }
    }
}

/// Inline data in base64, or else the content of the file.
fn data_or_file(
    what: &str,
    data: &Option<String>,
    file: &Option<String>,
    directory: &Path,
) -> Result<Option<Zeroizing<Vec<u8>>>, String> {
    if let Some(data) = filled(data) {
        let encoded: Zeroizing<String> =
            Zeroizing::new(data.chars().filter(|character| !matches!(character, '\r' | '\n')).collect());
        let decoded = BASE64.decode(encoded.as_bytes()).map_err(|_| format!("its {what}-data is not valid base64"))?;
        return Ok(Some(Zeroizing::new(decoded)));
    }
    let Some(path) = filled(file).map(|path| directory.join(path)) else { return Ok(None) };
    read_file(&SystemFiles, &path)
        .map(Some)
        .map_err(|error| format!("its {what} {} cannot be read: {error}", path.display()))
}

/// The name after a blank, or nothing if it may be more than a name: lines of a key whose own name got lost are folded into
/// the value above them.
fn quoted(name: &str) -> String {
    let is_name = name.len() <= 253 && !name.contains(char::is_whitespace);
    if is_name { format!(" {name:?}") } else { String::new() }
}

fn filled(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

fn invalid(detail: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c36_a_name_that_swallowed_lines_of_a_key_is_not_quoted() {
        // Lines that are indented further belong to the value above them: what is left where their key got lost.
        let lines = "\n    hunter2hunter2hunter2\n    hunter2hunter2hunter2\n";
        let current = format!("current-context: admin{lines}contexts: []\n");
        let cluster =
            format!("current-context: a\ncontexts:\n- name: a\n  context:\n   cluster: c{lines}clusters: []\n");
        let alone = format!("current-context:{lines}contexts: []\n");
        for text in [current, cluster, alone] {
            let error = KubeconfigFile::parse(text.as_bytes()).err().expect("nothing has that name").to_string();
            assert!(error.contains("is not in it") && !error.contains("hunter2"), "{text}: {error}");
        }
        let plain = KubeconfigFile::parse(b"current-context: kubernetes-admin@kubernetes\n").err().expect("no context");
        assert!(plain.to_string().contains("\"kubernetes-admin@kubernetes\""), "{plain}");
    }
}
