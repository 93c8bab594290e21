//! Encodes public keys and signatures as DER (ITU-T X.690), for devices that return bare numbers and points.

use yasna::models::ObjectIdentifier;
use yasna::{DERWriter, construct_der};

use crate::{KeyAlgorithm, SignatureScheme};

/// `id-ecPublicKey` (RFC 5480, section 2.1.1).
const ID_EC_PUBLIC_KEY: &[u64] = &[1, 2, 840, 10045, 2, 1];
/// `rsaEncryption` (RFC 8017, appendix A.1).
const RSA_ENCRYPTION: &[u64] = &[1, 2, 840, 113_549, 1, 1, 1];
/// `id-Ed25519` (RFC 8410, section 3).
const ID_ED25519: &[u64] = &[1, 3, 101, 112];
/// `secp256r1` (RFC 5480, section 2.1.1.1).
const SECP256R1: &[u64] = &[1, 2, 840, 10045, 3, 1, 7];
/// `secp384r1`.
const SECP384R1: &[u64] = &[1, 3, 132, 0, 34];
/// The common prefix of the SHA-2 object identifiers (RFC 8017, appendix B.1).
const SHA_2: [u64; 8] = [2, 16, 840, 1, 101, 3, 4, 2];

/// The SubjectPublicKeyInfo (RFC 5480, RFC 8410) of a point on the curve of `algorithm`: uncompressed, `04 || x || y`,
/// or the 32 bytes of an Ed25519 key. `None` for RSA.
pub fn point_subject_public_key_info(algorithm: KeyAlgorithm, point: &[u8]) -> Option<Vec<u8>> {
    let identifier: &[&[u64]] = match algorithm {
        KeyAlgorithm::EcdsaP256 => &[ID_EC_PUBLIC_KEY, SECP256R1],
        KeyAlgorithm::EcdsaP384 => &[ID_EC_PUBLIC_KEY, SECP384R1],
        KeyAlgorithm::Ed25519 => &[ID_ED25519],
        KeyAlgorithm::Rsa2048 | KeyAlgorithm::Rsa3072 | KeyAlgorithm::Rsa4096 => return None,
    };
    Some(construct_der(|writer| {
        writer.write_sequence(|writer| {
            writer.next().write_sequence(|writer| identifier.iter().for_each(|oid| write_oid(writer.next(), oid)));
            writer.next().write_bitvec_bytes(point, point.len() * 8);
        });
    }))
}

/// The SubjectPublicKeyInfo (RFC 3279, section 2.3.1) of an RSA key, from its big-endian modulus and exponent.
pub fn rsa_subject_public_key_info(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    let key = integers(modulus, exponent);
    construct_der(|writer| {
        writer.write_sequence(|writer| {
            writer.next().write_sequence(|writer| {
                write_oid(writer.next(), RSA_ENCRYPTION);
                writer.next().write_null();
            });
            writer.next().write_bitvec_bytes(&key, key.len() * 8);
        });
    })
}

/// An `ECDSA-Sig-Value` (RFC 3279, section 2.2.3) from big-endian r and s of any length.
pub fn ecdsa_signature(r: &[u8], s: &[u8]) -> Vec<u8> {
    integers(r, s)
}

/// The `DigestInfo` (RFC 8017, section 9.2, note 1) of `digest`, for the schemes that have one.
pub fn digest_info(scheme: SignatureScheme, digest: &[u8]) -> Option<Vec<u8>> {
    let last = match scheme {
        SignatureScheme::RsaPkcs1Sha256 => 1,
        SignatureScheme::RsaPkcs1Sha384 => 2,
        SignatureScheme::RsaPkcs1Sha512 => 3,
        _ => return None,
    };
    let identifier: Vec<u64> = SHA_2.into_iter().chain([last]).collect();
    Some(construct_der(|writer| {
        writer.write_sequence(|writer| {
            writer.next().write_sequence(|writer| {
                write_oid(writer.next(), &identifier);
                writer.next().write_null();
            });
            writer.next().write_bytes(digest);
        });
    }))
}

/// A SEQUENCE of two non-negative INTEGERs, each given as big-endian bytes.
fn integers(one: &[u8], other: &[u8]) -> Vec<u8> {
    construct_der(|writer| {
        writer.write_sequence(|writer| {
            writer.next().write_bigint_bytes(one, true);
            writer.next().write_bigint_bytes(other, true);
        });
    })
}

fn write_oid(writer: DERWriter<'_>, components: &[u64]) {
    writer.write_oid(&ObjectIdentifier::from_slice(components));
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::digest::{SHA256, digest};
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair,
    };

    use super::*;
    use crate::PublicKey;

    fn public_key(der: Vec<u8>) -> PublicKey {
        PublicKey::from_der(der).expect("a public key")
    }

    #[test]
    fn points_are_encoded_as_public_keys() {
        let curves = [
            (KeyAlgorithm::EcdsaP256, SignatureScheme::EcdsaP256Sha256, &ECDSA_P256_SHA256_ASN1_SIGNING),
            (KeyAlgorithm::EcdsaP384, SignatureScheme::EcdsaP384Sha384, &ECDSA_P384_SHA384_ASN1_SIGNING),
        ];
        for (algorithm, scheme, signing) in curves {
            let pair = EcdsaKeyPair::generate(signing).expect("a key");
            let point = pair.public_key().as_ref();
            let key = public_key(point_subject_public_key_info(algorithm, point).expect("a curve"));
            assert_eq!((key.algorithm(), &*key.subject_public_key()), (algorithm, point));
            let signature = pair.sign(&SystemRandom::new(), b"message").expect("a signature");
            assert!(key.verifies(scheme, b"message", signature.as_ref()));
        }
        let pair = Ed25519KeyPair::generate().expect("a key");
        let point = pair.public_key().as_ref();
        let key = public_key(point_subject_public_key_info(KeyAlgorithm::Ed25519, point).expect("a curve"));
        assert!(key.verifies(SignatureScheme::Ed25519, b"message", pair.sign(b"message").as_ref()));
        assert_eq!(point_subject_public_key_info(KeyAlgorithm::Rsa2048, point), None);
    }

    #[test]
    fn rsa_public_keys_and_digest_infos_are_encoded() {
        let pair = aws_lc_rs::rsa::KeyPair::generate(KeySize::Rsa2048).expect("a key");
        let public = pair.public_key();
        let numbers = (public.modulus().big_endian_without_leading_zero(), public.exponent());
        let der = rsa_subject_public_key_info(numbers.0, numbers.1.big_endian_without_leading_zero());
        let key = public_key(der.clone());
        assert_eq!(key.algorithm(), KeyAlgorithm::Rsa2048);
        assert_eq!(key.subject_public_key(), public.as_ref());
        // Some devices return numbers with leading zeros.
        let padded = [&[0, 0], numbers.0].concat();
        assert_eq!(rsa_subject_public_key_info(&padded, &[0, 1, 0, 1]), der);
        // RFC 8017, section 9.2, note 1.
        let prefix = [0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 5, 0];
        let hash = digest(&SHA256, b"message");
        let info = digest_info(SignatureScheme::RsaPkcs1Sha256, hash.as_ref()).expect("a DigestInfo");
        assert_eq!(info, [&prefix[..], &[0x04, 0x20], hash.as_ref()].concat());
        assert_eq!(digest_info(SignatureScheme::RsaPssSha256, hash.as_ref()), None);
    }

    #[test]
    fn integers_of_a_signature_are_minimal_and_positive() {
        assert_eq!(ecdsa_signature(&[0, 0, 0x80, 1], &[0, 0, 0, 0]), [0x30, 8, 2, 3, 0, 0x80, 1, 2, 1, 0]);
        assert_eq!(ecdsa_signature(&[0x7f], &[]), [0x30, 6, 2, 1, 0x7f, 2, 1, 0]);
    }
}
