//! The objects of a key in a token: what they are called, and the handle of the one that signs.

use cryptoki::object::ObjectHandle;
use pintle_plugins_api::{KeyAlgorithm, KeyId};

/// What the labels of this agent's objects begin with; the text of the key's id follows.
const LABEL_PREFIX: &str = "pintle ";

/// What signs in the token, for as long as the session that found it.
#[derive(Clone, Copy)]
pub(crate) struct PrivateKey {
    /// The private object.
    pub(crate) object: ObjectHandle,
    /// What it is a key of.
    pub(crate) algorithm: KeyAlgorithm,
}

/// The CKA_LABEL of a key's objects.
pub(crate) fn label(id: &KeyId) -> Vec<u8> {
    format!("{LABEL_PREFIX}{id}").into_bytes()
}
