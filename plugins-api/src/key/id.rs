//! The names of keys.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use serde::{Deserialize, Serialize};

/// The name of a key within its backend: 1 to 128 arbitrary bytes, chosen by the agent before the key exists.
///
/// It is what PKCS#11 calls CKA_ID. As text (journals, file names, logs) every byte other than ASCII letters,
/// digits, `-`, `_` and `.` is percent-encoded (RFC 3986, section 2.1), and so is a leading `.`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId(Arc<[u8]>);

/// These bytes of a key id stand for themselves as text.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

impl KeyId {
    /// The longest id, in bytes. Percent-encoded with a suffix it still fits a file name of 255 bytes only when
    /// most of its bytes stand for themselves; the agent's own ids do.
    pub const MAXIMUM_LENGTH: usize = 128;

    /// An id of these bytes.
    ///
    /// # Errors
    /// If there are none, or more than [`MAXIMUM_LENGTH`](Self::MAXIMUM_LENGTH).
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, InvalidKeyId> {
        let bytes = bytes.into();
        if bytes.is_empty() || bytes.len() > Self::MAXIMUM_LENGTH { Err(InvalidKeyId) } else { Ok(Self(bytes.into())) }
    }

    /// The bytes of the id.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = percent_encode(&self.0, PLAIN).to_string();
        match text.strip_prefix('.') {
            Some(rest) => write!(formatter, "%2E{rest}"),
            None => formatter.write_str(&text),
        }
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "KeyId({self})")
    }
}

impl FromStr for KeyId {
    type Err = InvalidKeyId;

    fn from_str(text: &str) -> Result<Self, InvalidKeyId> {
        Self::new(percent_decode_str(text).collect::<Vec<u8>>())
    }
}

impl TryFrom<String> for KeyId {
    type Error = InvalidKeyId;

    fn try_from(text: String) -> Result<Self, InvalidKeyId> {
        text.parse()
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> Self {
        id.to_string()
    }
}

/// The bytes are not a [`KeyId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidKeyId;

impl fmt::Display for InvalidKeyId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a key id has 1 to {} bytes", KeyId::MAXIMUM_LENGTH)
    }
}

impl std::error::Error for InvalidKeyId {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_id_survives_text_whatever_its_bytes() {
        for bytes in [&b"node-1/client/3"[..], b"\0\xff/..%", b".hidden", b"plain"] {
            let id = KeyId::new(bytes).expect("a valid id");
            let text = id.to_string();
            assert!(!text.contains('/') && !text.starts_with('.'), "{text}");
            assert_eq!(text.parse(), Ok(id));
        }
        assert_eq!(KeyId::new([]), Err(InvalidKeyId));
        assert_eq!(KeyId::new([0; 129]), Err(InvalidKeyId));
    }
}
