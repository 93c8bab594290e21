//! The few DER structures (ITU-T X.690) that stand between PKCS#11's attributes and X.509's.

use pintle_plugins_api::{KeyAlgorithm, SignatureScheme};

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const NULL: [u8; 2] = [0x05, 0x00];

/// The object identifier 1.2.840.10045.2.1, `id-ecPublicKey` (RFC 5480, section 2.1.1), with its tag.
const ID_EC_PUBLIC_KEY: &[u8] = &[0x06, 0x07, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x02, 0x01];
/// The object identifier 1.2.840.113549.1.1.1, `rsaEncryption` (RFC 8017, appendix A.1), with its tag.
const RSA_ENCRYPTION: &[u8] = &[0x06, 0x09, 0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x01];
/// The object identifier 1.3.101.112, `id-Ed25519` (RFC 8410, section 3), with its tag.
const ID_ED25519: &[u8] = &[0x06, 0x03, 0x2B, 0x65, 0x70];
/// The curve's name as a PrintableString, the other spelling of CKA_EC_PARAMS that PKCS#11 v3.0 allows.
const EDWARDS25519: &[u8] = b"\x13\x0Cedwards25519";

/// The values of CKA_EC_PARAMS that name the curve of an algorithm, the usual one first; none for RSA.
pub(crate) fn curve_parameters(algorithm: KeyAlgorithm) -> &'static [&'static [u8]] {
    match algorithm {
        KeyAlgorithm::EcdsaP256 => &[&[0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07]],
        KeyAlgorithm::EcdsaP384 => &[&[0x06, 0x05, 0x2B, 0x81, 0x04, 0x00, 0x22]],
        KeyAlgorithm::Ed25519 => &[ID_ED25519, EDWARDS25519],
        KeyAlgorithm::Rsa2048 | KeyAlgorithm::Rsa3072 | KeyAlgorithm::Rsa4096 => &[],
    }
}

/// The algorithm whose curve CKA_EC_PARAMS names.
pub(crate) fn algorithm_of_curve(parameters: &[u8]) -> Option<KeyAlgorithm> {
    KeyAlgorithm::ALL.into_iter().find(|algorithm| curve_parameters(*algorithm).contains(&parameters))
}

/// The RSA algorithm whose keys have a big-endian modulus of this length.
pub(crate) fn algorithm_of_modulus(modulus: &[u8]) -> Option<KeyAlgorithm> {
    let zeros = modulus.iter().take_while(|octet| **octet == 0).count();
    match modulus.len() - zeros {
        256 => Some(KeyAlgorithm::Rsa2048),
        384 => Some(KeyAlgorithm::Rsa3072),
        512 => Some(KeyAlgorithm::Rsa4096),
        _ => None,
    }
}

/// The point that a CKA_EC_POINT holds: the DER of an OCTET STRING as PKCS#11 demands, or the bare point as some
/// modules have it, or a BIT STRING as others have it for Edwards curves. The lengths tell them apart.
pub(crate) fn point(attribute: &[u8], algorithm: KeyAlgorithm) -> Option<&[u8]> {
    let length: usize = match algorithm {
        KeyAlgorithm::EcdsaP256 => 65,
        KeyAlgorithm::EcdsaP384 => 97,
        KeyAlgorithm::Ed25519 => 32,
        _ => return None,
    };
    match attribute {
        bare if bare.len() == length => Some(bare),
        [OCTET_STRING, stated, content @ ..] if usize::from(*stated) == length && content.len() == length => {
            Some(content)
        }
        [BIT_STRING, stated, 0, content @ ..] if usize::from(*stated) == length + 1 && content.len() == length => {
            Some(content)
        }
        _ => None,
    }
}

/// The SubjectPublicKeyInfo (RFC 5480, RFC 8410) of a point on the curve of `algorithm`; `None` for RSA.
pub(crate) fn point_subject_public_key_info(algorithm: KeyAlgorithm, point: &[u8]) -> Option<Vec<u8>> {
    let parameters = curve_parameters(algorithm).first()?;
    let identifier = match algorithm {
        KeyAlgorithm::Ed25519 => value(SEQUENCE, &[ID_ED25519]),
        _ => value(SEQUENCE, &[ID_EC_PUBLIC_KEY, parameters]),
    };
    Some(value(SEQUENCE, &[&identifier, &value(BIT_STRING, &[&[0], point])]))
}

/// The SubjectPublicKeyInfo (RFC 3279, section 2.3.1) of an RSA key, from its big-endian modulus and exponent.
pub(crate) fn rsa_subject_public_key_info(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    let key = value(SEQUENCE, &[&unsigned_integer(modulus), &unsigned_integer(exponent)]);
    let identifier = value(SEQUENCE, &[RSA_ENCRYPTION, &NULL]);
    value(SEQUENCE, &[&identifier, &value(BIT_STRING, &[&[0], &key])])
}

/// An `ECDSA-Sig-Value` (RFC 3279, section 2.2.3) from r and s, one after the other and equally long, as PKCS#11
/// returns them; `None` if `signature` cannot be that for a curve of `octets` octets.
pub(crate) fn ecdsa_signature(signature: &[u8], octets: usize) -> Option<Vec<u8>> {
    if signature.is_empty() || !signature.len().is_multiple_of(2) || signature.len() > 2 * octets {
        return None;
    }
    let (r, s) = signature.split_at(signature.len() / 2);
    Some(value(SEQUENCE, &[&unsigned_integer(r), &unsigned_integer(s)]))
}

/// The `DigestInfo` (RFC 8017, section 9.2, note 1) of `digest`, for the schemes that have one.
pub(crate) fn digest_info(scheme: SignatureScheme, digest: &[u8]) -> Option<Vec<u8>> {
    // The last octet of 2.16.840.1.101.3.4.2.x, the object identifiers of SHA-2 (RFC 8017, appendix B.1).
    let last = match scheme {
        SignatureScheme::RsaPkcs1Sha256 => 1,
        SignatureScheme::RsaPkcs1Sha384 => 2,
        SignatureScheme::RsaPkcs1Sha512 => 3,
        _ => return None,
    };
    let identifier = [0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, last];
    Some(value(SEQUENCE, &[&value(SEQUENCE, &[&identifier, &NULL]), &value(OCTET_STRING, &[digest])]))
}

/// A tag, a length and the parts of the content.
fn value(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut encoded = vec![tag];
    if length < 0x80 {
        encoded.extend(u8::try_from(length));
    } else {
        let octets = length.to_be_bytes();
        let significant = &octets[octets.iter().take_while(|octet| **octet == 0).count()..];
        encoded.extend(u8::try_from(significant.len()).map(|count| 0x80 | count));
        encoded.extend_from_slice(significant);
    }
    encoded.extend(parts.iter().copied().flatten());
    encoded
}

/// A non-negative INTEGER from big-endian octets.
fn unsigned_integer(octets: &[u8]) -> Vec<u8> {
    let zeros = octets.iter().take_while(|octet| **octet == 0).count();
    let significant = &octets[zeros..];
    match significant.first() {
        Some(first) if *first < 0x80 => value(INTEGER, &[significant]),
        _ => value(INTEGER, &[&[0], significant]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_read_however_the_module_wraps_it() {
        let bare = [vec![4], vec![7; 64]].concat();
        let wrapped = [vec![4, 65], bare.clone()].concat();
        for attribute in [&bare, &wrapped] {
            assert_eq!(point(attribute, KeyAlgorithm::EcdsaP256), Some(&bare[..]));
        }
        assert_eq!(point(&bare[1..], KeyAlgorithm::EcdsaP256), None);
        assert_eq!(point(&wrapped, KeyAlgorithm::EcdsaP384), None);
        let edwards = [vec![3, 33, 0], vec![9; 32]].concat();
        assert_eq!(point(&edwards, KeyAlgorithm::Ed25519), Some(&[9; 32][..]));
    }

    #[test]
    fn integers_of_a_signature_are_minimal_and_positive() {
        let signature = [&[0, 0, 0x80, 1][..], &[0, 0, 0, 0]].concat();
        let expected = vec![0x30, 8, 2, 3, 0, 0x80, 1, 2, 1, 0];
        assert_eq!(ecdsa_signature(&signature, 32), Some(expected));
        assert_eq!(ecdsa_signature(&[1; 63], 32), None);
        assert_eq!(ecdsa_signature(&[1; 66], 32), None);
    }

    #[test]
    fn long_lengths_are_encoded() {
        assert_eq!(value(OCTET_STRING, &[&[0; 127]])[..2], [4, 127]);
        assert_eq!(value(OCTET_STRING, &[&[0; 128]])[..3], [4, 0x81, 128]);
        assert_eq!(value(OCTET_STRING, &[&[0; 256]])[..4], [4, 0x82, 1, 0]);
    }
}
