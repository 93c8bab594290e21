//! The flags that override the configuration file.

use std::net::SocketAddr;
use std::path::PathBuf;

use pintle_plugins_api::KeyAlgorithm;

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
    /// Whether to rotate the certificate before it expires [default: true]
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

impl Flags {
    /// The flags given that are about one identity rather than about the node, by name.
    pub(super) fn of_one_identity(&self) -> Vec<&'static str> {
        let given = [
            ("--cert-dir", self.cert_dir.is_some()),
            ("--rotate-certificates", self.rotate_certificates.is_some()),
            ("--backend", self.backend.is_some()),
            ("--key-algorithm", self.key_algorithm.is_some()),
            ("--client-ca-file", self.client_ca_file.is_some()),
            ("--expiration-seconds", self.expiration_seconds.is_some()),
            ("--keep-pairs", self.keep_pairs.is_some()),
        ];
        given.into_iter().filter_map(|(name, given)| given.then_some(name)).collect()
    }
}
