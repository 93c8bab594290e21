//! What a key backend does.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{BackendError, KeyAlgorithm, KeyId, PublicKey, SignatureScheme};

/// Holds private keys and signs with them.
///
/// # Flow
/// The agent journals a [`KeyId`] before it calls [`generate`](Self::generate) with it, so a crash at any point is
/// mended by calling again with the same id.
///
/// # Guarantees
/// Calls block, for as long as the device takes. Exactly one thread owns a backend; it is never called from two
/// threads at once. Nothing here returns, logs or stores the bytes of a private key outside the backend's own store.
///
/// # Errors
/// Every error says what the caller does next, see [`BackendErrorKind`](crate::BackendErrorKind). In particular a
/// backend never answers `NotFound` when it merely cannot see (not logged in, token absent, device busy): the agent
/// would take the key for lost.
pub trait KeyBackend: Send {
    /// Generates a key under `id`, or returns the key that already has this id: a repeat changes nothing.
    ///
    /// # Errors
    /// `Conflict` if a key with this id exists and is of another algorithm; `Unsupported` if the backend cannot hold
    /// keys of this algorithm.
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError>;

    /// The public half of the key, a DER SubjectPublicKeyInfo (RFC 5280, section 4.1).
    ///
    /// # Errors
    /// `NotFound` only if the backend is sure that no key has this id.
    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError>;

    /// Signs `message`, which is not yet hashed: hashing as `scheme` demands is the backend's affair.
    ///
    /// ECDSA signatures are returned as DER (`ECDSA-Sig-Value`, RFC 3279, section 2.2.3), RSA ones as the raw octets
    /// of RFC 8017, Ed25519 ones as the 64 octets of RFC 8032.
    ///
    /// # Errors
    /// `Unsupported` if the scheme does not fit the key; `NotFound` or `KeyLost` if there is no such key.
    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError>;

    /// Destroys the key. An absent key is a destroyed key: a repeat succeeds.
    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError>;

    /// The keys that pintle made in this backend, in no particular order. Keys made by anybody else are not listed.
    fn list(&mut self) -> Result<Vec<KeyId>, BackendError>;

    /// How somebody outside pintle (OpenSSL, an operator) names this key.
    ///
    /// # Errors
    /// As [`public_key`](Self::public_key).
    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError>;

    /// An optional ability: how much is taken of what the device can run out of. Without it, nothing is said.
    ///
    /// # Errors
    /// As [`list`](Self::list). A device that does not tell of a resource is no error: the resource is left out.
    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        Ok(Vec::new())
    }

    /// An optional ability: taking over keys that were made elsewhere. `None` from a backend that does not.
    fn importer(&mut self) -> Option<&mut dyn KeyImport> {
        None
    }
}

/// Something that a device can run out of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    /// What it is, in the device's own terms and in the plural: `sessions`, `transient objects`, `files`.
    pub name: String,
    /// How much of it is taken now. Of what keys consist of (`objects`, `files`), this agent's are counted; of
    /// everything else, what the device counts, whoever has it.
    pub used: u64,
    /// How much of it there is, if that is known.
    pub limit: Option<u64>,
}

impl Resource {
    /// A resource of this name.
    pub fn new(name: impl Into<String>, used: u64, limit: Option<u64>) -> Self {
        Self { name: name.into(), used, limit }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.name, self.used)?;
        self.limit.map_or(Ok(()), |limit| write!(formatter, " of {limit}"))
    }
}

/// An optional ability: a backend that can take over a key made elsewhere.
///
/// Only the file backend has it: it is how a pair that a kubelet made, key and all, is adopted.
pub trait KeyImport {
    /// Stores `private_key` under `id`; a repeat with the same key changes nothing.
    ///
    /// `private_key` is DER: PKCS#8 (RFC 5958), SEC 1 `ECPrivateKey` (RFC 5915) or PKCS#1 `RSAPrivateKey` (RFC 8017).
    ///
    /// # Errors
    /// `Corrupt` if it is none of these; `Conflict` if another key has this id.
    fn import(&mut self, id: &KeyId, private_key: &[u8]) -> Result<PublicKey, BackendError>;
}

/// How a consumer outside pintle names a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyReference {
    /// A PEM file that holds the private key itself. It goes into the published pair as it is.
    File(PathBuf),
    /// PEM text that names a key without holding it, such as a `TSS2 PRIVATE KEY`, which only its own TPM can load.
    Pem(String),
    /// A URI, such as a `pkcs11:` URI (RFC 7512).
    Uri(String),
}
