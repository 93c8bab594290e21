//! How a scheme becomes a mechanism.
//!
//! The message is hashed here, because modules differ in what they hash (SoftHSM has no CKM_ECDSA_SHA256) and all of
//! them sign a digest. A module that refuses to sign bare digests is given the message instead.

use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::ObjectHandle;
use cryptoki::session::Session;
use pintle_plugins_api::encoding as der;
use pintle_plugins_api::{BackendError, BackendErrorKind, SignatureScheme};

use crate::encoding;
use crate::fault::{Fault, is_mechanism_missing};

/// Signs `message` with `key`, in the encoding that [`KeyBackend::sign`](pintle_plugins_api::KeyBackend::sign) says.
pub(crate) fn sign(
    session: &Session,
    key: ObjectHandle,
    scheme: SignatureScheme,
    message: &[u8],
) -> Result<Vec<u8>, Fault> {
    let (mechanism, input) = on_digest(scheme, message);
    let signature = match session.sign(&mechanism, key, &input) {
        Err(error) if is_mechanism_missing(&error) => match on_message(scheme) {
            Some(mechanism) => session.sign(&mechanism, key, message)?,
            None => return Err(error.into()),
        },
        outcome => outcome?,
    };
    let bytes = match scheme {
        SignatureScheme::EcdsaP256Sha256 => 32,
        SignatureScheme::EcdsaP384Sha384 => 48,
        _ => return Ok(signature),
    };
    encoding::ecdsa_signature(&signature, bytes).ok_or_else(|| {
        let detail = format!("an ECDSA signature of {} bytes from the module", signature.len());
        BackendError::new(BackendErrorKind::Corrupt, detail).into()
    })
}

/// The mechanism that signs what is hashed already, and what it is given.
fn on_digest(scheme: SignatureScheme, message: &[u8]) -> (Mechanism<'static>, Vec<u8>) {
    let digest = scheme.digest(message);
    match (pss(scheme), digest) {
        (Some(parameters), Some(digest)) => (Mechanism::RsaPkcsPss(parameters), digest),
        (None, Some(digest)) => match der::digest_info(scheme, &digest) {
            Some(digest_info) => (Mechanism::RsaPkcs, digest_info),
            None => (Mechanism::Ecdsa, digest),
        },
        (_, None) => (Mechanism::Eddsa(EddsaParams::new(EddsaSignatureScheme::Pure)), message.to_vec()),
    }
}

/// The mechanism that hashes as well.
fn on_message(scheme: SignatureScheme) -> Option<Mechanism<'static>> {
    Some(match scheme {
        SignatureScheme::EcdsaP256Sha256 => Mechanism::EcdsaSha256,
        SignatureScheme::EcdsaP384Sha384 => Mechanism::EcdsaSha384,
        SignatureScheme::RsaPkcs1Sha256 => Mechanism::Sha256RsaPkcs,
        SignatureScheme::RsaPkcs1Sha384 => Mechanism::Sha384RsaPkcs,
        SignatureScheme::RsaPkcs1Sha512 => Mechanism::Sha512RsaPkcs,
        SignatureScheme::RsaPssSha256 => Mechanism::Sha256RsaPkcsPss(pss(scheme)?),
        SignatureScheme::RsaPssSha384 => Mechanism::Sha384RsaPkcsPss(pss(scheme)?),
        SignatureScheme::RsaPssSha512 => Mechanism::Sha512RsaPkcsPss(pss(scheme)?),
        SignatureScheme::Ed25519 => return None,
    })
}

/// The parameters of RSASSA-PSS with a salt as long as the digest (RFC 8446, section 4.2.3).
fn pss(scheme: SignatureScheme) -> Option<PkcsPssParams> {
    let (hash_alg, mgf, salt) = match scheme {
        SignatureScheme::RsaPssSha256 => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256, 32),
        SignatureScheme::RsaPssSha384 => (MechanismType::SHA384, PkcsMgfType::MGF1_SHA384, 48),
        SignatureScheme::RsaPssSha512 => (MechanismType::SHA512, PkcsMgfType::MGF1_SHA512, 64),
        _ => return None,
    };
    Some(PkcsPssParams { hash_alg, mgf, s_len: salt.into() })
}
