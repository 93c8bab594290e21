//! The protocol between agent and child: frames of a 4-byte big-endian length followed by that many bytes of JSON.
//!
//! Both sides are the same executable, so the protocol has no version.

use std::io::{self, Read, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use pintle_plugins_api::{BackendError, KeyAlgorithm, KeyId, KeyReference, PublicKey, Resource, SignatureScheme};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::keys::ModuleConfiguration;

/// Limit on a frame's length, in bytes. The longest messages to sign are 1 MiB, before base64.
const MAXIMUM_LENGTH: usize = 4 << 20;

/// A call of the agent.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    /// Opens the module. Sent first, and again after it failed.
    Open(ModuleConfiguration),
    /// [`KeyBackend::generate`](pintle_plugins_api::KeyBackend::generate).
    Generate { id: KeyId, algorithm: KeyAlgorithm },
    /// [`KeyBackend::public_key`](pintle_plugins_api::KeyBackend::public_key).
    PublicKey { id: KeyId },
    /// [`KeyBackend::sign`](pintle_plugins_api::KeyBackend::sign).
    Sign { id: KeyId, scheme: SignatureScheme, message: Bytes },
    /// [`KeyBackend::delete`](pintle_plugins_api::KeyBackend::delete).
    Delete { id: KeyId },
    /// [`KeyBackend::list`](pintle_plugins_api::KeyBackend::list).
    List,
    /// [`KeyBackend::reference`](pintle_plugins_api::KeyBackend::reference).
    Reference { id: KeyId },
    /// [`KeyBackend::usage`](pintle_plugins_api::KeyBackend::usage).
    Usage,
}

impl Request {
    /// The call's name, for error messages.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Open(_) => "open",
            Self::Generate { .. } => "generate",
            Self::PublicKey { .. } => "public_key",
            Self::Sign { .. } => "sign",
            Self::Delete { .. } => "delete",
            Self::List => "list",
            Self::Reference { .. } => "reference",
            Self::Usage => "usage",
        }
    }
}

/// The result of a successful call.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// The result of `Open` and `Delete`.
    Done,
    /// A key.
    PublicKey(PublicKey),
    /// A signature.
    Signature(Bytes),
    /// The keys.
    Keys(Vec<KeyId>),
    /// How a consumer refers to a key.
    Reference(KeyReference),
    /// The device's resources, and how much of them is in use.
    Usage(Vec<Resource>),
}

pub(super) type Response = Result<Answer, BackendError>;

/// Bytes, as base64 in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Bytes(pub(super) Vec<u8>);

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        BASE64.encode(bytes.0)
    }
}

impl TryFrom<String> for Bytes {
    type Error = base64::DecodeError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        BASE64.decode(text).map(Self)
    }
}

/// Writes a frame with a single call, so that the reader wakes up once.
pub(super) fn write_frame(writer: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - 4;
    if length > MAXIMUM_LENGTH {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a frame of {length} bytes is too long")));
    }
    frame[..4].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    writer.write_all(&frame)
}

/// Reads a frame; `None` if the peer closed the connection before it.
pub(super) fn read_frame<T: DeserializeOwned>(reader: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    let read = loop {
        match reader.read(&mut length) {
            // Reading a socket with a timeout fails with EINTR when the process is stopped and continued (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read?,
        }
    };
    if read == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut length[read..])?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAXIMUM_LENGTH {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes is too long")));
    }
    let mut frame = vec![0; length];
    reader.read_exact(&mut frame)?;
    // Without the parser's message, which quotes the input: a plugin's configuration may contain a secret.
    let parsed = serde_json::from_slice(&frame);
    parsed.map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, crate::parse_error::json(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every second read fails with EINTR.
    struct Interrupted<'a>(&'a [u8], bool);

    impl Read for Interrupted<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 { Err(io::ErrorKind::Interrupted.into()) } else { self.0.read(buffer) }
        }
    }

    #[test]
    fn an_interrupted_read_is_retried() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &Request::List).expect("written");
        let mut reader = Interrupted(&wire, false);
        assert!(matches!(read_frame(&mut reader).expect("read"), Some(Request::List)));
        assert!(read_frame::<Request>(&mut reader).expect("the end").is_none());
    }

    #[test]
    fn frames_round_trip_and_malformed_ones_are_errors() {
        let mut wire = Vec::new();
        let id = KeyId::new(*b"a/\0").expect("an id");
        let request =
            Request::Sign { id: id.clone(), scheme: SignatureScheme::EcdsaP256Sha256, message: Bytes(vec![0, 255, 7]) };
        write_frame(&mut wire, &request).expect("written");
        match read_frame(&mut wire.as_slice()).expect("read") {
            Some(Request::Sign { id: read, message, .. }) => assert_eq!((read, message.0), (id, vec![0, 255, 7])),
            _ => panic!("a different request"),
        }
        assert!(read_frame::<Request>(&mut &b""[..]).expect("the end").is_none());
        for malformed in [&b"\0\0"[..], b"\0\0\0\x05abc", b"\xff\xff\xff\xff", b"\0\0\0\x02{}"] {
            assert!(read_frame::<Request>(&mut &*malformed).is_err(), "{malformed:?}");
        }
    }
}
