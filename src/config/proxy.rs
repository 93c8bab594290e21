//! The table `[proxy]` or `[identity.proxy]`: the identity's credential proxy, which runs if the table is there.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::ConfigError;
use crate::world::User;

/// How a proxy for one identity is to run.
#[derive(Clone, Debug, PartialEq)]
pub struct ProxyConfiguration {
    /// Where to listen: an address of loopback.
    pub listen: SocketAddr,
    /// Where to listen for clients of a unix socket, which speak HTTP without TLS.
    pub unix_socket: Option<PathBuf>,
    /// Who may use the identity, besides root.
    pub user: User,
    /// Where the local certificates are; must be on a file system that ends with the boot.
    pub runtime_directory: PathBuf,
    /// How long connections of an earlier certificate may go on.
    pub drain: Duration,
    /// How long an API server may take to accept a connection.
    pub connect_timeout: Duration,
    /// How long a handshake may take, the local one and each one with an API server.
    pub handshake_timeout: Duration,
    /// How long a key may take to sign.
    pub signing_deadline: Duration,
    /// How long a connection may be silent.
    pub idle_timeout: Duration,
    /// How many connections are open at once, at most.
    pub maximum_connections: usize,
    /// How many of them may be within their local handshake.
    pub maximum_handshakes: usize,
}

impl Default for ProxyConfiguration {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 6444)),
            unix_socket: None,
            user: User { uid: 0, gid: 0 },
            runtime_directory: PathBuf::from("/run/pintle/proxy/client"),
            // The watches of a kubelet end by themselves within ten minutes.
            drain: Duration::from_secs(900),
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(10),
            signing_deadline: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(3600),
            maximum_connections: 8192,
            maximum_handshakes: 512,
        }
    }
}

/// The table `[proxy]`, or `[identity.proxy]`, as it stands.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct ProxyTable {
    listen: Option<SocketAddr>,
    unix_socket: Option<PathBuf>,
    user: Option<String>,
    runtime_dir: Option<PathBuf>,
    kubeconfig: Option<PathBuf>,
    #[serde(default)]
    api_servers: Vec<String>,
    drain: Option<String>,
    connect_timeout: Option<String>,
    handshake_timeout: Option<String>,
    signing_deadline: Option<String>,
    idle_timeout: Option<String>,
    maximum_connections: Option<usize>,
    maximum_handshakes: Option<usize>,
}

/// What an identity's credential proxy is to do.
#[derive(Clone, Debug, PartialEq)]
pub struct ProxySettings {
    /// How it runs.
    pub configuration: ProxyConfiguration,
    /// The local client's kubeconfig, which is written so that it points at the proxy.
    pub kubeconfig: Option<PathBuf>,
    /// API servers in order of preference, besides the one that the cluster's kubeconfig names.
    pub api_servers: Vec<http::Uri>,
}

impl ProxyTable {
    /// What the table amounts to for the identity of this name.
    pub(super) fn settings(self, identity: &str) -> Result<ProxySettings, ConfigError> {
        let default = ProxyConfiguration::default();
        let user = self.user.as_deref().unwrap_or("root");
        let user = User::named(user).map_err(|error| {
            ConfigError::new(format!("proxy.user: {error}"), "name the user that the kubelet runs as, or its number")
        })?;
        let listen = self.listen.unwrap_or(default.listen);
        if !listen.ip().is_loopback() {
            return Err(ConfigError::new(
                format!("proxy.listen = {listen}: the proxy listens on loopback only"),
                "listen on an address of loopback, such as 127.0.0.1:6444",
            ));
        }
        let api_servers = self.api_servers.iter().map(|url| api_server(url));
        let runtime = super::absolute(&self.runtime_dir.unwrap_or_else(|| "/run/pintle/proxy".into()))?;
        let positive = |name: &str, value: Option<usize>, default: usize| match value {
            Some(0) => Err(ConfigError::new(format!("proxy.{name} = 0 lets nobody in"), "allow at least 1")),
            value => Ok(value.unwrap_or(default)),
        };
        Ok(ProxySettings {
            configuration: ProxyConfiguration {
                listen,
                unix_socket: self.unix_socket.as_deref().map(super::absolute).transpose()?,
                user,
                runtime_directory: runtime.join(identity),
                drain: duration("drain", self.drain, default.drain)?,
                connect_timeout: duration("connect-timeout", self.connect_timeout, default.connect_timeout)?,
                handshake_timeout: duration("handshake-timeout", self.handshake_timeout, default.handshake_timeout)?,
                signing_deadline: duration("signing-deadline", self.signing_deadline, default.signing_deadline)?,
                idle_timeout: duration("idle-timeout", self.idle_timeout, default.idle_timeout)?,
                maximum_connections: positive(
                    "maximum-connections",
                    self.maximum_connections,
                    default.maximum_connections,
                )?,
                maximum_handshakes: positive(
                    "maximum-handshakes",
                    self.maximum_handshakes,
                    default.maximum_handshakes,
                )?,
            },
            kubeconfig: self.kubeconfig.as_deref().map(super::absolute).transpose()?,
            api_servers: api_servers.collect::<Result<_, _>>()?,
        })
    }
}

/// The longest duration: sums of a few of these and a point in time must not overflow.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// An API server's URL, with nothing but a host and a port in it.
fn api_server(url: &str) -> Result<http::Uri, ConfigError> {
    let refused = |what: &str| {
        ConfigError::new(format!("proxy.api-servers: {what}"), "name each API server as https://HOST:PORT")
    };
    // Not to be repeated: a password may be in it.
    if url.contains('@') {
        return Err(refused("a URL has a user name in it, which nothing is done with"));
    }
    let uri = url.parse::<http::Uri>().ok().filter(|uri| uri.scheme_str() == Some("https"));
    let (Some(uri), false) = (uri, url.contains('#')) else {
        return Err(refused(&format!("{url:?} is not the https:// URL of a server")));
    };
    let authority = uri.authority().map(http::uri::Authority::as_str).unwrap_or_default();
    let port = authority.strip_prefix(uri.host().unwrap_or_default()).unwrap_or_default();
    let is_port =
        |port: &str| port.strip_prefix(':').and_then(|port| port.parse::<u16>().ok()).is_some_and(|port| port > 0);
    if authority.is_empty() || !(port.is_empty() || is_port(port)) {
        return Err(refused(&format!("{url:?} has no port from 1 to 65535")));
    }
    if uri.path() != "/" || uri.query().is_some() {
        return Err(refused(&format!("{url:?} has a path or a query, which nothing is done with")));
    }
    Ok(uri)
}

/// A duration such as "90s", "15m" or "1h 30m".
fn duration(name: &str, text: Option<String>, default: Duration) -> Result<Duration, ConfigError> {
    let Some(text) = text else { return Ok(default) };
    let parsed = text.parse::<jiff::SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    let problem = match parsed {
        Some(duration) if duration > LONGEST => "longer than a year",
        Some(duration) if duration >= Duration::from_millis(100) => return Ok(duration),
        _ => "no duration",
    };
    let hint = "write it as \"10s\", \"15m\" or \"1h\"";
    Err(ConfigError::new(format!("proxy.{name} = {text:?} is {problem}"), hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ProxySettings, ConfigError> {
        toml::from_str::<ProxyTable>(text).expect("a table").settings("client")
    }

    #[test]
    fn an_empty_table_is_the_kubelets() {
        let settings = parse("").expect("valid");
        assert_eq!(settings.configuration, ProxyConfiguration::default());
    }

    #[test]
    fn whatever_is_wrong_is_said() {
        let settings = parse("drain = \"1h 30m\"\napi-servers = [\"https://10.0.0.1:6443\"]").expect("valid");
        assert_eq!(settings.configuration.drain, Duration::from_secs(5400));
        for (text, words) in [
            ("listen = \"0.0.0.0:6444\"", "0.0.0.0"),
            ("drain = \"soon\"", "drain"),
            ("drain = \"-1s\"", "drain"),
            ("idle-timeout = \"9000000000000000000s\"", "longer than a year"),
            ("handshake-timeout = \"8761h\"", "longer than a year"),
            ("user = \"no-such-user\"", "no-such-user"),
            ("api-servers = [\"10.0.0.1\"]", "10.0.0.1"),
            ("api-servers = [\"https://u:s3cret@h:1\"]", "user name"),
            ("api-servers = [\"https://h:1/x\"]", "path"),
            ("api-servers = [\"https://h:1?y\"]", "query"),
            ("api-servers = [\"https://h:1#z\"]", "server"),
            ("api-servers = [\"https://h:99999\"]", "port"),
            ("api-servers = [\"https://h:0\"]", "port"),
            ("runtime-dir = \"\"", "not a path"),
            ("unix-socket = \"\"", "not a path"),
            ("maximum-connections = 0", "maximum-connections"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.detail.contains(words) && !error.hint.is_empty(), "{text}: {error:?}");
            assert!(!error.detail.contains("s3cret"), "{error:?}");
        }
        let settings = parse("runtime-dir = \"run\"\nunix-socket = \"proxy.sock\"").expect("valid").configuration;
        assert!(
            settings.runtime_directory.is_absolute() && settings.unix_socket.is_some_and(|path| path.is_absolute())
        );
        parse("api-servers = [\"https://[::1]:6443/\", \"https://h\"]").expect("valid");
    }
}
