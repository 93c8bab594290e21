//! One private key in memory. AWS-LC wipes what it frees, and nothing here has a `Debug`.

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair,
    RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding,
    RsaKeyPair,
};
use zeroize::Zeroizing;

use pintle_plugins_api::{KeyAlgorithm, PublicKey, SignatureScheme};

pub(crate) enum PrivateKey {
    Ecdsa(EcdsaKeyPair),
    Rsa(RsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl PrivateKey {
    /// A new key; `None` if the source of randomness fails.
    pub(crate) fn generate(algorithm: KeyAlgorithm) -> Option<Self> {
        let rsa = |size| RsaKeyPair::generate(size).ok().map(Self::Rsa);
        match algorithm {
            KeyAlgorithm::EcdsaP256 => EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).ok().map(Self::Ecdsa),
            KeyAlgorithm::EcdsaP384 => EcdsaKeyPair::generate(&ECDSA_P384_SHA384_ASN1_SIGNING).ok().map(Self::Ecdsa),
            KeyAlgorithm::Rsa2048 => rsa(KeySize::Rsa2048),
            KeyAlgorithm::Rsa3072 => rsa(KeySize::Rsa3072),
            KeyAlgorithm::Rsa4096 => rsa(KeySize::Rsa4096),
            KeyAlgorithm::Ed25519 => Ed25519KeyPair::generate().ok().map(Self::Ed25519),
        }
    }

    /// The key of a DER PKCS#8 structure (RFC 5958) and its public half; `None` if pintle cannot use it.
    pub(crate) fn from_pkcs8(der: &[u8]) -> Option<(Self, PublicKey)> {
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der)
            .or_else(|_| EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, der))
            .map(Self::Ecdsa)
            .or_else(|_| RsaKeyPair::from_pkcs8(der).map(Self::Rsa))
            .or_else(|_| Ed25519KeyPair::from_pkcs8(der).map(Self::Ed25519))
            .ok()
            .and_then(Self::with_public_key)
    }

    /// As [`from_pkcs8`](Self::from_pkcs8), and also of SEC 1 (RFC 5915) and PKCS#1 (RFC 8017) structures.
    pub(crate) fn from_der(der: &[u8]) -> Option<(Self, PublicKey)> {
        Self::from_pkcs8(der).or_else(|| {
            EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, der)
                .or_else(|_| EcdsaKeyPair::from_private_key_der(&ECDSA_P384_SHA384_ASN1_SIGNING, der))
                .map(Self::Ecdsa)
                .or_else(|_| RsaKeyPair::from_der(der).map(Self::Rsa))
                .ok()
                .and_then(Self::with_public_key)
        })
    }

    /// DER PKCS#8, version 1 for Ed25519 too: OpenSSL 3.0 does not read version 2.
    pub(crate) fn to_pkcs8(&self) -> Option<Zeroizing<Vec<u8>>> {
        match self {
            Self::Ecdsa(pair) => pair.to_pkcs8v1().ok().map(|document| Zeroizing::new(document.as_ref().to_vec())),
            Self::Rsa(pair) => {
                let der: Pkcs8V1Der<'_> = pair.as_der().ok()?;
                Some(Zeroizing::new(der.as_ref().to_vec()))
            }
            Self::Ed25519(pair) => pair.to_pkcs8v1().ok().map(|document| Zeroizing::new(document.as_ref().to_vec())),
        }
    }

    /// A signature as [`KeyBackend::sign`](pintle_plugins_api::KeyBackend::sign) promises it; `None` if AWS-LC fails
    /// or the scheme is for another kind of key.
    pub(crate) fn sign(&self, scheme: SignatureScheme, message: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Ecdsa(pair) => Some(pair.sign(&SystemRandom::new(), message).ok()?.as_ref().to_vec()),
            Self::Ed25519(pair) => Some(pair.try_sign(message).ok()?.as_ref().to_vec()),
            Self::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(rsa_encoding(scheme)?, &SystemRandom::new(), message, &mut signature).ok()?;
                Some(signature)
            }
        }
    }

    fn with_public_key(self) -> Option<(Self, PublicKey)> {
        let der = match &self {
            Self::Ecdsa(pair) => pair.public_key().as_der(),
            Self::Rsa(pair) => pair.public_key().as_der(),
            Self::Ed25519(pair) => pair.public_key().as_der(),
        };
        let public_key = PublicKey::from_der(der.ok()?.as_ref()).ok()?;
        Some((self, public_key))
    }
}

fn rsa_encoding(scheme: SignatureScheme) -> Option<&'static dyn RsaEncoding> {
    match scheme {
        SignatureScheme::RsaPkcs1Sha256 => Some(&RSA_PKCS1_SHA256),
        SignatureScheme::RsaPkcs1Sha384 => Some(&RSA_PKCS1_SHA384),
        SignatureScheme::RsaPkcs1Sha512 => Some(&RSA_PKCS1_SHA512),
        SignatureScheme::RsaPssSha256 => Some(&RSA_PSS_SHA256),
        SignatureScheme::RsaPssSha384 => Some(&RSA_PSS_SHA384),
        SignatureScheme::RsaPssSha512 => Some(&RSA_PSS_SHA512),
        SignatureScheme::EcdsaP256Sha256 | SignatureScheme::EcdsaP384Sha384 | SignatureScheme::Ed25519 => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pkcs8_of_every_algorithm_and_back() {
        for algorithm in KeyAlgorithm::ALL {
            let der = PrivateKey::generate(algorithm).and_then(|key| key.to_pkcs8()).expect("PKCS#8");
            let (key, public_key) = PrivateKey::from_pkcs8(&der).expect("a key");
            assert_eq!(public_key.algorithm(), algorithm);
            assert_eq!(*key.to_pkcs8().expect("PKCS#8"), *der);
            for scheme in algorithm.schemes() {
                let signature = key.sign(*scheme, b"message").expect("a signature");
                assert!(public_key.verifies(*scheme, b"message", &signature), "{scheme:?}");
            }
            for cut in [0, 1, der.len() / 2, der.len() - 1] {
                assert!(PrivateKey::from_der(&der[..cut]).is_none(), "{algorithm} cut at {cut}");
            }
        }
    }
}
