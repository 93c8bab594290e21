//! Flags and a TOML file become a [`Config`]: whatever is wrong with them is said here, before anything is done.

mod backends;
mod file;
pub mod migration;
mod proxy;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pintle_agent_core::policy::KeyPrefix;
use pintle_agent_core::{Policy, Template};
use pintle_plugins_api::KeyAlgorithm;

pub use file::{BackendConfiguration, FileConfiguration, Isolation, PluginTable, ProcessIsolation};
pub use proxy::{ProxyConfiguration, ProxySettings};

use crate::store::shared;
use crate::world::SystemFiles;

/// Where the configuration is looked for when no `--config` is given.
pub const DEFAULT_CONFIG: &str = "/etc/pintle/config.toml";
/// The backend that is always there.
pub const FILE_BACKEND: &str = "file";

/// What is wrong with the configuration.
#[derive(Debug)]
pub struct ConfigError {
    /// What is wrong, and where.
    pub detail: String,
    /// What to do about it.
    pub hint: String,
}

impl ConfigError {
    fn new(detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { detail: detail.into(), hint: hint.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.detail)
    }
}

impl std::error::Error for ConfigError {}

/// The flags that override the file; the kubelet's own names where it has one.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Flags {
    /// Configuration file, TOML [default: /etc/pintle/config.toml if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The kubelet's kubeconfig; written if it does not exist [default: /var/lib/kubelet/kubeconfig]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Kubeconfig with the credential for the first certificate
    #[arg(long, value_name = "FILE")]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// Directory of the certificate pairs [default: /var/lib/kubelet/pki]
    #[arg(long, value_name = "DIRECTORY")]
    pub cert_dir: Option<PathBuf>,
    /// The node's name [default: the host name, lower case]
    #[arg(long, visible_alias = "hostname-override", value_name = "NAME")]
    pub node_name: Option<String>,
    /// Whether to rotate the certificate before it ends [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub rotate_certificates: Option<bool>,
    /// Directory of the journal, the control socket and file-held keys [default: /var/lib/pintle]
    #[arg(long, value_name = "DIRECTORY")]
    pub state_dir: Option<PathBuf>,
    /// Backend in which new keys are made: "file" or a name from the configuration file [default: file]
    #[arg(long, value_name = "NAME")]
    pub backend: Option<String>,
    /// Algorithm of new keys: ecdsa-p256, ecdsa-p384, rsa-2048, rsa-3072, rsa-4096 or ed25519 [default: ecdsa-p256]
    #[arg(long, value_name = "ALGORITHM")]
    pub key_algorithm: Option<KeyAlgorithm>,
    /// Certificates of the authority that must have signed what is issued, PEM
    #[arg(long, value_name = "FILE")]
    pub client_ca_file: Option<PathBuf>,
    /// Life to ask for, in seconds, at least 600; the signer may grant less
    #[arg(long, value_name = "SECONDS")]
    pub expiration_seconds: Option<i32>,
    /// How many pairs to keep, the current one included [default: 2]
    #[arg(long, value_name = "NUMBER")]
    pub keep_pairs: Option<usize>,
    /// Address that Prometheus reads the metrics from, such as 127.0.0.1:9464 [default: none]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics_address: Option<SocketAddr>,
}

/// What the agent is to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The node's name.
    pub node_name: String,
    /// The kubelet's kubeconfig.
    pub kubeconfig: PathBuf,
    /// The kubeconfig with the credential for the first certificate.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// The directory of the pairs.
    pub cert_dir: PathBuf,
    /// The directory of the journal, the control socket and file-held keys.
    pub state_dir: PathBuf,
    /// Whether to rotate before the certificate ends.
    pub rotate_certificates: bool,
    /// Certificates of the authority that must have signed what is issued.
    pub client_ca_file: Option<PathBuf>,
    /// How many pairs to keep.
    pub keep_pairs: usize,
    /// Where new keys are made.
    pub backend: String,
    /// Where they are made unless `pintle migrate` has moved the identity.
    pub configured_backend: String,
    /// All backends, by name; [`FILE_BACKEND`] is among them.
    pub backends: BTreeMap<String, BackendConfiguration>,
    /// The algorithm of new keys.
    pub key_algorithm: KeyAlgorithm,
    /// The life to ask for, seconds.
    pub expiration_seconds: Option<i32>,
    /// Whether to enrol again by itself when the backend has lost the key in use.
    pub enrol_after_key_loss: bool,
    /// Where Prometheus finds the metrics, if it is to.
    pub metrics_address: Option<SocketAddr>,
    /// The credential proxy, if there is to be one.
    pub proxy: Option<ProxySettings>,
}

impl Config {
    /// Reads the file that the flags name, or the default one if it exists, and lets the flags override it.
    ///
    /// # Errors
    /// The first thing that is wrong, with what to do about it.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let file = match &flags.config {
            Some(path) => FileConfiguration::read(path)?,
            None if Path::new(DEFAULT_CONFIG).exists() => FileConfiguration::read(Path::new(DEFAULT_CONFIG))?,
            None => FileConfiguration::default(),
        };
        let mut config = Self::from_parts(flags.clone(), file)?;
        migration::follow(&mut config)?;
        Ok(config)
    }

    fn from_parts(flags: Flags, file: FileConfiguration) -> Result<Self, ConfigError> {
        let node_name = match flags.node_name.or(file.node_name) {
            Some(name) => name,
            None => host_name(),
        };
        check_node_name(&node_name)?;
        let state_dir = flags.state_dir.or(file.state_dir).unwrap_or_else(|| "/var/lib/pintle".into());
        let mut backends = file.backends;
        backends.entry(FILE_BACKEND.to_owned()).or_insert_with(|| BackendConfiguration::File { directory: None });
        let backend = flags.backend.or(file.backend).unwrap_or_else(|| FILE_BACKEND.to_owned());
        if !backends.contains_key(&backend) {
            let known: Vec<_> = backends.keys().map(String::as_str).collect();
            return Err(ConfigError::new(
                format!("backend = {backend:?} names no backend; there are: {}", known.join(", ")),
                format!("add a table [backends.{backend}] to the configuration file"),
            ));
        }
        let expiration_seconds = flags.expiration_seconds.or(file.expiration_seconds);
        if let Some(seconds) = expiration_seconds.filter(|seconds| *seconds < 600) {
            return Err(ConfigError::new(
                format!("expiration-seconds = {seconds}: the API server refuses less than 600"),
                "ask for at least 600, or leave it out to take what the signer gives",
            ));
        }
        let keep_pairs = flags.keep_pairs.or(file.keep_pairs).unwrap_or(2);
        if keep_pairs == 0 {
            return Err(ConfigError::new("keep-pairs = 0 would remove the pair in use", "keep at least 1"));
        }
        let proxy = file.proxy.map(proxy::ProxyTable::settings).transpose()?;
        let config = Self {
            proxy,
            metrics_address: flags.metrics_address.or(file.metrics_address),
            kubeconfig: flags.kubeconfig.or(file.kubeconfig).unwrap_or_else(|| "/var/lib/kubelet/kubeconfig".into()),
            bootstrap_kubeconfig: flags.bootstrap_kubeconfig.or(file.bootstrap_kubeconfig),
            cert_dir: flags.cert_dir.or(file.cert_dir).unwrap_or_else(|| "/var/lib/kubelet/pki".into()),
            rotate_certificates: flags.rotate_certificates.or(file.rotate_certificates).unwrap_or(true),
            client_ca_file: flags.client_ca_file.or(file.client_ca_file),
            key_algorithm: flags.key_algorithm.or(file.key_algorithm).unwrap_or_default(),
            enrol_after_key_loss: file.on_key_loss.unwrap_or_default() == file::OnKeyLoss::Enrol,
            node_name,
            state_dir,
            keep_pairs,
            configured_backend: backend.clone(),
            backend,
            backends,
            expiration_seconds,
        };
        let config = config.absolute()?;
        backends::check(&config)?;
        let local = config.proxy.as_ref().and_then(|proxy| proxy.kubeconfig.as_ref());
        if local.is_some_and(|local| shared::is_same(&SystemFiles, local, &config.kubeconfig)) {
            return Err(ConfigError::new(
                "proxy.kubeconfig and kubeconfig are one file: the first points at the proxy, the second at the API server",
                "give the second another name, such as /var/lib/pintle/kubeconfig, with the cluster's entry",
            ));
        }
        Ok(config)
    }

    /// All paths made absolute: a kubeconfig names the pair, and is read from elsewhere.
    fn absolute(mut self) -> Result<Self, ConfigError> {
        let paths = [&mut self.kubeconfig, &mut self.cert_dir, &mut self.state_dir];
        let local = self.proxy.iter_mut().filter_map(|proxy| proxy.kubeconfig.as_mut());
        let optional = self.bootstrap_kubeconfig.iter_mut().chain(&mut self.client_ca_file).chain(local);
        let keys = self.backends.values_mut().filter_map(|backend| match backend {
            BackendConfiguration::File { directory } | BackendConfiguration::Tpm { directory, .. } => {
                directory.as_mut()
            }
            BackendConfiguration::Pkcs11 { .. } | BackendConfiguration::Plugin { .. } => None,
        });
        for path in paths.into_iter().chain(optional).chain(keys) {
            *path = absolute(path)?;
        }
        Ok(self)
    }

    /// What certificate is asked for.
    pub fn template(&self) -> Template {
        Template { expiration_seconds: self.expiration_seconds, ..Template::kubelet_client(&self.node_name) }
    }

    /// When and how it is rotated.
    pub fn policy(&self) -> Policy {
        Policy {
            identity: self.template().common_name,
            key_prefix: KeyPrefix::new(&self.node_name, "client"),
            backend: self.backend.clone(),
            algorithm: self.key_algorithm,
            rotate: self.rotate_certificates,
            enrol_after_key_loss: self.enrol_after_key_loss,
            back_off_base: Policy::BACK_OFF_BASE,
            back_off_cap: Policy::BACK_OFF_CAP,
        }
    }

    /// Where the running agent listens for `pintle status` and `pintle rotate`.
    pub fn control_socket(&self) -> PathBuf {
        self.state_dir.join("control.sock")
    }

    /// Where the cluster of the bootstrap kubeconfig is kept until the kubelet's kubeconfig is written: the bootstrap
    /// kubeconfig may be deleted before that (case C23).
    pub fn cluster_kubeconfig(&self) -> PathBuf {
        self.state_dir.join("cluster.kubeconfig")
    }

    /// Where it is kept which modules refused which PIN's file.
    pub fn refused_pins(&self) -> PathBuf {
        self.state_dir.join("refused-pins.json")
    }

    /// Where the client identity's journal is.
    pub fn journal(&self) -> PathBuf {
        self.state_dir.join("client.json")
    }

    /// Where the file backend's keys are, unless its table says otherwise.
    pub fn file_keys(&self) -> PathBuf {
        match self.backends.get(FILE_BACKEND) {
            Some(BackendConfiguration::File { directory: Some(directory) }) => directory.clone(),
            _ => self.state_dir.join("keys"),
        }
    }
}

/// This path made absolute.
fn absolute(path: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(path).map_err(|error| {
        let detail = format!("{:?} is no path: {error}", path.display());
        ConfigError::new(detail, "give the path of a file or directory")
    })
}

/// The host name as the kubelet takes it (`nodeutil.GetHostname`).
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase()
}

/// A node's name is a DNS subdomain (RFC 1123).
fn check_node_name(name: &str) -> Result<(), ConfigError> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|character| matches!(character, 'a'..='z' | '0'..='9' | '-'))
    };
    if name.len() <= 253 && name.split('.').all(label) {
        return Ok(());
    }
    Err(ConfigError::new(
        format!("node name {name:?} is no DNS subdomain: lower-case letters, digits, '-' and '.', at most 253"),
        "give the node's name as kubectl get nodes shows it with --node-name",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let flags = Flags { node_name: Some("worker-1".to_owned()), ..Flags::default() };
        Config::from_parts(flags, FileConfiguration::parse(text, Path::new("config.toml"))?)
    }

    #[test]
    fn flags_override_the_file_and_defaults_are_the_kubelets() {
        let config = parse("node-name = \"other\"\nkeep-pairs = 3\n").expect("valid");
        assert_eq!((config.node_name.as_str(), config.keep_pairs), ("worker-1", 3));
        assert_eq!(config.cert_dir, Path::new("/var/lib/kubelet/pki"));
        assert!(config.rotate_certificates);
        let config = parse("[backends.file]\ntype = \"file\"\ndirectory = \"keys\"\n").expect("valid");
        assert!(config.file_keys().is_absolute());
    }

    #[test]
    fn every_key_algorithm_is_spelled_alike_in_the_file_the_flag_and_json() {
        #[derive(clap::Parser)]
        struct CommandLine {
            #[command(flatten)]
            flags: Flags,
        }
        for algorithm in KeyAlgorithm::ALL {
            let name = algorithm.to_string();
            let from_file = parse(&format!("key-algorithm = \"{name}\"")).expect(&name);
            assert_eq!(from_file.key_algorithm, algorithm);
            let flag = format!("--key-algorithm={name}");
            let from_flag = <CommandLine as clap::Parser>::try_parse_from(["pintle", &flag]).expect(&name);
            assert_eq!(from_flag.flags.key_algorithm, Some(algorithm));
            assert_eq!(serde_json::to_value(algorithm).expect(&name), name);
        }
        // As versions before wrote it.
        assert_eq!(parse("key-algorithm = \"rsa2048\"").expect("valid").key_algorithm, KeyAlgorithm::Rsa2048);
    }

    #[test]
    fn one_file_is_not_two_kubeconfigs_whatever_it_is_called() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir(at("real")).expect("made");
        std::os::unix::fs::symlink("real", at("link")).expect("linked");
        let both =
            |one: PathBuf, other: PathBuf| parse(&format!("kubeconfig = {one:?}\n[proxy]\nkubeconfig = {other:?}"));
        let error = both(at("link/config"), at("link/../real/config")).expect_err("one file");
        assert!(error.detail.contains("one file"), "{error:?}");
        both(at("real/config"), at("real/other")).expect("two files");
    }

    #[test]
    fn modules_are_isolated_unless_told_otherwise_and_secrets_are_not_shown() {
        let config = parse(
            "[backends.token]\ntype = \"pkcs11\"\nuri = \"pkcs11:token=a?module-path=/a.so\"\npin-file = \"/etc/pin\"\n\
             [backends.fast]\ntype = \"tpm\"\nisolation = \"none\"\n\
             [backends.vendor]\ntype = \"plugin\"\nlibrary = \"vendor\"\nconfiguration = { code = \"s3cret\" }\n\
             isolation = { user = \"nobody\", environment = { VENDOR_CONF = \"/etc/vendor\" } }\n",
        )
        .expect("valid");
        let isolation = |name: &str| config.backends[name].isolation().cloned();
        assert_eq!(isolation("token"), Some(Isolation::default()));
        assert_eq!(isolation("fast"), Some(Isolation::None));
        assert!(matches!(isolation("vendor"), Some(Isolation::Process(process)) if process.user.is_some()));
        assert_eq!(isolation("file"), None);
        assert!(!format!("{config:?}").contains("s3cret"));
        let error =
            parse("[backends.x]\ntype = \"pkcs11\"\nuri = \"pkcs11:token=a?pin-value=931648\"").expect_err("refused");
        assert!(!format!("{error:?}").contains("931648"));
    }

    #[test]
    fn whatever_is_wrong_is_said_with_what_to_do() {
        for (text, words) in [
            ("keep-pair = 3", "keep-pair"),
            ("keep-pairs = 0", "keep-pairs"),
            ("expiration-seconds = 30", "600"),
            ("backend = \"hsm\"", "hsm"),
            ("key-algorithm = \"dsa\"", "ecdsa-p256"),
            ("[backends.x]\ntype = \"paper\"", "paper"),
            ("[backends.x]\ntype = \"pkcs11\"", "uri"),
            ("[backends.x]\ntype = \"tpm\"\nisolation = \"some\"", "isolation is"),
            ("[backends.x]\ntype = \"tpm\"\nisolation = { group = \"tss\" }", "isolation"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.detail.contains(words) && !error.hint.is_empty(), "{text}: {error:?}");
        }
        assert!(check_node_name("Worker_1").is_err() && check_node_name("").is_err());
        assert!(check_node_name("worker-1.example.org").is_ok());
    }
}
