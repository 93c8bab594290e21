//! A key behind the seam, as rustls wants to see it.

use std::sync::Arc;
use std::time::Duration;

use pintle_agent_core::Credential;
use pintle_plugins_api::{KeyId, PublicKey, SignatureScheme};
use rustls::client::ResolvesClientCert;
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer};
use rustls::sign::{CertifiedKey, Signer, SigningKey};

use super::{BackendThread, CALL_DEADLINE, Keyring};

/// The chain and the signing key of a credential, for a TLS handshake.
///
/// # Errors
/// If no such backend is configured, or the leaf's key is of an unknown kind.
pub fn certified_key(
    credential: &Credential,
    keyring: &Keyring,
) -> Result<Arc<CertifiedKey>, pintle_plugins_api::BackendError> {
    certified_key_within(credential, keyring, CALL_DEADLINE)
}

/// As [`certified_key`], with a deadline for each signature: a handshake whose client waits is better failed soon.
///
/// # Errors
/// As [`certified_key`].
pub fn certified_key_within(
    credential: &Credential,
    keyring: &Keyring,
    deadline: Duration,
) -> Result<Arc<CertifiedKey>, pintle_plugins_api::BackendError> {
    let public_key = PublicKey::from_der(credential.public_key()).map_err(|error| {
        pintle_plugins_api::BackendError::new(pintle_plugins_api::BackendErrorKind::Corrupt, error.to_string())
    })?;
    let key = BackendKey {
        backend: keyring.backend(&credential.key().backend)?.clone(),
        id: credential.key().id.clone(),
        public_key,
        deadline,
    };
    let chain = credential.chain().iter().map(|der| CertificateDer::from(der.clone())).collect();
    Ok(Arc::new(CertifiedKey::new(chain, Arc::new(key))))
}

/// Presents one credential to every server that asks for a client certificate.
#[derive(Debug)]
pub struct HeldCertificate(pub Arc<CertifiedKey>);

impl ResolvesClientCert for HeldCertificate {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A key in a backend.
#[derive(Clone)]
struct BackendKey {
    backend: BackendThread,
    id: KeyId,
    public_key: PublicKey,
    /// How long a signature may take.
    deadline: Duration,
}

impl std::fmt::Debug for BackendKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "BackendKey({})", self.id)
    }
}

impl SigningKey for BackendKey {
    fn choose_scheme(&self, offered: &[rustls::SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = self
            .public_key
            .algorithm()
            .schemes()
            .iter()
            .copied()
            .find(|scheme| offered.contains(&tls_scheme(*scheme)))?;
        Some(Box::new(BackendSigner { key: self.clone(), scheme }))
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(SubjectPublicKeyInfoDer::from(self.public_key.as_der()))
    }

    fn algorithm(&self) -> rustls::SignatureAlgorithm {
        use pintle_plugins_api::KeyAlgorithm::*;
        match self.public_key.algorithm() {
            EcdsaP256 | EcdsaP384 => rustls::SignatureAlgorithm::ECDSA,
            Rsa2048 | Rsa3072 | Rsa4096 => rustls::SignatureAlgorithm::RSA,
            Ed25519 => rustls::SignatureAlgorithm::ED25519,
        }
    }
}

/// A key in a backend with the scheme that a handshake settled on.
#[derive(Debug)]
struct BackendSigner {
    key: BackendKey,
    scheme: SignatureScheme,
}

impl Signer for BackendSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let (id, scheme, message) = (self.key.id.clone(), self.scheme, message.to_vec());
        // rustls signs synchronously.
        self.key
            .backend
            .call_blocking(self.key.deadline, move |backend| backend.sign(&id, scheme, &message))
            .map_err(|error| rustls::Error::Other(rustls::OtherError(Arc::new(error))))
    }

    fn scheme(&self) -> rustls::SignatureScheme {
        tls_scheme(self.scheme)
    }
}

fn tls_scheme(scheme: SignatureScheme) -> rustls::SignatureScheme {
    match scheme {
        SignatureScheme::EcdsaP256Sha256 => rustls::SignatureScheme::ECDSA_NISTP256_SHA256,
        SignatureScheme::EcdsaP384Sha384 => rustls::SignatureScheme::ECDSA_NISTP384_SHA384,
        SignatureScheme::RsaPkcs1Sha256 => rustls::SignatureScheme::RSA_PKCS1_SHA256,
        SignatureScheme::RsaPkcs1Sha384 => rustls::SignatureScheme::RSA_PKCS1_SHA384,
        SignatureScheme::RsaPkcs1Sha512 => rustls::SignatureScheme::RSA_PKCS1_SHA512,
        SignatureScheme::RsaPssSha256 => rustls::SignatureScheme::RSA_PSS_SHA256,
        SignatureScheme::RsaPssSha384 => rustls::SignatureScheme::RSA_PSS_SHA384,
        SignatureScheme::RsaPssSha512 => rustls::SignatureScheme::RSA_PSS_SHA512,
        SignatureScheme::Ed25519 => rustls::SignatureScheme::ED25519,
    }
}
