//! What is asked of the TPM, and what its answers are in the terms of X.509.

use pintle_plugins_api::{KeyAlgorithm, PublicKey, SignatureScheme, encoding};
use tss_esapi::attributes::{ObjectAttributes, ObjectAttributesBuilder};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::structures::{
    EccPoint, EccScheme, HashScheme, KeyDerivationFunctionScheme, Public, PublicBuilder, PublicEccParametersBuilder,
    PublicKeyRsa, PublicRsaParametersBuilder, RsaExponent, RsaScheme, Signature, SignatureScheme as TpmScheme,
    SymmetricDefinitionObject,
};

/// 65537: what a TPM means by the exponent 0.
const DEFAULT_EXPONENT: u32 = 65537;

/// The owner's storage primary, the parent of all keys.
///
/// It is the storage root key of the TCG's TPM v2.0 Provisioning Guidance, but with an empty `unique` field: so does
/// OpenSSL's tpm2 provider derive the parent of a key file that names the owner hierarchy.
pub(crate) fn storage_primary() -> tss_esapi::Result<Public> {
    let parameters = PublicEccParametersBuilder::new_restricted_decryption_key(
        SymmetricDefinitionObject::AES_128_CFB,
        EccCurve::NistP256,
    )
    .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(held().with_decrypt(true).with_restricted(true).build()?)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

/// A key that signs, and nothing else; `None` for an algorithm that no TPM has.
///
/// Its own scheme is NULL, so that each signature names one: PKCS#1 v1.5 and PSS with the same key.
pub(crate) fn signing_key(algorithm: KeyAlgorithm) -> tss_esapi::Result<Option<Public>> {
    let template = PublicBuilder::new()
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(signing_attributes()?);
    let curve = |curve| {
        // tss-esapi refuses the NULL scheme for what it is told is a signing key; the attributes say that it is one.
        PublicEccParametersBuilder::new()
            .with_ecc_scheme(EccScheme::Null)
            .with_curve(curve)
            .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
            .build()
    };
    let modulus = |bits| {
        PublicRsaParametersBuilder::new()
            .with_scheme(RsaScheme::Null)
            .with_key_bits(bits)
            .with_exponent(RsaExponent::default())
            .with_is_signing_key(true)
            .build()
    };
    let elliptic = template.clone().with_public_algorithm(PublicAlgorithm::Ecc);
    let elliptic = elliptic.with_ecc_unique_identifier(EccPoint::default());
    let rsa = template.with_public_algorithm(PublicAlgorithm::Rsa);
    let rsa = rsa.with_rsa_unique_identifier(PublicKeyRsa::default());
    match algorithm {
        KeyAlgorithm::EcdsaP256 => elliptic.with_ecc_parameters(curve(EccCurve::NistP256)?).build().map(Some),
        KeyAlgorithm::EcdsaP384 => elliptic.with_ecc_parameters(curve(EccCurve::NistP384)?).build().map(Some),
        KeyAlgorithm::Rsa2048 => rsa.with_rsa_parameters(modulus(RsaKeyBits::Rsa2048)?).build().map(Some),
        KeyAlgorithm::Rsa3072 => rsa.with_rsa_parameters(modulus(RsaKeyBits::Rsa3072)?).build().map(Some),
        KeyAlgorithm::Rsa4096 => rsa.with_rsa_parameters(modulus(RsaKeyBits::Rsa4096)?).build().map(Some),
        KeyAlgorithm::Ed25519 => Ok(None),
    }
}

/// What every signing key has, and what is checked of each that a TPM gives out.
pub(crate) fn signing_attributes() -> tss_esapi::Result<ObjectAttributes> {
    held().with_sign_encrypt(true).build()
}

/// Made in this TPM, bound to it and to its parent; used with an empty authorization, which guessing cannot lock.
fn held() -> ObjectAttributesBuilder {
    ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
}

/// How the TPM is asked for this scheme, and how long its digests are in bytes.
pub(crate) fn scheme(scheme: SignatureScheme) -> Option<(TpmScheme, usize)> {
    let sha256 = HashScheme::new(HashingAlgorithm::Sha256);
    let sha384 = HashScheme::new(HashingAlgorithm::Sha384);
    let sha512 = HashScheme::new(HashingAlgorithm::Sha512);
    match scheme {
        SignatureScheme::EcdsaP256Sha256 => Some((TpmScheme::EcDsa { hash_scheme: sha256 }, 32)),
        SignatureScheme::EcdsaP384Sha384 => Some((TpmScheme::EcDsa { hash_scheme: sha384 }, 48)),
        SignatureScheme::RsaPkcs1Sha256 => Some((TpmScheme::RsaSsa { hash_scheme: sha256 }, 32)),
        SignatureScheme::RsaPkcs1Sha384 => Some((TpmScheme::RsaSsa { hash_scheme: sha384 }, 48)),
        SignatureScheme::RsaPkcs1Sha512 => Some((TpmScheme::RsaSsa { hash_scheme: sha512 }, 64)),
        SignatureScheme::RsaPssSha256 => Some((TpmScheme::RsaPss { hash_scheme: sha256 }, 32)),
        SignatureScheme::RsaPssSha384 => Some((TpmScheme::RsaPss { hash_scheme: sha384 }, 48)),
        SignatureScheme::RsaPssSha512 => Some((TpmScheme::RsaPss { hash_scheme: sha512 }, 64)),
        SignatureScheme::Ed25519 => None,
    }
}

/// The public area as a public key; `None` if it is not a key of pintle's kinds.
pub(crate) fn public_key(public: &Public) -> Option<PublicKey> {
    let subject_public_key_info = match public {
        Public::Ecc { parameters, unique, .. } => {
            let (algorithm, length) = match parameters.ecc_curve() {
                EccCurve::NistP256 => (KeyAlgorithm::EcdsaP256, 32),
                EccCurve::NistP384 => (KeyAlgorithm::EcdsaP384, 48),
                _ => return None,
            };
            // An uncompressed point (SEC 1, section 2.3.3).
            let point = [vec![4], padded(unique.x().value(), length)?, padded(unique.y().value(), length)?].concat();
            encoding::point_subject_public_key_info(algorithm, &point)?
        }
        Public::Rsa { parameters, unique, .. } => {
            let exponent = match parameters.exponent().value() {
                0 => DEFAULT_EXPONENT,
                exponent => exponent,
            };
            encoding::rsa_subject_public_key_info(unique.value(), &exponent.to_be_bytes())
        }
        _ => return None,
    };
    PublicKey::from_der(subject_public_key_info).ok()
}

/// The signature as X.509 and TLS encode it; `None` if it is none that was asked for.
pub(crate) fn signature(signature: &Signature, public: &Public) -> Option<Vec<u8>> {
    match (signature, public) {
        (Signature::EcDsa(signature), Public::Ecc { .. }) => {
            let (r, s) = (signature.signature_r().value(), signature.signature_s().value());
            Some(encoding::ecdsa_signature(r, s))
        }
        (Signature::RsaSsa(signature) | Signature::RsaPss(signature), Public::Rsa { unique, .. }) => {
            padded(signature.signature().value(), unique.value().len())
        }
        _ => None,
    }
}

/// A number of this many bytes: a TPM may leave out leading zeros.
fn padded(number: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length.checked_sub(number.len())?];
    bytes.extend_from_slice(number);
    Some(bytes)
}
