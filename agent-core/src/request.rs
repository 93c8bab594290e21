//! What is asked of the signer: an identity template and a public key become a PKCS#10 certification request.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use pintle_plugins_api::{KeyAlgorithm, PublicKey, SignatureScheme};
use rcgen::{CertificateParams, DistinguishedName, DnType, PublicKeyData};
use serde::{Deserialize, Serialize};

/// The signer of a kubelet's client certificates.
pub const KUBELET_CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";

/// Who the certificate is for and what it is good for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// `spec.signerName` of the CertificateSigningRequest.
    pub signer_name: String,
    /// The subject's common name.
    pub common_name: String,
    /// The subject's organizations.
    pub organizations: Vec<String>,
    /// DNS names in the subjectAltName.
    pub dns_names: Vec<String>,
    /// IP addresses in the subjectAltName.
    pub ip_addresses: Vec<std::net::IpAddr>,
    /// `spec.expirationSeconds`: the life asked for, which signers since Kubernetes 1.22 may honour. At least 600.
    pub expiration_seconds: Option<i32>,
}

impl Template {
    /// The client certificate of a kubelet: organization `system:nodes`, common name `system:node:` and the node's name,
    /// no subjectAltName, as the signer `kubernetes.io/kube-apiserver-client-kubelet` demands.
    pub fn kubelet_client(node_name: &str) -> Self {
        Self {
            signer_name: KUBELET_CLIENT_SIGNER.to_owned(),
            common_name: format!("system:node:{node_name}"),
            organizations: vec!["system:nodes".to_owned()],
            dns_names: Vec::new(),
            ip_addresses: Vec::new(),
            expiration_seconds: None,
        }
    }

    /// Whether a certificate for this is one for the other too: the life that is asked for may differ.
    pub fn names_the_same(&self, other: &Self) -> bool {
        Self { expiration_seconds: other.expiration_seconds, ..self.clone() } == *other
    }

    /// `spec.usages` for a key of this algorithm, for an API server of this minor version of Kubernetes 1 if it is known.
    ///
    /// Before 1.25 the signer demands "key encipherment" whatever the key; since then it is optional, and since 1.27 the
    /// kubelet asks for it with RSA keys only, since no other key can be used so (RFC 5480, section 3).
    pub fn usages(&self, algorithm: KeyAlgorithm, server_minor: Option<u32>) -> Vec<&'static str> {
        let mut usages = vec!["digital signature"];
        if algorithm.is_rsa() || server_minor.is_none_or(|minor| minor < 27) {
            usages.push("key encipherment");
        }
        usages.push("client auth");
        usages
    }

    /// The name of the CertificateSigningRequest: the same node, signer, key and attempt always have the same name, so
    /// creating it twice is creating it once.
    pub fn request_name(&self, public_key: &PublicKey, attempt: u32) -> String {
        let mut bytes = Vec::new();
        for part in
            [self.common_name.as_bytes(), self.signer_name.as_bytes(), public_key.as_der(), &attempt.to_be_bytes()]
        {
            bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
            bytes.extend_from_slice(part);
        }
        let hash: String = digest(&SHA256, &bytes).as_ref()[..12].iter().map(|byte| format!("{byte:02x}")).collect();
        // An object's name is a DNS subdomain of at most 253 characters (RFC 1123, section 2.1).
        let subject = self.common_name.rsplit(':').next().unwrap_or_default().to_ascii_lowercase();
        let subject: String = subject
            .chars()
            .filter(|character| character.is_ascii_alphanumeric() || matches!(character, '-' | '.'))
            .take(200)
            .collect();
        match subject.trim_matches(['-', '.']) {
            "" => format!("pintle-{hash}"),
            subject => format!("pintle-{subject}-{hash}"),
        }
    }

    /// The PEM of a PKCS#10 certification request (RFC 2986) for `public_key`, signed by `sign`, which gets the unhashed
    /// message and answers as [`pintle_plugins_api::KeyBackend::sign`] does.
    ///
    /// # Errors
    /// What `sign` failed with, or that the template holds something that no certificate can.
    pub fn certification_request<E>(
        &self,
        public_key: &PublicKey,
        sign: impl Fn(SignatureScheme, &[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<String, RequestError<E>> {
        let mut names = self.dns_names.clone();
        names.extend(self.ip_addresses.iter().map(ToString::to_string));
        let mut parameters =
            CertificateParams::new(names).map_err(|error| RequestError::Template(error.to_string()))?;
        let mut subject = DistinguishedName::new();
        for organization in &self.organizations {
            subject.push(DnType::OrganizationName, organization.as_str());
        }
        subject.push(DnType::CommonName, self.common_name.as_str());
        parameters.distinguished_name = subject;

        let key = RemoteKey {
            subject_public_key: public_key.subject_public_key(),
            algorithm: public_key.algorithm(),
            sign: &sign,
            failure: std::cell::RefCell::new(None),
        };
        let request = parameters.serialize_request(&key);
        if let Some(error) = key.failure.into_inner() {
            return Err(RequestError::Sign(error));
        }
        request.and_then(|request| request.pem()).map_err(|error| RequestError::Template(error.to_string()))
    }
}

/// Why there is no certification request.
#[derive(Debug, PartialEq, Eq)]
pub enum RequestError<E> {
    /// The key did not sign.
    Sign(E),
    /// The template holds something that no certificate can.
    Template(String),
}

impl<E: fmt::Display> fmt::Display for RequestError<E> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sign(error) => error.fmt(formatter),
            Self::Template(detail) => write!(formatter, "no certificate can hold this identity: {detail}"),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> std::error::Error for RequestError<E> {}

/// A key that signs elsewhere, as rcgen wants to see it. rcgen's error for that has no room for a cause: it is kept here.
struct RemoteKey<'a, S, E> {
    subject_public_key: Vec<u8>,
    algorithm: KeyAlgorithm,
    sign: &'a S,
    failure: std::cell::RefCell<Option<E>>,
}

impl<S, E> PublicKeyData for RemoteKey<'_, S, E> {
    fn der_bytes(&self) -> &[u8] {
        &self.subject_public_key
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        match self.algorithm {
            KeyAlgorithm::EcdsaP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyAlgorithm::EcdsaP384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            KeyAlgorithm::Rsa2048 | KeyAlgorithm::Rsa3072 | KeyAlgorithm::Rsa4096 => &rcgen::PKCS_RSA_SHA256,
            KeyAlgorithm::Ed25519 => &rcgen::PKCS_ED25519,
        }
    }
}

impl<S: Fn(SignatureScheme, &[u8]) -> Result<Vec<u8>, E>, E> rcgen::SigningKey for RemoteKey<'_, S, E> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let scheme = match self.algorithm {
            KeyAlgorithm::EcdsaP256 => SignatureScheme::EcdsaP256Sha256,
            KeyAlgorithm::EcdsaP384 => SignatureScheme::EcdsaP384Sha384,
            KeyAlgorithm::Rsa2048 | KeyAlgorithm::Rsa3072 | KeyAlgorithm::Rsa4096 => SignatureScheme::RsaPkcs1Sha256,
            KeyAlgorithm::Ed25519 => SignatureScheme::Ed25519,
        };
        (self.sign)(scheme, message).map_err(|error| {
            *self.failure.borrow_mut() = Some(error);
            rcgen::Error::RemoteKeyError
        })
    }
}

#[cfg(test)]
mod tests;
