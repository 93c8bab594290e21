//! What PKCS#11's attributes say of public keys and signatures.

use pintle_plugins_api::{KeyAlgorithm, encoding};

/// The tag of a DER BIT STRING.
const BIT_STRING: u8 = 0x03;
/// The tag of a DER OCTET STRING.
const OCTET_STRING: u8 = 0x04;

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
    let zeros = modulus.iter().take_while(|byte| **byte == 0).count();
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

/// An `ECDSA-Sig-Value` (RFC 3279, section 2.2.3) from r and s, one after the other and equally long, as PKCS#11
/// returns them; `None` if `signature` cannot be that for a curve of `bytes` bytes.
pub(crate) fn ecdsa_signature(signature: &[u8], bytes: usize) -> Option<Vec<u8>> {
    if signature.is_empty() || !signature.len().is_multiple_of(2) || signature.len() > 2 * bytes {
        return None;
    }
    let (r, s) = signature.split_at(signature.len() / 2);
    Some(encoding::ecdsa_signature(r, s))
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
    fn a_signature_is_two_numbers_of_equal_length() {
        let signature = [&[0, 0, 0x80, 1][..], &[0, 0, 0, 0]].concat();
        assert_eq!(ecdsa_signature(&signature, 32), Some(vec![0x30, 8, 2, 3, 0, 0x80, 1, 2, 1, 0]));
        assert_eq!(ecdsa_signature(&[1; 63], 32), None);
        assert_eq!(ecdsa_signature(&[1; 66], 32), None);
    }
}
