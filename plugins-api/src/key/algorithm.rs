//! The kinds of keys, and how each signs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{BackendError, BackendErrorKind};

/// What kind of key is generated. The numbers are those of the C ABI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(i32)]
pub enum KeyAlgorithm {
    /// ECDSA on NIST P-256 (secp256r1): what the kubelet uses, and the default.
    #[default]
    EcdsaP256 = 1,
    /// ECDSA on NIST P-384 (secp384r1).
    EcdsaP384 = 2,
    /// RSA with a modulus of 2048 bits.
    // As `name` has it; journals and configurations of pintle 0.1 have it without the dash.
    #[serde(rename = "rsa-2048", alias = "rsa2048")]
    Rsa2048 = 3,
    /// RSA with a modulus of 3072 bits.
    #[serde(rename = "rsa-3072", alias = "rsa3072")]
    Rsa3072 = 4,
    /// RSA with a modulus of 4096 bits.
    #[serde(rename = "rsa-4096", alias = "rsa4096")]
    Rsa4096 = 5,
    /// Ed25519 (RFC 8032).
    Ed25519 = 6,
}

impl KeyAlgorithm {
    /// Every algorithm, in the order of the numbers.
    pub const ALL: [Self; 6] =
        [Self::EcdsaP256, Self::EcdsaP384, Self::Rsa2048, Self::Rsa3072, Self::Rsa4096, Self::Ed25519];

    /// The name used in configuration files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::EcdsaP384 => "ecdsa-p384",
            Self::Rsa2048 => "rsa-2048",
            Self::Rsa3072 => "rsa-3072",
            Self::Rsa4096 => "rsa-4096",
            Self::Ed25519 => "ed25519",
        }
    }

    /// The algorithm with this number in the C ABI.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| *algorithm as i32 == code)
    }

    /// Whether keys are RSA: the signer then lets a certificate carry the usage "key encipherment".
    pub fn is_rsa(self) -> bool {
        matches!(self, Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096)
    }

    /// The schemes that a key of this algorithm signs with, the preferred one first.
    pub fn schemes(self) -> &'static [SignatureScheme] {
        use SignatureScheme::*;
        match self {
            Self::EcdsaP256 => &[EcdsaP256Sha256],
            Self::EcdsaP384 => &[EcdsaP384Sha384],
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => {
                &[RsaPssSha256, RsaPssSha384, RsaPssSha512, RsaPkcs1Sha256, RsaPkcs1Sha384, RsaPkcs1Sha512]
            }
            Self::Ed25519 => &[Ed25519],
        }
    }

    /// Those of [`schemes`](Self::schemes) that a key must sign with to be of use: the one of a TLS 1.3 handshake (RFC
    /// 8446, section 4.2.3) and the one of a certification request. Devices may lack the others.
    pub fn required_schemes(self) -> &'static [SignatureScheme] {
        match self {
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => {
                &[SignatureScheme::RsaPssSha256, SignatureScheme::RsaPkcs1Sha256]
            }
            Self::EcdsaP256 | Self::EcdsaP384 | Self::Ed25519 => self.schemes(),
        }
    }
}

impl fmt::Display for KeyAlgorithm {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for KeyAlgorithm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|algorithm| algorithm.name()).collect();
            format!("unknown key algorithm {text:?}; one of {}", names.join(", "))
        })
    }
}

/// How a message is hashed and signed. The numbers are those of the C ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(i32)]
pub enum SignatureScheme {
    /// ECDSA on P-256 with SHA-256; the signature is DER.
    EcdsaP256Sha256 = 1,
    /// ECDSA on P-384 with SHA-384; the signature is DER.
    EcdsaP384Sha384 = 2,
    /// RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, section 8.2).
    RsaPkcs1Sha256 = 3,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    RsaPkcs1Sha384 = 4,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    RsaPkcs1Sha512 = 5,
    /// RSASSA-PSS with SHA-256, MGF1 with SHA-256 and a salt of 32 bytes, as TLS 1.3 demands (RFC 8446, section 4.2.3).
    RsaPssSha256 = 6,
    /// RSASSA-PSS with SHA-384 and a salt of 48 bytes.
    RsaPssSha384 = 7,
    /// RSASSA-PSS with SHA-512 and a salt of 64 bytes.
    RsaPssSha512 = 8,
    /// Ed25519 (RFC 8032); the message itself is signed, unhashed.
    Ed25519 = 9,
}

impl SignatureScheme {
    /// Every scheme, in the order of the numbers.
    pub const ALL: [Self; 9] = [
        Self::EcdsaP256Sha256,
        Self::EcdsaP384Sha384,
        Self::RsaPkcs1Sha256,
        Self::RsaPkcs1Sha384,
        Self::RsaPkcs1Sha512,
        Self::RsaPssSha256,
        Self::RsaPssSha384,
        Self::RsaPssSha512,
        Self::Ed25519,
    ];

    /// The scheme with this number in the C ABI.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|scheme| *scheme as i32 == code)
    }

    /// The error for a key of this scheme's algorithm that does not sign with it as X.509 and TLS demand, although it must
    /// ([`KeyAlgorithm::required_schemes`]). `detail` says what the device did instead.
    pub fn not_usable(self, detail: &str) -> BackendError {
        let name = match self {
            Self::RsaPssSha256 | Self::RsaPssSha384 | Self::RsaPssSha512 => {
                "RSASSA-PSS with a salt as long as the digest, without which there is no TLS 1.3"
            }
            Self::RsaPkcs1Sha256 | Self::RsaPkcs1Sha384 | Self::RsaPkcs1Sha512 => "RSASSA-PKCS1-v1_5",
            Self::EcdsaP256Sha256 | Self::EcdsaP384Sha384 => "ECDSA",
            Self::Ed25519 => "Ed25519",
        };
        let detail = format!("the device does not sign with {name}: {detail}");
        BackendError::new(BackendErrorKind::Unsupported, detail).with_hint("set key-algorithm = \"ecdsa-p256\"")
    }

    /// The message digest of this scheme (FIPS 180-4); `None` for Ed25519, which signs the message itself.
    pub fn digest(self, message: &[u8]) -> Option<Vec<u8>> {
        use aws_lc_rs::digest::{SHA256, SHA384, SHA512, digest};
        let algorithm = match self {
            Self::EcdsaP256Sha256 | Self::RsaPkcs1Sha256 | Self::RsaPssSha256 => &SHA256,
            Self::EcdsaP384Sha384 | Self::RsaPkcs1Sha384 | Self::RsaPssSha384 => &SHA384,
            Self::RsaPkcs1Sha512 | Self::RsaPssSha512 => &SHA512,
            Self::Ed25519 => return None,
        };
        Some(digest(algorithm, message).as_ref().to_vec())
    }
}
