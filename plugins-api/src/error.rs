//! Errors of a backend, named after what the caller does next.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the caller does next about a [`BackendError`].
///
/// The numbers are those of the C ABI and of the isolation protocol, and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(i32)]
pub enum BackendErrorKind {
    /// The key certainly does not exist. Generate it.
    NotFound = -1,
    /// A different key has this id. Choose another id.
    Conflict = -2,
    /// A PIN is missing, refused or locked out. An operator must act; the same PIN is never tried again.
    Locked = -3,
    /// The device is busy or does not answer. Try again later; nothing indicates that keys are lost.
    Unavailable = -4,
    /// The device is present, but the key is permanently gone (cleared TPM, re-initialised token). Enrol again.
    KeyLost = -5,
    /// The backend cannot do this. Choose another algorithm or backend.
    Unsupported = -6,
    /// Stored data or the device's answer is invalid. An operator must inspect it.
    Corrupt = -7,
}

impl BackendErrorKind {
    /// Every kind, in the order of their C ABI numbers.
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
    /// Decides what the caller does next.
    pub kind: BackendErrorKind,
    /// What happened, and to what: one line, without secrets.
    pub detail: String,
    /// What an operator can do about it: one line.
    pub hint: Option<String>,
}

impl BackendError {
    /// An error without a hint.
    pub fn new(kind: BackendErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), hint: None }
    }

    /// Adds or replaces the hint.
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
