//! The seam between pintle and whatever holds a private key.
//!
//! A backend implements [`KeyBackend`]: it generates keys, names them, signs with them and destroys them, and the
//! bytes of a private key never cross it. Everything above the seam (the rotation, the TLS connections, the
//! certificate signing request) is the same for a file, a PKCS#11 token, a TPM or a plugin.
//!
//! - [`abi`]: the same seam in C, for backends in shared objects, and what a plugin written in Rust needs
//! - [`backend`]: the trait, and the optional abilities a backend may have beside it
//! - [`key`]: how a key is named, what kinds there are, and its public half
//! - [`encoding`]: public keys and signatures in DER, for devices that speak in bare numbers
//! - [`error`]: what can go wrong, named by what the caller does next
//! - [`conformance`]: what every backend must do, checked from outside

pub mod abi;
pub mod backend;
pub mod conformance;
pub mod encoding;
pub mod error;
pub mod key;

pub use backend::{KeyBackend, KeyImport, KeyReference, Resource};
pub use error::{BackendError, BackendErrorKind};
pub use key::{InvalidKeyId, InvalidPublicKey, KeyAlgorithm, KeyId, PublicKey, SignatureScheme};
