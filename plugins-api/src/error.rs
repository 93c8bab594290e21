//! What can go wrong in a backend, named by what the caller does next.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the caller does about a [`BackendError`].
///
/// The numbers are those of the C ABI and of the isolation protocol, and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(i32)]
pub enum BackendErrorKind {
    /// There certainly is no key with this id. Make one.
    NotFound = -1,
    /// A different key has this id. Choose another id.
    Conflict = -2,
    /// A PIN is missing, refused or locked out. A person must act; the same PIN is never tried again.
    Locked = -3,
    /// The device does not answer, or is busy. Try again later; keys are intact as far as anybody knows.
    Unavailable = -4,
    /// The device is there and the key is gone for good (cleared TPM, re-initialised token). Enrol again.
    KeyLost = -5,
    /// The backend cannot do this. Choose another algorithm or backend.
    Unsupported = -6,
    /// What was stored or answered makes no sense. A person must look.
    Corrupt = -7,
}

impl BackendErrorKind {
    /// Every kind, in the order of the numbers.
    pub const ALL: [Self; 7] = [
        Self::NotFound,
        Self::Conflict,
        Self::Locked,
        Self::Unavailable,
        Self::KeyLost,
        Self::Unsupported,
        Self::Corrupt,
    ];

    /// The kind with this number in the C ABI.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as i32 == code)
    }
}

impl fmt::Display for BackendErrorKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotFound => "key not found",
            Self::Conflict => "another key has this id",
            Self::Locked => "locked",
            Self::Unavailable => "unavailable",
            Self::KeyLost => "key lost",
            Self::Unsupported => "not supported",
            Self::Corrupt => "corrupt",
        })
    }
}

/// An error of a key backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendError {
    /// What the caller does next.
    pub kind: BackendErrorKind,
    /// What happened, to what: one line, without secrets.
    pub detail: String,
    /// What a person can do about it: one line, where there is something to say.
    pub hint: Option<String>,
}

impl BackendError {
    /// An error of this kind, about what `detail` says.
    pub fn new(kind: BackendErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), hint: None }
    }

    /// The same error, with what a person can do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.kind, self.detail)
    }
}

impl std::error::Error for BackendError {}
