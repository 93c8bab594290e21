//! The HTTP or SOCKS proxy on the way to an API server, chosen as Go's `net/http` and client-go choose it.
//!
//! A kubeconfig's proxy-url comes first, and NO_PROXY does not apply to it. Otherwise `HTTPS_PROXY` and `NO_PROXY`, or their
//! lower-case forms, are read as golang.org/x/net/http/httpproxy reads them: an entry without a scheme is `http://`,
//! loopback addresses are never proxied, and a URL that cannot be parsed stands for no proxy.

use std::fmt;
use std::net::IpAddr;
use std::sync::LazyLock;

use super::credential_error::address;

/// A proxy, and where it was named.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Its URL, always with a port. It may hold a password.
    pub url: http::Uri,
    /// The variable that names it, or proxy-url.
    pub source: &'static str,
}

/// Without its password.
impl fmt::Display for Proxy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the proxy {} from {}", address(&self.url), self.source)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Proxy({self})")
    }
}

/// How a kubeconfig names its own proxy.
const PROXY_URL: &str = "proxy-url";

impl Proxy {
    /// The proxy of this URL.
    pub fn new(url: &http::Uri, source: &'static str) -> Self {
        let port = url.port_u16().or_else(|| default_port(url.scheme_str()?));
        let with_port = || {
            let authority = format!("{}:{}", url.authority()?.as_str().trim_end_matches(':'), port?);
            let mut parts = url.clone().into_parts();
            parts.authority = Some(authority.parse().ok()?);
            parts.path_and_query.get_or_insert(http::uri::PathAndQuery::from_static("/"));
            http::Uri::from_parts(parts).ok()
        };
        let url = if url.port_u16().is_some() { url.clone() } else { with_port().unwrap_or_else(|| url.clone()) };
        Self { url, source }
    }

    /// The proxy that a kubeconfig names.
    ///
    /// # Errors
    /// If it is not a URL with a scheme and a host.
    pub(super) fn of_kubeconfig(proxy_url: &str) -> Result<Self, String> {
        let url = proxy_url.parse::<http::Uri>().ok().filter(|url| url.scheme().is_some() && url.host().is_some());
        url.map(|url| Self::new(&url, PROXY_URL)).ok_or_else(|| {
            "its proxy-url is not a URL with a scheme and a host, such as http://proxy.example:3128".to_owned()
        })
    }

    /// Whether it is the cluster's own, to which NO_PROXY does not apply.
    pub(super) fn is_of_kubeconfig(&self) -> bool {
        self.source == PROXY_URL
    }

    /// The proxy that this process's environment names for this server.
    pub(super) fn of_environment(server: &http::Uri) -> Option<Self> {
        static VARIABLES: LazyLock<Variables> = LazyLock::new(|| Variables::read(|name| std::env::var(name).ok()));
        VARIABLES.proxy_for(server)
    }

    /// The proxy that an environment with these variables names for this server.
    pub fn of_variables(variable: impl Fn(&str) -> Option<String>, server: &http::Uri) -> Option<Self> {
        Variables::read(variable).proxy_for(server)
    }

    /// The user and password in its URL, decoded, as `user:password`.
    pub fn user_info(&self) -> Option<Vec<u8>> {
        let (user_info, _) = self.url.authority()?.as_str().rsplit_once('@')?;
        Some(percent_encoding::percent_decode_str(user_info).collect())
    }

    /// The value of Proxy-Authorization (RFC 7617), if its URL holds a user.
    pub fn authorization(&self) -> Option<http::HeaderValue> {
        use base64::Engine;
        let encoded = base64::engine::general_purpose::STANDARD.encode(self.user_info()?);
        let mut value = http::HeaderValue::from_str(&format!("Basic {encoded}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        "socks5" | "socks5h" => Some(1080),
        _ => None,
    }
}

/// The environment's variables, the upper-case form of each first.
#[derive(Default)]
struct Variables {
    http: Option<Proxy>,
    https: Option<Proxy>,
    exceptions: Exceptions,
}

impl Variables {
    fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let any = |names: [&'static str; 2]| {
            names.into_iter().find_map(|name| Some((variable(name).filter(|value| !value.is_empty())?, name)))
        };
        let proxy = |names| {
            let (value, name): (String, _) = any(names)?;
            let is_proxy = |url: &http::Uri| url.scheme().is_some() && url.host().is_some_and(|host| !host.is_empty());
            let url = value.parse().ok().filter(is_proxy);
            let url = url.or_else(|| format!("http://{value}").parse().ok().filter(is_proxy))?;
            Some(Proxy::new(&url, name))
        };
        Self {
            http: proxy(["HTTP_PROXY", "http_proxy"]),
            https: proxy(["HTTPS_PROXY", "https_proxy"]),
            exceptions: any(["NO_PROXY", "no_proxy"]).map(|(list, _)| Exceptions::parse(&list)).unwrap_or_default(),
        }
    }

    fn proxy_for(&self, server: &http::Uri) -> Option<Proxy> {
        let proxy = match server.scheme_str()? {
            "https" => self.https.as_ref(),
            "http" => self.http.as_ref(),
            _ => None,
        }?;
        let port = server.port_u16().or_else(|| default_port(server.scheme_str()?))?;
        let host = server.host()?.trim_start_matches('[').trim_end_matches(']');
        (!self.exceptions.contain(host, port)).then(|| proxy.clone())
    }
}

/// NO_PROXY: what is reached without a proxy.
#[derive(Default)]
struct Exceptions(Vec<Exception>);

enum Exception {
    All,
    Network(IpAddr, u8),
    Address(IpAddr, Port),
    /// With the dot in front; the domain itself too, if it was written without.
    Domain {
        suffix: String,
        itself: bool,
        port: Port,
    },
}

/// A port as it was written: an entry whose port is not a number matches none.
struct Port(String);

impl Port {
    fn matches(&self, port: u16) -> bool {
        self.0.is_empty() || self.0 == port.to_string()
    }
}

impl Exceptions {
    fn parse(list: &str) -> Self {
        Self(list.split(',').map(str::trim).filter_map(|entry| Exception::parse(&entry.to_lowercase())).collect())
    }

    fn contain(&self, host: &str, port: u16) -> bool {
        let address = host.parse::<IpAddr>().ok().map(|address| address.to_canonical());
        if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
            return true;
        }
        let host = host.trim().to_lowercase();
        self.0.iter().any(|exception| exception.matches(&host, port, address))
    }
}

impl Exception {
    fn parse(entry: &str) -> Option<Self> {
        match entry {
            "" => return None,
            "*" => return Some(Self::All),
            _ => {}
        }
        if let Some((network, length)) = entry.split_once('/')
            && let (Ok(network), Ok(length)) = (network.parse::<IpAddr>(), length.parse::<u8>())
            && length <= if network.is_ipv4() { 32 } else { 128 }
        {
            return Some(match (network, network.to_canonical()) {
                (IpAddr::V6(_), mapped @ IpAddr::V4(_)) if length >= 96 => Self::Network(mapped, length - 96),
                (network, _) => Self::Network(network, length),
            });
        }
        let (host, port) = split_host_and_port(entry).unwrap_or((entry, ""));
        if host.is_empty() {
            return None;
        }
        let port = Port(port.to_owned());
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(Self::Address(address.to_canonical(), port));
        }
        let host = if host.starts_with("*.") { &host[1..] } else { host };
        let itself = !host.starts_with('.');
        let suffix = if itself { format!(".{host}") } else { host.to_owned() };
        Some(Self::Domain { suffix, itself, port })
    }

    fn matches(&self, host: &str, port: u16, address: Option<IpAddr>) -> bool {
        match self {
            Self::All => true,
            Self::Network(network, length) => address.is_some_and(|address| is_in(address, *network, *length)),
            Self::Address(wanted, wanted_port) => address == Some(*wanted) && wanted_port.matches(port),
            Self::Domain { suffix, itself, port: wanted_port } => {
                address.is_none()
                    && (host.ends_with(suffix) || (*itself && host == &suffix[1..]))
                    && wanted_port.matches(port)
            }
        }
    }
}

fn is_in(address: IpAddr, network: IpAddr, length: u8) -> bool {
    let shared = |one: u128, other: u128, bits: u32| {
        one.checked_shr(bits - u32::from(length)).unwrap_or(0)
            == other.checked_shr(bits - u32::from(length)).unwrap_or(0)
    };
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            shared(u128::from(address.to_bits()), u128::from(network.to_bits()), 32)
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => shared(address.to_bits(), network.to_bits(), 128),
        _ => false,
    }
}

/// As Go's `net.SplitHostPort`: `None` where there is no port, or too many colons.
fn split_host_and_port(text: &str) -> Option<(&str, &str)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(host) => host.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    (!host.contains(['[', ']']) && !port.contains(['[', ']'])).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(variables: &[(&str, &str)], server: &str) -> Option<String> {
        let value =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Proxy::of_variables(value, &server.parse().expect("a URL")).map(|proxy| proxy.to_string())
    }

    #[test]
    fn c37_variables_are_read_as_go_reads_them() {
        let server = "https://api.example:6443";
        for (variables, proxy) in [
            (&[("HTTPS_PROXY", "http://p:1")][..], Some("the proxy http://p:1 from HTTPS_PROXY")),
            (&[("https_proxy", "http://p")], Some("the proxy http://p:80 from https_proxy")),
            (
                &[("HTTPS_PROXY", "http://p:1"), ("https_proxy", "http://q:1")],
                Some("the proxy http://p:1 from HTTPS_PROXY"),
            ),
            (&[("HTTPS_PROXY", ""), ("https_proxy", "q:1")], Some("the proxy http://q:1 from https_proxy")),
            (&[("HTTPS_PROXY", "p")], Some("the proxy http://p:80 from HTTPS_PROXY")),
            (&[("HTTPS_PROXY", "10.0.0.1:3128")], Some("the proxy http://10.0.0.1:3128 from HTTPS_PROXY")),
            (&[("HTTPS_PROXY", "http://p:1/")], Some("the proxy http://p:1 from HTTPS_PROXY")),
            (&[("HTTPS_PROXY", "http://u:hunter2@p:1")], Some("the proxy http://p:1 from HTTPS_PROXY")),
            (&[("HTTPS_PROXY", "socks5://p")], Some("the proxy socks5://p:1080 from HTTPS_PROXY")),
            (&[("HTTPS_PROXY", "https://p")], Some("the proxy https://p:443 from HTTPS_PROXY")),
            (&[("HTTPS_PROXY", " http://p:1")], None),
            (&[("HTTP_PROXY", "http://p:1")], None),
            (&[("ALL_PROXY", "http://p:1")], None),
            (&[], None),
        ] {
            assert_eq!(chosen(variables, server).as_deref(), proxy, "{variables:?}");
        }
        assert_eq!(
            chosen(&[("http_proxy", "p"), ("HTTPS_PROXY", "q")], "http://api.example").as_deref(),
            Some("the proxy http://p:80 from http_proxy")
        );
    }

    #[test]
    fn a_password_is_decoded_for_the_proxy_and_shown_to_nobody() {
        let proxy = Proxy::of_kubeconfig("http://user:hunter%402@p:3128").expect("a URL");
        assert_eq!(proxy.user_info().as_deref(), Some(&b"user:hunter@2"[..]));
        assert_eq!(proxy.authorization().expect("a header"), "Basic dXNlcjpodW50ZXJAMg==");
        assert_eq!(format!("{proxy:?}"), "Proxy(the proxy http://p:3128 from proxy-url)");
        assert!(Proxy::of_kubeconfig("hunter2").is_err_and(|words| !words.contains("hunter2")));
    }

    #[test]
    fn a_port_that_is_left_out_is_the_schemes() {
        let url = |text: &str| Proxy::new(&text.parse().expect("a URL"), PROXY_URL).url.to_string();
        assert_eq!(url("socks5://user:word@[::1]"), "socks5://user:word@[::1]:1080/");
        assert_eq!(url("http://p:1/x"), "http://p:1/x");
    }
}
