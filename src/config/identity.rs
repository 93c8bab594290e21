//! One identity of a node: its table `[[identity]]`, and what that amounts to.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pintle_agent_core::policy::KeyPrefix;
use pintle_agent_core::{Policy, Template};
use pintle_plugins_api::KeyAlgorithm;
use serde::Deserialize;

use super::proxy::{ProxySettings, ProxyTable};
use super::settings::{identity_settings, with_settings};
use super::{ConfigError, FILE_BACKEND, Flags, NodeConfig, absolute};
use crate::store::{PairDirectory, shared};
use crate::world::SystemFiles;

/// The identity of a node whose configuration has no table `[[identity]]`. Its journal and keys are named as they were
/// before there were several identities.
pub const DEFAULT_IDENTITY: &str = "client";

/// The longest name of an identity, in bytes: it is part of key ids and of file names.
const LONGEST_NAME: usize = 30;
/// Names of files in the state directory that no journal may take.
const RESERVED_NAMES: [&str; 2] = ["migration", "refused-pins"];

/// What an identity is for: it decides the signer, the subject and the names of the pair's files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdentityKind {
    /// `kubernetes.io/kube-apiserver-client-kubelet`: the node as a client of the API server.
    #[default]
    KubeletClient,
}

/// What to do when the backend has lost the key in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum OnKeyLoss {
    /// Wait for a person.
    #[default]
    Wait,
    /// Enrol again with the bootstrap credential, with a new key in the same backend.
    Enrol,
}

impl IdentityKind {
    /// Its word in the configuration.
    pub fn word(self) -> &'static str {
        match self {
            Self::KubeletClient => "kubelet-client",
        }
    }

    fn parse(word: &str) -> Result<Self, ConfigError> {
        match word {
            "kubelet-client" => Ok(Self::KubeletClient),
            "kubelet-serving" => Err(ConfigError::new(
                "kind = \"kubelet-serving\" is not supported yet",
                "leave the table out; the kubelet itself asks for its serving certificate with serverTLSBootstrap: true",
            )),
            _ => Err(ConfigError::new(
                format!("kind = {word:?} is not a kind of identity"),
                "the only kind so far is \"kubelet-client\"",
            )),
        }
    }
}

identity_settings! { with_settings!
    /// The table `[[identity]]` as it stands. Without one, the same settings at the top level describe the only identity.
    #[derive(Clone, Debug, Default, Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    pub(super) struct IdentityTable {
        pub(super) name: String,
        pub(super) kind: Option<String>,
        pub(super) signer_name: Option<String>,
        pub(super) kubeconfig: Option<PathBuf>,
        pub(super) bootstrap_kubeconfig: Option<PathBuf>,
    }
}

/// What the agent is to do about one identity.
#[derive(Clone, Debug, PartialEq)]
pub struct IdentityConfig {
    /// What it shares with the node's other identities.
    pub node: Arc<NodeConfig>,
    /// Its name on this node: that of its journal, part of its key ids, a field of events and a label of metrics.
    pub name: String,
    /// What it is for.
    pub kind: IdentityKind,
    /// The kubeconfig that says where the API server is.
    pub kubeconfig: PathBuf,
    /// Whether the kubeconfig is this identity's own, to be written if it does not exist. Of several identities that take
    /// the node's kubeconfig, it is the first one's.
    pub owns_kubeconfig: bool,
    /// The kubeconfig with the credential for the first certificate.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// The directory of the pairs.
    pub cert_dir: PathBuf,
    /// Whether to rotate before the certificate expires.
    pub rotate_certificates: bool,
    /// Certificates of the authority that must have signed what is issued.
    pub client_ca_file: Option<PathBuf>,
    /// How many pairs to keep.
    pub keep_pairs: usize,
    /// The backend in which new keys are made.
    pub backend: String,
    /// The backend in which they are made unless `pintle migrate` has moved the identity.
    pub configured_backend: String,
    /// The algorithm of new keys.
    pub key_algorithm: KeyAlgorithm,
    /// The life to ask for, in seconds.
    pub expiration_seconds: Option<i32>,
    /// Whether to enrol again when the backend has lost the key in use, without waiting for a person.
    pub enrol_after_key_loss: bool,
    /// The credential proxy, if there is to be one.
    pub proxy: Option<ProxySettings>,
}

/// The kubeconfigs of identities whose table names none.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeKubeconfigs {
    pub(super) kubeconfig: Option<PathBuf>,
    pub(super) bootstrap_kubeconfig: Option<PathBuf>,
}

impl IdentityTable {
    /// Lets the flags override it.
    pub(super) fn apply(&mut self, flags: &Flags) {
        fn set<T: Clone>(value: &mut Option<T>, flag: &Option<T>) {
            if flag.is_some() {
                value.clone_from(flag);
            }
        }
        set(&mut self.kubeconfig, &flags.kubeconfig);
        set(&mut self.bootstrap_kubeconfig, &flags.bootstrap_kubeconfig);
        set(&mut self.cert_dir, &flags.cert_dir);
        set(&mut self.rotate_certificates, &flags.rotate_certificates);
        set(&mut self.backend, &flags.backend);
        set(&mut self.key_algorithm, &flags.key_algorithm);
        set(&mut self.client_ca_file, &flags.client_ca_file);
        set(&mut self.expiration_seconds, &flags.expiration_seconds);
        set(&mut self.keep_pairs, &flags.keep_pairs);
    }

    /// What the table amounts to on this node. Where it names no kubeconfig, the node's is the identity's own if
    /// `inherits_kubeconfig`.
    pub(super) fn resolve(
        self,
        node: &Arc<NodeConfig>,
        shared: &NodeKubeconfigs,
        inherits_kubeconfig: bool,
    ) -> Result<IdentityConfig, ConfigError> {
        check_name(&self.name)?;
        if self.signer_name.is_some() {
            return Err(ConfigError::new(
                "signer-name is not supported yet: the signer follows from the kind",
                "leave signer-name out, and set kind = \"kubelet-client\"",
            ));
        }
        let backend = self.backend.unwrap_or_else(|| FILE_BACKEND.to_owned());
        if !node.backends.contains_key(&backend) {
            let known: Vec<_> = node.backends.keys().map(String::as_str).collect();
            return Err(ConfigError::new(
                format!("backend = {backend:?} is not a configured backend; there are: {}", known.join(", ")),
                format!("add a table [backends.{backend}] to the configuration file"),
            ));
        }
        if let Some(seconds) = self.expiration_seconds.filter(|seconds| *seconds < 600) {
            return Err(ConfigError::new(
                format!("expiration-seconds = {seconds}: the API server refuses less than 600"),
                "ask for at least 600, or leave it out to take what the signer gives",
            ));
        }
        let keep_pairs = self.keep_pairs.unwrap_or(2);
        if keep_pairs == 0 {
            return Err(ConfigError::new("keep-pairs = 0 would remove the pair in use", "keep at least 1"));
        }
        let owns_kubeconfig = self.kubeconfig.is_some() || inherits_kubeconfig;
        let kubeconfig = self.kubeconfig.or_else(|| shared.kubeconfig.clone());
        let bootstrap_kubeconfig = self.bootstrap_kubeconfig.or_else(|| shared.bootstrap_kubeconfig.clone());
        let optional = |path: Option<PathBuf>| path.as_deref().map(absolute).transpose();
        let config = IdentityConfig {
            kind: self.kind.as_deref().map(IdentityKind::parse).transpose()?.unwrap_or_default(),
            kubeconfig: absolute(&kubeconfig.unwrap_or_else(|| "/var/lib/kubelet/kubeconfig".into()))?,
            owns_kubeconfig,
            bootstrap_kubeconfig: optional(bootstrap_kubeconfig)?,
            cert_dir: absolute(&self.cert_dir.unwrap_or_else(|| "/var/lib/kubelet/pki".into()))?,
            rotate_certificates: self.rotate_certificates.unwrap_or(true),
            client_ca_file: optional(self.client_ca_file)?,
            keep_pairs,
            configured_backend: backend.clone(),
            backend,
            key_algorithm: self.key_algorithm.unwrap_or_default(),
            expiration_seconds: self.expiration_seconds,
            enrol_after_key_loss: self.on_key_loss.unwrap_or_default() == OnKeyLoss::Enrol,
            proxy: self.proxy.map(|proxy| proxy.settings(&self.name)).transpose()?,
            node: Arc::clone(node),
            name: self.name,
        };
        let local = config.proxy.as_ref().and_then(|proxy| proxy.kubeconfig.as_ref());
        if local.is_some_and(|local| shared::is_same(&SystemFiles, local, &config.kubeconfig)) {
            return Err(ConfigError::new(
                "proxy.kubeconfig and kubeconfig are one file: the first points at the proxy, the second at the API server",
                "give the second another name, such as /var/lib/pintle/kubeconfig, with the cluster's entry",
            ));
        }
        Ok(config)
    }
}

impl IdentityConfig {
    /// What certificate is asked for.
    pub fn template(&self) -> Template {
        match self.kind {
            IdentityKind::KubeletClient => {
                Template { expiration_seconds: self.expiration_seconds, ..Template::kubelet_client(&self.node.name) }
            }
        }
    }

    /// When and how it is rotated, by the installation whose journal names itself so.
    pub fn policy(&self, installation: &str) -> Policy {
        Policy {
            identity: self.template().common_name,
            key_prefix: KeyPrefix::new(&self.node.name, &self.name, installation),
            backend: self.backend.clone(),
            algorithm: self.key_algorithm,
            template: Some(self.template()),
            rotate: self.rotate_certificates,
            enrol_after_key_loss: self.enrol_after_key_loss,
            back_off_base: Policy::BACK_OFF_BASE,
            back_off_cap: Policy::BACK_OFF_CAP,
        }
    }

    /// Where its pairs are, and what they are called.
    pub fn pairs(&self) -> PairDirectory {
        PairDirectory::new(self.cert_dir.clone(), self.pair_prefix())
    }

    /// What the names of its pairs begin with.
    pub fn pair_prefix(&self) -> &'static str {
        match self.kind {
            IdentityKind::KubeletClient => "kubelet-client",
        }
    }

    /// Where its journal is.
    pub fn journal(&self) -> PathBuf {
        self.node.state_dir.join(format!("{}.json", self.name))
    }

    /// Where the cluster of the bootstrap kubeconfig is kept until the kubeconfig is written: the bootstrap kubeconfig may
    /// be deleted before that (case C23).
    pub fn cluster_kubeconfig(&self) -> PathBuf {
        self.own_file("cluster.kubeconfig")
    }

    /// Where the last migration is recorded.
    pub(crate) fn migration(&self) -> PathBuf {
        self.own_file("migration.json")
    }

    /// A file of this identity in the state directory. Those of the default identity have no name in front, as before there
    /// were several.
    fn own_file(&self, name: &str) -> PathBuf {
        let state_dir = &self.node.state_dir;
        if self.name == DEFAULT_IDENTITY {
            state_dir.join(name)
        } else {
            state_dir.join(format!("{}.{name}", self.name))
        }
    }
}

fn check_name(name: &str) -> Result<(), ConfigError> {
    let allowed = |character: char| matches!(character, 'a'..='z' | '0'..='9' | '-');
    if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(allowed) {
        return Err(ConfigError::new(
            format!("{name:?} is not the name of an identity: 1 to {LONGEST_NAME} lower-case letters, digits and '-'"),
            "name it for what uses it, such as \"kubelet\"",
        ));
    }
    if RESERVED_NAMES.contains(&name) {
        return Err(ConfigError::new(
            format!("the name {name:?} is taken: {name}.json in the state directory is not a journal"),
            "choose another name",
        ));
    }
    Ok(())
}

/// Checks that no two identities use the same name, files or addresses.
pub(super) fn check_distinct(identities: &[IdentityConfig]) -> Result<(), ConfigError> {
    for (index, one) in identities.iter().enumerate() {
        for other in &identities[..index] {
            let clash = |what: &str, value: &dyn std::fmt::Display, hint: &str| {
                let detail = format!("identities {:?} and {:?} have the same {what}, {value}", other.name, one.name);
                Err(ConfigError::new(detail, hint))
            };
            if one.name == other.name {
                return Err(ConfigError::new(
                    format!("two identities are named {:?}", one.name),
                    "give each [[identity]] a name of its own",
                ));
            }
            if one.pair_prefix() == other.pair_prefix() && shared::is_same(&SystemFiles, &one.cert_dir, &other.cert_dir)
            {
                return clash("cert-dir", &one.cert_dir.display(), "give each identity a cert-dir of its own");
            }
            let owned = one.owns_kubeconfig && other.owns_kubeconfig;
            if owned && shared::is_same(&SystemFiles, &one.kubeconfig, &other.kubeconfig) {
                return clash("kubeconfig", &one.kubeconfig.display(), "give each identity a kubeconfig of its own");
            }
            let (Some(one_proxy), Some(other_proxy)) = (&one.proxy, &other.proxy) else { continue };
            let (one_proxy, other_proxy) = (&one_proxy.configuration, &other_proxy.configuration);
            if one_proxy.listen == other_proxy.listen && one_proxy.listen.port() != 0 {
                return clash("proxy.listen", &one_proxy.listen, "give each proxy a port of its own");
            }
            if let Some(socket) = &one_proxy.unix_socket
                && one_proxy.unix_socket == other_proxy.unix_socket
            {
                return clash("proxy.unix-socket", &socket.display(), "give each proxy a socket of its own");
            }
        }
    }
    check_local_kubeconfigs(identities)
}

/// A kubeconfig that points at a proxy is nobody else's: not another proxy's, nor one that says where the API server is.
fn check_local_kubeconfigs(identities: &[IdentityConfig]) -> Result<(), ConfigError> {
    let local = |identity: &IdentityConfig| identity.proxy.as_ref()?.kubeconfig.clone();
    for (index, one) in identities.iter().enumerate() {
        let Some(path) = local(one) else { continue };
        for (other_index, other) in identities.iter().enumerate().filter(|(other, _)| *other != index) {
            let taken = |other: &Path| shared::is_same(&SystemFiles, &path, other);
            let both_local = other_index < index && local(other).is_some_and(|other| taken(&other));
            if both_local || taken(&other.kubeconfig) {
                return Err(ConfigError::new(
                    format!("proxy.kubeconfig of identity {:?} is also a kubeconfig of {:?}", one.name, other.name),
                    "give each its own file",
                ));
            }
        }
    }
    Ok(())
}
