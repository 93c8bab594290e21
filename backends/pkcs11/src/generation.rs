//! C_GenerateKeyPair, in the words that a module understands.

use cryptoki::error::Error;
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, ObjectHandle};
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, KeyId};

use crate::encoding;
use crate::fault::{Fault, describe, is_mechanism_missing, is_template_refused};
use crate::objects::label;
use crate::session::LoggedInSession;

/// A new key pair: its public and its private object.
pub(crate) fn generate_pair(
    session: &LoggedInSession,
    id: &KeyId,
    algorithm: KeyAlgorithm,
) -> Result<(ObjectHandle, ObjectHandle), Fault> {
    let (mechanism, kind) = match algorithm {
        KeyAlgorithm::EcdsaP256 | KeyAlgorithm::EcdsaP384 => {
            (Mechanism::EccKeyPairGen, MechanismType::ECC_KEY_PAIR_GEN)
        }
        KeyAlgorithm::Ed25519 => (Mechanism::EccEdwardsKeyPairGen, MechanismType::ECC_EDWARDS_KEY_PAIR_GEN),
        KeyAlgorithm::Rsa2048 | KeyAlgorithm::Rsa3072 | KeyAlgorithm::Rsa4096 => {
            (Mechanism::RsaPkcsKeyPairGen, MechanismType::RSA_PKCS_KEY_PAIR_GEN)
        }
    };
    if let Err(error) = session.pkcs11().get_mechanism_info(session.slot(), kind)
        && is_mechanism_missing(&error)
    {
        let detail = format!("the token generates no {algorithm} keys");
        return Err(BackendError::new(BackendErrorKind::Unsupported, detail).into());
    }
    let mut refusal = None;
    for sizes in sizes(algorithm) {
        // First a key that can do nothing but sign. Some modules refuse to be told what a key is not for.
        for sign_only in [true, false] {
            let (public, private) = templates(id, &sizes, sign_only);
            match session.raw().generate_key_pair(&mechanism, &public, &private) {
                Ok(pair) => return Ok(pair),
                Err(error) if is_template_refused(&error) => refusal = Some(error),
                Err(error) => return Err(Fault::of_writing(error)),
            }
        }
    }
    let error = refusal.unwrap_or(Error::InvalidValue);
    Err(BackendError::new(
        BackendErrorKind::Unsupported,
        format!("the token generates no {algorithm} keys: {}", describe(&error)),
    )
    .into())
}

/// The public template's attributes that say which key is wanted, in each spelling.
fn sizes(algorithm: KeyAlgorithm) -> Vec<Vec<Attribute>> {
    let rsa = |bits: u64| {
        // 65537, as every signer accepts it.
        vec![vec![Attribute::ModulusBits(bits.into()), Attribute::PublicExponent(vec![1, 0, 1])]]
    };
    match algorithm {
        KeyAlgorithm::Rsa2048 => rsa(2048),
        KeyAlgorithm::Rsa3072 => rsa(3072),
        KeyAlgorithm::Rsa4096 => rsa(4096),
        KeyAlgorithm::EcdsaP256 | KeyAlgorithm::EcdsaP384 | KeyAlgorithm::Ed25519 => {
            let spellings = encoding::curve_parameters(algorithm);
            spellings.iter().map(|parameters| vec![Attribute::EcParams(parameters.to_vec())]).collect()
        }
    }
}

fn templates(id: &KeyId, sizes: &[Attribute], sign_only: bool) -> (Vec<Attribute>, Vec<Attribute>) {
    let name = [Attribute::Id(id.as_bytes().to_vec()), Attribute::Label(label(id))];
    let mut public = vec![Attribute::Token(true), Attribute::Private(false), Attribute::Verify(true)];
    public.extend_from_slice(sizes);
    public.extend_from_slice(&name);
    let mut private = vec![
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Sign(true),
    ];
    private.extend_from_slice(&name);
    if sign_only {
        public.extend([Attribute::Encrypt(false), Attribute::Wrap(false)]);
        private.extend([Attribute::Decrypt(false), Attribute::Unwrap(false), Attribute::Derive(false)]);
    }
    (public, private)
}
