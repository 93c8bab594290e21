//! TLS with the local client, which must present exactly one certificate.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{CertificateError, Error, ServerConfig};

use super::local_authority::LocalAuthority;
use crate::tls::{ClientCertificates, Verifier};

/// The number of application protocols with a cached configuration.
const CACHED_PROTOCOLS: usize = 8;

/// An application protocol, and the configuration that negotiates it.
type ConfigForProtocol = (Option<Vec<u8>>, Arc<ServerConfig>);

/// The listener's TLS configurations, one per application protocol that API servers have negotiated.
pub(super) struct LocalTls {
    base: ServerConfig,
    by_protocol: Mutex<Vec<ConfigForProtocol>>,
}

impl LocalTls {
    pub(super) fn new(authority: LocalAuthority) -> io::Result<Self> {
        let provider = Arc::new(provider());
        let verifier = Verifier::new(OnlyClient(authority.client_certificate), &provider);
        let mut base = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(vec![authority.server_certificate], authority.server_key)
            .map_err(io::Error::other)?;
        // Resuming a local session is safe: it proves only that the client is the same client, and does not affect
        // the connection to the API server. The ticket keys never leave this process.
        base.ticketer = aws_lc_rs::Ticketer::new().map_err(io::Error::other)?;
        base.send_tls13_tickets = 1;
        base.ignore_client_order = true;
        Ok(Self { base, by_protocol: Mutex::default() })
    }

    /// The configuration that negotiates this protocol and no other.
    pub(super) fn for_protocol(&self, protocol: Option<&[u8]>) -> Arc<ServerConfig> {
        let mut known = self.by_protocol.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, config)) = known.iter().find(|(known, _)| known.as_deref() == protocol) {
            return Arc::clone(config);
        }
        let mut config = self.base.clone();
        config.alpn_protocols = protocol.iter().map(|protocol| protocol.to_vec()).collect();
        let config = Arc::new(config);
        if known.len() < CACHED_PROTOCOLS {
            known.push((protocol.map(<[u8]>::to_vec), Arc::clone(&config)));
        }
        config
    }
}

/// Algorithms for the local side. Its traffic never leaves the machine, so they are chosen for speed; the connection
/// to the API server uses the defaults.
fn provider() -> CryptoProvider {
    use aws_lc_rs::{cipher_suite, kx_group};
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![kx_group::X25519, kx_group::SECP256R1, kx_group::X25519MLKEM768];
    let fast = cipher_suite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != fast.suite());
    provider
}

/// Accepts only the client that holds the key of one certificate. The certificate is compared byte by byte instead of
/// verified as a chain, so no other certificate of the same authority, and none of another boot, is accepted.
#[derive(Debug)]
struct OnlyClient(CertificateDer<'static>);

// No hint: clients would have to parse it, and have only one certificate to choose from anyway.
impl ClientCertificates for OnlyClient {
    fn check(&self, end_entity: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime) -> Result<(), Error> {
        if *end_entity == self.0 { Ok(()) } else { Err(CertificateError::UnknownIssuer.into()) }
    }
}
