//! pintle as an operator runs it, with a certificate that it finds in its cert-dir.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;

use pintle::keys::ModuleConfiguration;
use pintle_agent_core::policy::KeyPrefix;
use pintle_plugins_api::KeyAlgorithm;
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::authority::{Authority, NODE, Pair};
use crate::exact::{ExactCertificates, fast_provider};
use crate::load::ProxyAddress;
use crate::peers::{Proxy, free_address};
use crate::process::Process;
use crate::server::KeyExchange;

const PIN: &str = "31415926";

/// The agent's credential.
#[derive(Clone)]
pub(crate) enum Identity {
    /// The key is in a file.
    File(Rc<Pair>),
    /// The key is in a token.
    Token(Rc<Token>),
}

/// The directory with the local side's certificates: shared by all proxies, created by the first pintle that runs.
#[derive(Clone)]
pub(crate) struct LocalSide(pub(crate) PathBuf);

impl LocalSide {
    /// Writes the local certificate and its key, without the client certificate that pintle stores with them.
    pub(crate) fn write_pair(&self, path: &Path) {
        let text = std::fs::read_to_string(self.listener()).expect("pintle's local certificates");
        let blocks = pem::parse_many(text).expect("PEM");
        let certificate = blocks.iter().find(|block| block.tag() == "CERTIFICATE").expect("the certificate");
        let key = blocks.iter().find(|block| block.tag().ends_with("PRIVATE KEY")).expect("its key");
        std::fs::write(path, format!("{certificate}{key}")).expect("a file");
    }

    /// The file with the server certificate, client certificate and server key.
    fn listener(&self) -> PathBuf {
        self.0.join("client/listener.pem")
    }

    pub(crate) fn authority(&self) -> PathBuf {
        self.0.join("client/ca.crt")
    }

    /// The TLS configuration of a local client: a full handshake every time, as in client-go.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        let file = |name: &str| self.0.join("client").join(name);
        let provider = Arc::new(fast_provider(KeyExchange::Classic.groups()));
        let server = CertificateDer::from_pem_file(self.listener()).expect("the local certificate");
        let client = CertificateDer::from_pem_file(file("client.crt")).expect("the client's certificate");
        let key = PrivateKeyDer::from_pem_file(file("client.key")).expect("the client's key");
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ExactCertificates::verifier(vec![server], &provider)))
            .with_client_auth_cert(vec![client], key)
            .expect("the client's pair");
        config.resumption = rustls::client::Resumption::disabled();
        Arc::new(config)
    }
}

/// A SoftHSM2 token that contains the node's key.
pub(crate) struct Token {
    directory: PathBuf,
    module: PathBuf,
    identity: Pair,
}

impl Token {
    /// Sets up the token, and generates the key with pintle's own backend; `None` if SoftHSM2 is not installed.
    /// SOFTHSM2_CONF must be set to `directory`/softhsm2.conf.
    pub(crate) fn new(directory: &Path, authority: &Authority) -> Option<Self> {
        let module = ["/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib/aarch64-linux-gnu/softhsm"]
            .iter()
            .map(|directory| Path::new(directory).join("libsofthsm2.so"))
            .find(|path| path.exists())?;
        let tokens = directory.join("tokens");
        std::fs::create_dir(&tokens).expect("a directory");
        let settings = format!("directories.tokendir={}\nlog.level=ERROR\n", tokens.display());
        std::fs::write(directory.join("softhsm2.conf"), settings).expect("softhsm2.conf");
        let status = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", "bench", "--pin", PIN, "--so-pin", PIN])
            .stdout(Stdio::null())
            .status()
            .expect("softhsm2-util starts");
        assert!(status.success(), "softhsm2-util makes a token");
        let pin = directory.join("pin");
        std::fs::write(&pin, PIN).expect("the PIN's file");
        std::fs::set_permissions(&pin, std::fs::Permissions::from_mode(0o400)).expect("its mode");
        let configuration = ModuleConfiguration::Pkcs11 {
            uri: "pkcs11:token=bench".to_owned(),
            module: Some(module.clone()),
            pin_file: Some(pin),
        };
        let mut backend = configuration.open().expect("the token opens");
        let id = KeyPrefix::new(NODE, "client", "5e1f09ac").key_id(1);
        let key = backend.generate(&id, KeyAlgorithm::EcdsaP256).expect("a key");
        Some(Self { directory: directory.to_owned(), module, identity: authority.node_of(key.as_der()) })
    }

    pub(crate) fn identity(&self) -> &Pair {
        &self.identity
    }

    fn table(&self) -> String {
        format!(
            "backend = 'token'\n[backends.token]\ntype = 'pkcs11'\nuri = 'pkcs11:token=bench'\nmodule = '{}'\n\
             pin-file = '{}'\n",
            self.module.display(),
            self.directory.join("pin").display()
        )
    }
}

/// An agent with a proxy; its configuration and certificate are written, but it is not started.
pub(crate) struct Agent {
    name: &'static str,
    directory: PathBuf,
    address: SocketAddr,
    local: LocalSide,
}

impl Agent {
    /// Copies `program`, and writes a configuration and a pair. The API server in its kubeconfig is the common
    /// server.
    pub(crate) fn new(
        name: &'static str,
        program: &Path,
        directory: &Path,
        local: LocalSide,
        (authority, server): (PathBuf, SocketAddr),
        identity: Identity,
    ) -> Self {
        let (pair, table) = match &identity {
            Identity::File(pair) => (pair.published(), String::new()),
            Identity::Token(token) => (token.identity().published(), token.table()),
        };
        let agent = Self { name, directory: directory.join(name.replace(' ', "-")), address: free_address(), local };
        std::fs::create_dir_all(agent.path("pki")).expect("a directory");
        // A copy, so that two agents do not share the program's pages.
        std::fs::copy(program, agent.path("pintle")).expect("a copy of the program");
        std::fs::write(agent.path("pki/kubelet-client-current.pem"), pair).expect("the pair");
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "bench", "cluster": {
                "server": format!("https://{server}"),
                "certificate-authority": authority,
                "tls-server-name": "localhost",
            }}],
            "users": [{ "name": "node", "user": {} }],
            "contexts": [{ "name": "bench", "context": { "cluster": "bench", "user": "node" } }],
            "current-context": "bench",
        });
        std::fs::write(agent.path("kubeconfig"), kubeconfig.to_string()).expect("a kubeconfig");
        let configuration = format!(
            "node-name = '{NODE}'\nkubeconfig = '{}'\ncert-dir = '{}'\nstate-dir = '{}'\n{table}\n\
             [proxy]\nlisten = '{}'\nunix-socket = '{}'\nuser = '{}'\nruntime-dir = '{}'\n",
            agent.path("kubeconfig").display(),
            agent.path("pki").display(),
            agent.path("state").display(),
            agent.address,
            agent.path("proxy.sock").display(),
            rustix::process::getuid().as_raw(),
            agent.local.0.display(),
        );
        std::fs::write(agent.path("config.toml"), configuration).expect("a configuration");
        agent
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Starts the agent, and waits until its proxy uses the certificate.
    pub(crate) fn start(&self) -> Proxy {
        let mut command = Command::new(self.path("pintle"));
        command.args(["run", "--log-format=json", "--config"]).arg(self.path("config.toml"));
        let mut process = Process::start(&mut command, &self.path("log"));
        process.wait_until(self.name, |log| log.contains("proxy_swapped"));
        Proxy {
            name: self.name,
            process,
            tls: Some(ProxyAddress::Tls(self.address, self.local.client())),
            unix: ProxyAddress::Unix(self.path("proxy.sock")),
        }
    }
}
