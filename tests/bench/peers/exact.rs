//! TLS configurations that use as little CPU as possible in the load generator and the server, to leave it to the
//! proxies.

use pintle::tls::{ClientCertificates, ServerCertificates, Verifier};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, Error};

/// A provider with these key exchanges, which prefers AES-128-GCM.
pub(crate) fn fast_provider(groups: Vec<&'static dyn SupportedKxGroup>) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = groups;
    let fast = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.suite();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != fast);
    provider
}

/// Accepts exactly these certificates, and verifies only the handshake signature, not a chain.
#[derive(Debug)]
pub(crate) struct ExactCertificates(Vec<CertificateDer<'static>>);

impl ExactCertificates {
    pub(crate) fn verifier(certificates: Vec<CertificateDer<'static>>, provider: &CryptoProvider) -> Verifier<Self> {
        Verifier::new(Self(certificates), provider)
    }

    fn verdict(&self, leaf: &CertificateDer<'_>) -> Result<(), Error> {
        if self.0.iter().any(|certificate| certificate == leaf) {
            Ok(())
        } else {
            Err(CertificateError::UnknownIssuer.into())
        }
    }
}

impl ClientCertificates for ExactCertificates {
    fn check(&self, leaf: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime) -> Result<(), Error> {
        self.verdict(leaf)
    }
}

impl ServerCertificates for ExactCertificates {
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: UnixTime,
    ) -> Result<(), Error> {
        self.verdict(leaf)
    }
}
