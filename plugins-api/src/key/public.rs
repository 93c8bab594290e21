//! Public halves of keys.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use x509_parser::oid_registry as oid;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::{KeyAlgorithm, SignatureScheme};

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
    fn garbage_is_no_public_key() {
        assert_eq!(PublicKey::from_der(*b"garbage"), Err(InvalidPublicKey));
        assert_eq!(PublicKey::try_from("zz".to_owned()), Err(InvalidPublicKey));
    }
}
