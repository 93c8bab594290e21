//! How a key is named, what kinds there are, and its public half.

mod algorithm;
mod id;
mod public;

pub use algorithm::{KeyAlgorithm, SignatureScheme};
pub use id::{InvalidKeyId, KeyId};
pub use public::{InvalidPublicKey, PublicKey};
