//! The interface between pintle and its key backends.
//!
//! A backend implements [`KeyBackend`]: it generates keys, signs with them and destroys them. The bytes of a private
//! key never cross this interface. The rotation, the TLS connections and the certificate signing request are the same
//! for a file, a PKCS#11 token, a TPM or a plugin.
//!
//! - [`abi`]: the same interface in C, for backends in shared objects, with support for plugins written in Rust
//! - [`backend`]: the trait, and its optional capabilities
//! - [`key`]: key ids, algorithms, signature schemes and public keys
//! - [`encoding`]: DER encoding of public keys and signatures, for devices that return bare numbers
//! - [`error`]: errors, named after what the caller does next
//! - [`conformance`]: a test suite that every backend must pass

pub mod abi;
pub mod backend;
pub mod conformance;
pub mod encoding;
pub mod error;
pub mod key;

pub use backend::{KeyBackend, KeyImport, KeyReference, Resource};
pub use error::{BackendError, BackendErrorKind};
pub use key::{InvalidKeyId, InvalidPublicKey, KeyAlgorithm, KeyId, PublicKey, SignatureScheme};
