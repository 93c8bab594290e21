//! TLS with the local client: exactly one certificate is let in.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{CertificateError, Error, ServerConfig};

use super::local_authority::LocalAuthority;
use crate::tls::{ClientCertificates, Verifier};

/// How many application protocols are remembered.
const REMEMBERED: usize = 8;

/// An application protocol, and the configuration that settles on it.
type ForProtocol = (Option<Vec<u8>>, Arc<ServerConfig>);

/// The listener's TLS, for each application protocol that an API server has settled on.
pub(super) struct LocalTls {
    base: ServerConfig,
    by_protocol: Mutex<Vec<ForProtocol>>,
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
        // A local session may be resumed: it only says that the client is the client, and says nothing to the API
        // server. The keys of the tickets are this process's own.
        base.ticketer = aws_lc_rs::Ticketer::new().map_err(io::Error::other)?;
        base.send_tls13_tickets = 1;
        base.ignore_client_order = true;
        Ok(Self { base, by_protocol: Mutex::default() })
    }

    /// The configuration that settles on this protocol.
    pub(super) fn settling_on(&self, protocol: Option<&[u8]>) -> Arc<ServerConfig> {
        let mut known = self.by_protocol.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, config)) = known.iter().find(|(known, _)| known.as_deref() == protocol) {
            return Arc::clone(config);
        }
        let mut config = self.base.clone();
        config.alpn_protocols = protocol.iter().map(|protocol| protocol.to_vec()).collect();
        let config = Arc::new(config);
        if known.len() < REMEMBERED {
            known.push((protocol.map(<[u8]>::to_vec), Arc::clone(&config)));
        }
        config
    }
}

/// What the local side needs: nothing leaves the machine, so it is what takes the least time. The key exchange with the
/// API server is another matter.
fn provider() -> CryptoProvider {
    use aws_lc_rs::{cipher_suite, kx_group};
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![kx_group::X25519, kx_group::SECP256R1, kx_group::X25519MLKEM768];
    let fast = cipher_suite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != fast.suite());
    provider
}

/// Lets in who holds the key of one certificate: it is compared byte by byte, so no chain is built, nothing that the
/// authority might have signed otherwise counts, and the one of another boot is unknown.
#[derive(Debug)]
struct OnlyClient(CertificateDer<'static>);

// It tells clients of no authority: they would have to parse that, and there is only one certificate to choose.
impl ClientCertificates for OnlyClient {
    fn check(&self, end_entity: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime) -> Result<(), Error> {
        if *end_entity == self.0 { Ok(()) } else { Err(CertificateError::UnknownIssuer.into()) }
    }
}
