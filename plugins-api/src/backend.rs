//! The trait of key backends, and its optional capabilities.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{BackendError, KeyAlgorithm, KeyId, PublicKey, SignatureScheme};

/// Holds private keys and signs with them.
///
/// # Flow
/// The agent journals a [`KeyId`] before it calls [`generate`](Self::generate) with it, so it can recover from a crash
/// at any point by calling again with the same id.
///
/// # Guarantees
/// Calls block for as long as the device needs. Exactly one thread owns a backend; it is never called from two threads
/// at once. No method returns, logs or stores the bytes of a private key outside the backend's own store.
///
/// # Errors
/// The [`BackendErrorKind`](crate::BackendErrorKind) determines what the caller does next. In particular, a backend
/// must not return `NotFound` if it cannot look (not logged in, token absent, device busy), because the agent would
/// treat the key as lost.
pub trait KeyBackend: Send {
    /// Generates a key with this id, or returns the existing key with this id: repeating the call changes nothing.
    ///
    /// # Errors
    /// `Conflict` if the key with this id has another algorithm; `Unsupported` if the backend does not support the
    /// algorithm.
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError>;

    /// The public key, a DER SubjectPublicKeyInfo (RFC 5280, section 4.1).
    ///
    /// # Errors
    /// `NotFound` only if the key certainly does not exist.
    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError>;

    /// Signs `message`. The backend hashes it with the hash function of `scheme`.
    ///
    /// ECDSA signatures are DER (`ECDSA-Sig-Value`, RFC 3279, section 2.2.3), RSA signatures the raw bytes of RFC 8017,
    /// Ed25519 signatures the 64 bytes of RFC 8032.
    ///
    /// # Errors
    /// `Unsupported` if the key cannot use the scheme; `NotFound` or `KeyLost` if there is no such key.
    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError>;

    /// Destroys the key. Succeeds if there is no such key.
    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError>;

    /// The keys that pintle made in this backend, in no particular order. Keys made by other programs are not listed.
    fn list(&mut self) -> Result<Vec<KeyId>, BackendError>;

    /// How programs outside pintle, such as OpenSSL, refer to this key.
    ///
    /// # Errors
    /// As [`public_key`](Self::public_key).
    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError>;

    /// Optional: the usage of the device's limited resources. Resources that the device does not report are left out.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        Ok(Vec::new())
    }

    /// Optional: imports keys that other programs made. `None` if the backend cannot.
    fn importer(&mut self) -> Option<&mut dyn KeyImport> {
        None
    }
}

/// A limited resource of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    /// The device's own term, in the plural: `sessions`, `transient objects`, `files`.
    pub name: String,
    /// The amount in use. For resources that keys consist of (`objects`, `files`), only this agent's; for others, the
    /// device's count for all programs.
    pub used: u64,
    /// The total amount, if known.
    pub limit: Option<u64>,
}

impl Resource {
    /// Creates a resource; see the fields.
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

/// An optional capability: importing a key that another program made.
///
/// The file backend has it, to adopt a pair that a kubelet made together with its key.
pub trait KeyImport {
    /// Stores `private_key` under `id`. Repeating the call with the same key changes nothing.
    ///
    /// `private_key` is DER: PKCS#8 (RFC 5958), SEC 1 `ECPrivateKey` (RFC 5915) or PKCS#1 `RSAPrivateKey` (RFC 8017).
    ///
    /// # Errors
    /// `Corrupt` if it is in none of these formats; `Conflict` if another key has this id.
    fn import(&mut self, id: &KeyId, private_key: &[u8]) -> Result<PublicKey, BackendError>;
}

/// How programs outside pintle refer to a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyReference {
    /// A PEM file that contains the private key. Its content is written into the published pair.
    File(PathBuf),
    /// PEM text that identifies a key without containing it, such as a `TSS2 PRIVATE KEY`, which only its own TPM can
    /// load.
    Pem(String),
    /// A URI, such as a `pkcs11:` URI (RFC 7512).
    Uri(String),
}
