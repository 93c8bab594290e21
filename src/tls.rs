//! Certificate verifiers for rustls. An implementation decides which certificates are valid; verifying the signatures of
//! handshakes is the same for all.

use std::fmt;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

/// Which servers' certificates are good.
pub trait ServerCertificates: fmt::Debug + Send + Sync {
    /// Checks the certificate that a server presents.
    ///
    /// # Errors
    /// Why it is not good.
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error>;
}

/// Which clients' certificates are good.
pub trait ClientCertificates: fmt::Debug + Send + Sync {
    /// Checks the certificate that a client presents.
    ///
    /// # Errors
    /// Why it is not good.
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error>;

    /// Whether clients without a certificate are turned away.
    fn is_mandatory(&self) -> bool {
        true
    }

    /// The authorities that clients are told of. With none, a client chooses by itself.
    fn authorities(&self) -> &[DistinguishedName] {
        &[]
    }
}

/// A verifier that asks `C` about certificates, and verifies the signature of the handshake as the provider does.
#[derive(Debug)]
pub struct Verifier<C> {
    certificates: C,
    algorithms: WebPkiSupportedAlgorithms,
    verifies_signatures: bool,
}

impl<C> Verifier<C> {
    /// Of these certificates.
    pub fn new(certificates: C, provider: &CryptoProvider) -> Self {
        Self { certificates, algorithms: provider.signature_verification_algorithms, verifies_signatures: true }
    }

    /// Of these certificates, without proof that the peer has their key: webpki cannot read the key of an X.509 v1
    /// certificate.
    pub fn without_signatures(certificates: C, provider: &CryptoProvider) -> Self {
        Self { verifies_signatures: false, ..Self::new(certificates, provider) }
    }

    fn verify(
        &self,
        verify: impl FnOnce(&WebPkiSupportedAlgorithms) -> Result<HandshakeSignatureValid, Error>,
    ) -> Result<HandshakeSignatureValid, Error> {
        if self.verifies_signatures { verify(&self.algorithms) } else { Ok(HandshakeSignatureValid::assertion()) }
    }
}

impl<C: ServerCertificates> ServerCertVerifier for Verifier<C> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.certificates.check(end_entity, intermediates, server_name, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(|algorithms| verify_tls12_signature(message, certificate, signature, algorithms))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(|algorithms| verify_tls13_signature(message, certificate, signature, algorithms))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl<C: ClientCertificates> ClientCertVerifier for Verifier<C> {
    fn client_auth_mandatory(&self) -> bool {
        self.certificates.is_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.certificates.authorities()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.certificates.check(end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(|algorithms| verify_tls12_signature(message, certificate, signature, algorithms))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(|algorithms| verify_tls13_signature(message, certificate, signature, algorithms))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
