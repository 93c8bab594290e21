//! How a key is named, what kinds there are, and its public half.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use serde::{Deserialize, Serialize};
use x509_parser::oid_registry as oid;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::{BackendError, BackendErrorKind};

/// The name of a key within its backend: 1 to 128 arbitrary octets, chosen by the agent before the key exists.
///
/// It is what PKCS#11 calls CKA_ID. As text (journals, file names, logs) every octet other than ASCII letters,
/// digits, `-`, `_` and `.` is percent-encoded (RFC 3986, section 2.1), and so is a leading `.`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId(Arc<[u8]>);

/// These octets of a key id stand for themselves as text.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

impl KeyId {
    /// The longest id, in octets. Percent-encoded with a suffix it still fits a file name of 255 octets only when
    /// most of its octets stand for themselves; the agent's own ids do.
    pub const MAXIMUM_LENGTH: usize = 128;

    /// An id of these octets.
    ///
    /// # Errors
    /// If there are none, or more than [`MAXIMUM_LENGTH`](Self::MAXIMUM_LENGTH).
    pub fn new(octets: impl Into<Vec<u8>>) -> Result<Self, InvalidKeyId> {
        let octets = octets.into();
        if octets.is_empty() || octets.len() > Self::MAXIMUM_LENGTH {
            Err(InvalidKeyId)
        } else {
            Ok(Self(octets.into()))
        }
    }

    /// The octets of the id.
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

/// The octets are not a [`KeyId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidKeyId;

impl fmt::Display for InvalidKeyId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a key id has 1 to {} octets", KeyId::MAXIMUM_LENGTH)
    }
}

impl std::error::Error for InvalidKeyId {}

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
    /// RSASSA-PSS with SHA-256, MGF1 with SHA-256 and a salt of 32 octets, as TLS 1.3 demands (RFC 8446, section 4.2.3).
    RsaPssSha256 = 6,
    /// RSASSA-PSS with SHA-384 and a salt of 48 octets.
    RsaPssSha384 = 7,
    /// RSASSA-PSS with SHA-512 and a salt of 64 octets.
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

/// The public half of a key: a DER SubjectPublicKeyInfo (RFC 5280, section 4.1) of a known algorithm.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey {
    subject_public_key_info: Arc<[u8]>,
    algorithm: KeyAlgorithm,
}

impl PublicKey {
    /// Parses a DER SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// If it is not one, has trailing octets, or is of an algorithm other than [`KeyAlgorithm`]'s.
    pub fn from_der(der: impl Into<Vec<u8>>) -> Result<Self, InvalidPublicKey> {
        let subject_public_key_info = der.into();
        let (rest, parsed) = SubjectPublicKeyInfo::from_der(&subject_public_key_info).map_err(|_| InvalidPublicKey)?;
        if !rest.is_empty() {
            return Err(InvalidPublicKey);
        }
        let algorithm = Self::algorithm_of(&parsed)?;
        Ok(Self { subject_public_key_info: subject_public_key_info.into(), algorithm })
    }

    /// The DER SubjectPublicKeyInfo.
    pub fn as_der(&self) -> &[u8] {
        &self.subject_public_key_info
    }

    /// The algorithm of the key.
    pub fn algorithm(&self) -> KeyAlgorithm {
        self.algorithm
    }

    /// The content of the SubjectPublicKeyInfo's BIT STRING: the uncompressed point of an elliptic curve key, the
    /// PKCS#1 `RSAPublicKey` of an RSA key, the 32 octets of an Ed25519 key.
    pub fn subject_public_key(&self) -> Vec<u8> {
        SubjectPublicKeyInfo::from_der(&self.subject_public_key_info)
            .map(|(_, parsed)| parsed.subject_public_key.data.into_owned())
            .unwrap_or_default()
    }

    /// SHA-256 of the DER SubjectPublicKeyInfo, in lower-case hexadecimal.
    pub fn fingerprint(&self) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.subject_public_key_info);
        digest.as_ref().iter().map(|octet| format!("{octet:02x}")).collect()
    }

    /// Whether `signature` over `message` was made with the private half of this key.
    pub fn verifies(&self, scheme: SignatureScheme, message: &[u8], signature: &[u8]) -> bool {
        use aws_lc_rs::signature as verification;
        let algorithm: &dyn verification::VerificationAlgorithm = match scheme {
            SignatureScheme::EcdsaP256Sha256 => &verification::ECDSA_P256_SHA256_ASN1,
            SignatureScheme::EcdsaP384Sha384 => &verification::ECDSA_P384_SHA384_ASN1,
            SignatureScheme::RsaPkcs1Sha256 => &verification::RSA_PKCS1_2048_8192_SHA256,
            SignatureScheme::RsaPkcs1Sha384 => &verification::RSA_PKCS1_2048_8192_SHA384,
            SignatureScheme::RsaPkcs1Sha512 => &verification::RSA_PKCS1_2048_8192_SHA512,
            SignatureScheme::RsaPssSha256 => &verification::RSA_PSS_2048_8192_SHA256,
            SignatureScheme::RsaPssSha384 => &verification::RSA_PSS_2048_8192_SHA384,
            SignatureScheme::RsaPssSha512 => &verification::RSA_PSS_2048_8192_SHA512,
            SignatureScheme::Ed25519 => &verification::ED25519,
        };
        self.algorithm.schemes().contains(&scheme)
            && verification::UnparsedPublicKey::new(algorithm, self.subject_public_key())
                .verify(message, signature)
                .is_ok()
    }

    fn algorithm_of(parsed: &SubjectPublicKeyInfo<'_>) -> Result<KeyAlgorithm, InvalidPublicKey> {
        let identifier = &parsed.algorithm.algorithm;
        if *identifier == oid::OID_KEY_TYPE_EC_PUBLIC_KEY {
            let curve =
                parsed.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok()).ok_or(InvalidPublicKey)?;
            let (algorithm, point) = if curve == oid::OID_EC_P256 {
                (KeyAlgorithm::EcdsaP256, 65)
            } else if curve == oid::OID_NIST_EC_P384 {
                (KeyAlgorithm::EcdsaP384, 97)
            } else {
                return Err(InvalidPublicKey);
            };
            let bits = &parsed.subject_public_key.data;
            if bits.len() == point && bits[0] == 4 { Ok(algorithm) } else { Err(InvalidPublicKey) }
        } else if *identifier == oid::OID_PKCS1_RSAENCRYPTION {
            match parsed.parsed() {
                Ok(x509_parser::public_key::PublicKey::RSA(key)) => match key.key_size() {
                    2048 => Ok(KeyAlgorithm::Rsa2048),
                    3072 => Ok(KeyAlgorithm::Rsa3072),
                    4096 => Ok(KeyAlgorithm::Rsa4096),
                    _ => Err(InvalidPublicKey),
                },
                _ => Err(InvalidPublicKey),
            }
        } else if *identifier == oid::OID_SIG_ED25519 && parsed.subject_public_key.data.len() == 32 {
            Ok(KeyAlgorithm::Ed25519)
        } else {
            Err(InvalidPublicKey)
        }
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PublicKey({} {})", self.algorithm, &self.fingerprint()[..16])
    }
}

impl TryFrom<String> for PublicKey {
    type Error = InvalidPublicKey;

    /// From the hexadecimal DER that journals hold.
    fn try_from(text: String) -> Result<Self, InvalidPublicKey> {
        let octets = text
            .as_bytes()
            .chunks(2)
            .map(|pair| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()))
            .collect::<Option<Vec<u8>>>()
            .ok_or(InvalidPublicKey)?;
        Self::from_der(octets)
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.subject_public_key_info.iter().map(|octet| format!("{octet:02x}")).collect()
    }
}

/// The octets are not a SubjectPublicKeyInfo that pintle can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidPublicKey;

impl fmt::Display for InvalidPublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(
            "not a DER SubjectPublicKeyInfo of an ECDSA P-256 or P-384, RSA 2048, 3072 or 4096, or Ed25519 key",
        )
    }
}

impl std::error::Error for InvalidPublicKey {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_id_survives_text_whatever_its_octets() {
        for octets in [&b"node-1/client/3"[..], b"\0\xff/..%", b".hidden", b"plain"] {
            let id = KeyId::new(octets).expect("a valid id");
            let text = id.to_string();
            assert!(!text.contains('/') && !text.starts_with('.'), "{text}");
            assert_eq!(text.parse(), Ok(id));
        }
        assert_eq!(KeyId::new([]), Err(InvalidKeyId));
        assert_eq!(KeyId::new([0; 129]), Err(InvalidKeyId));
    }

    #[test]
    fn garbage_is_no_public_key() {
        assert_eq!(PublicKey::from_der(*b"garbage"), Err(InvalidPublicKey));
        assert_eq!(PublicKey::try_from("zz".to_owned()), Err(InvalidPublicKey));
    }
}
