//! What a key pair is in a token: a private and a public object with the same CKA_ID and CKA_LABEL.

use std::collections::BTreeSet;

use cryptoki::error::{Error, RvError};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use pintle_plugins_api::encoding as der;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, KeyId, PublicKey};

use crate::encoding;
use crate::fault::{Fault, describe, is_mechanism_missing, return_value};
use crate::generation::generate_pair;
use crate::objects::{PrivateKey, label};
use crate::session::LoggedInSession;
use crate::signature;

/// A key pair in the token, for as long as the session that found it.
pub(crate) struct KeyPair {
    /// The private object.
    private: ObjectHandle,
    /// The public key, from the public object or from what the private one tells.
    pub(crate) public_key: PublicKey,
}

impl KeyPair {
    fn private_key(&self) -> PrivateKey {
        PrivateKey { object: self.private, algorithm: self.public_key.algorithm() }
    }
}

/// What a token holds under a key's id.
enum Search {
    /// Nothing.
    Nothing,
    /// A whole key pair.
    Pair(KeyPair),
    /// A private object, and nothing that tells its public key: the public object was deleted, or the module keeps
    /// none, or a generation was cut short.
    Mute(ObjectHandle),
    /// A public object alone: what a generation or destruction left behind that was cut short.
    Half,
    /// A key that is not this agent's.
    Foreign,
}

/// The key with this id, looked up in the token.
///
/// # Errors
/// `NotFound` if the token certainly holds no such key; `Corrupt` if it holds the private half and does not tell the
/// public one.
pub(crate) fn existing(session: &mut LoggedInSession, id: &KeyId) -> Result<KeyPair, Fault> {
    session.found.remove(id);
    match search(session, id)? {
        Search::Pair(pair) => {
            session.found.insert(id.clone(), pair.private_key());
            Ok(pair)
        }
        Search::Mute(private) if is_complete(session, private)? => Err(public_half_missing(id).into()),
        Search::Nothing | Search::Foreign | Search::Half | Search::Mute(_) => Err(absent(session, id)?),
    }
}

/// The private half of the key with this id, looked up in the token unless this session has seen it already. A
/// signature needs no public object.
///
/// # Errors
/// As [`existing`], and `Corrupt` only if the token does not even tell of which algorithm the key is.
pub(crate) fn private_key(session: &mut LoggedInSession, id: &KeyId) -> Result<PrivateKey, Fault> {
    if let Some(key) = session.found.get(id) {
        return Ok(*key);
    }
    let key = match search(session, id)? {
        Search::Pair(pair) => pair.private_key(),
        Search::Mute(object) if is_complete(session, object)? => {
            let algorithm = algorithm(session, object)?.ok_or_else(|| public_half_missing(id))?;
            PrivateKey { object, algorithm }
        }
        Search::Nothing | Search::Foreign | Search::Half | Search::Mute(_) => return Err(absent(session, id)?),
    };
    session.found.insert(id.clone(), key);
    Ok(key)
}

/// That there is no such key, once that is certain.
fn absent(session: &LoggedInSession, id: &KeyId) -> Result<Fault, Fault> {
    session.confirm_absence()?;
    Ok(BackendError::new(BackendErrorKind::NotFound, format!("the token holds no key {id}")).into())
}

/// The key is not lost, so another one must not be made in its place.
fn public_half_missing(id: &KeyId) -> BackendError {
    corrupt(format!("the token holds the private half of key {id} and does not tell the public one")).with_hint(
        format!(
            "write the certificate's public key (openssl x509 -pubkey) back: pkcs11-tool --write-object --type pubkey \
         --id {} --label 'pintle {id}'; or, if the key is not in use, pintle keys prune",
            id.as_bytes().iter().map(|octet| format!("{octet:02x}")).collect::<String>()
        ),
    )
}

/// The key with this id, or a new one.
pub(crate) fn generate(session: &mut LoggedInSession, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, Fault> {
    session.found.remove(id);
    let conflict = |what: &str| BackendError::new(BackendErrorKind::Conflict, format!("key {id} {what}"));
    match search(session, id)? {
        // Never returned by this function, so in nobody's use: what a call left behind that was cut short.
        Search::Pair(pair) if !is_complete(session, pair.private)? => destroy(session, id)?,
        Search::Pair(pair) if pair.public_key.algorithm() == algorithm => {
            // Perhaps the call that made it was cut short before it got here.
            verify_attributes(session, &pair, id)?;
            self_test(session, &pair)?;
            return Ok(remember(session, id, pair));
        }
        Search::Pair(pair) => {
            return Err(conflict(&format!("exists and is {}", pair.public_key.algorithm())).into());
        }
        Search::Foreign => return Err(conflict("exists in the token and is somebody else's").into()),
        Search::Half | Search::Mute(_) => {
            // Half a pair, or a whole one whose private half cannot be seen just now?
            session.confirm_absence()?;
            destroy(session, id)?;
        }
        Search::Nothing => session.confirm_absence()?,
    }
    let (public, private) = generate_pair(session, id, algorithm)?;
    let outcome = public_key(session, Some(public), Some(private))
        .and_then(|key| match key {
            Some(public_key) if public_key.algorithm() == algorithm => Ok(KeyPair { private, public_key }),
            _ => Err(corrupt("the module generated a key of another algorithm").into()),
        })
        .and_then(|pair| {
            verify_attributes(session, &pair, id)?;
            self_test(session, &pair)?;
            Ok(pair)
        });
    match outcome {
        Ok(pair) => Ok(remember(session, id, pair)),
        Err(Fault::Final(error)) => {
            // A key that is not as it was asked for must not be found by the next call.
            session.raw().destroy_object(private)?;
            session.raw().destroy_object(public)?;
            Err(error.into())
        }
        Err(fault) => Err(fault),
    }
}

/// Destroys both halves of the key, or whatever of it is there.
pub(crate) fn delete(session: &mut LoggedInSession, id: &KeyId) -> Result<(), Fault> {
    session.found.remove(id);
    destroy(session, id)?;
    session.confirm_absence()
}

/// Destroys the objects with this id that are this agent's, as far as they can be seen.
fn destroy(session: &LoggedInSession, id: &KeyId) -> Result<(), Fault> {
    // The private half first: it is the one that must not stay behind.
    for class in [ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY] {
        for object in own(session, id, objects(session, class, id)?)? {
            match session.raw().destroy_object(object) {
                // Somebody was faster.
                Err(error) if return_value(&error) == Some(RvError::ObjectHandleInvalid) => {}
                outcome => outcome.map_err(Fault::of_writing)?,
            }
        }
    }
    // Kryoptic says CKR_OK also when it could not write because another process did.
    for class in [ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY] {
        if !own(session, id, objects(session, class, id)?)?.is_empty() {
            let detail = format!("the token still holds key {id}, which it said it had destroyed");
            return Err(Fault::busy(BackendError::new(BackendErrorKind::Unavailable, detail)));
        }
    }
    Ok(())
}

/// The ids of this agent's keys, halves of pairs included: they are to be pruned too.
pub(crate) fn list(session: &mut LoggedInSession) -> Result<Vec<KeyId>, Fault> {
    let mut ids = BTreeSet::new();
    for class in [ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY] {
        let all = [Attribute::Class(class), Attribute::Token(true)];
        for object in session.raw().find_objects(&all)? {
            let attributes = match session.raw().get_attributes(object, &[AttributeType::Id, AttributeType::Label]) {
                Ok(attributes) => attributes,
                // Another program is still writing it.
                Err(error) if session.raw().find_objects(&all)?.contains(&object) => return Err(Fault::busy(error)),
                // Destroyed by another program since it was found, which each module says in its own way (kryoptic by
                // CKR_GENERAL_ERROR); or the token is gone, which is asked below.
                Err(_) => continue,
            };
            let id = attributes.iter().find_map(|attribute| match attribute {
                Attribute::Id(octets) => KeyId::new(octets.clone()).ok(),
                _ => None,
            });
            ids.extend(id.filter(|id| attributes.contains(&Attribute::Label(label(id)))));
        }
    }
    // A list with gaps would be taken for the truth.
    session.confirm_absence()?;
    Ok(ids.into_iter().collect())
}

fn corrupt(detail: impl Into<String>) -> BackendError {
    BackendError::new(BackendErrorKind::Corrupt, detail)
}

fn remember(session: &mut LoggedInSession, id: &KeyId, pair: KeyPair) -> PublicKey {
    session.found.insert(id.clone(), pair.private_key());
    pair.public_key
}

/// The token's objects of this class with this CKA_ID, whoever made them.
fn objects(session: &LoggedInSession, class: ObjectClass, id: &KeyId) -> Result<Vec<ObjectHandle>, Error> {
    session.raw().find_objects(&[
        Attribute::Class(class),
        Attribute::Token(true),
        Attribute::Id(id.as_bytes().to_vec()),
    ])
}

/// Those of `objects` that carry this agent's label.
fn own(session: &LoggedInSession, id: &KeyId, objects: Vec<ObjectHandle>) -> Result<Vec<ObjectHandle>, Error> {
    let label = Attribute::Label(label(id));
    let mut own = Vec::new();
    for object in objects {
        if session.raw().get_attributes(object, &[AttributeType::Label])?.contains(&label) {
            own.push(object);
        }
    }
    Ok(own)
}

fn search(session: &LoggedInSession, id: &KeyId) -> Result<Search, Fault> {
    let all_private = objects(session, ObjectClass::PRIVATE_KEY, id)?;
    let all_public = objects(session, ObjectClass::PUBLIC_KEY, id)?;
    let anything = !all_private.is_empty() || !all_public.is_empty();
    let private = own(session, id, all_private)?;
    let public = own(session, id, all_public)?;
    match (&private[..], &public[..]) {
        ([], []) if anything => Ok(Search::Foreign),
        ([], []) => Ok(Search::Nothing),
        ([], _) => Ok(Search::Half),
        ([one], [] | [_]) => match public_key(session, public.first().copied(), Some(*one))? {
            Some(public_key) => Ok(Search::Pair(KeyPair { private: *one, public_key })),
            None => Ok(Search::Mute(*one)),
        },
        _ => {
            let detail = format!("{} private and {} public objects have id {id}", private.len(), public.len());
            Err(corrupt(detail).with_hint("two agents must not share an id: delete what is not in use").into())
        }
    }
}

/// The attributes that tell a public key, or of which algorithm a private one is.
const TELLING: [AttributeType; 5] = [
    AttributeType::KeyType,
    AttributeType::EcParams,
    AttributeType::EcPoint,
    AttributeType::Modulus,
    AttributeType::PublicExponent,
];

/// The public key that the objects of a pair tell; `None` if they do not tell it.
fn public_key(
    session: &LoggedInSession,
    public: Option<ObjectHandle>,
    private: Option<ObjectHandle>,
) -> Result<Option<PublicKey>, Fault> {
    // Private objects often tell the public key of an RSA pair, and rarely that of a curve.
    for object in [public, private].into_iter().flatten() {
        let attributes = session.raw().get_attributes(object, &TELLING)?;
        if let Some(der) = subject_public_key_info(&attributes) {
            return decoded(der).map(Some);
        }
    }
    // PKCS #11 v2.40 has an attribute for it, which many modules do not know, or leave empty.
    let Some(private) = private else { return Ok(None) };
    let attributes = session.raw().get_attributes(private, &[AttributeType::PublicKeyInfo])?;
    let told = attributes.into_iter().find_map(|attribute| match attribute {
        Attribute::PublicKeyInfo(der) if !der.is_empty() => Some(der),
        _ => None,
    });
    told.map(decoded).transpose()
}

fn decoded(subject_public_key_info: Vec<u8>) -> Result<PublicKey, Fault> {
    PublicKey::from_der(subject_public_key_info).map_err(|invalid| corrupt(invalid.to_string()).into())
}

/// The algorithm of a private object, as far as it tells that without its public key.
fn algorithm(session: &LoggedInSession, private: ObjectHandle) -> Result<Option<KeyAlgorithm>, Error> {
    let attributes = session.raw().get_attributes(private, &TELLING)?;
    Ok(attributes.iter().find_map(|attribute| match attribute {
        Attribute::EcParams(parameters) => encoding::algorithm_of_curve(parameters),
        Attribute::Modulus(octets) => encoding::algorithm_of_modulus(octets),
        _ => None,
    }))
}

fn subject_public_key_info(attributes: &[Attribute]) -> Option<Vec<u8>> {
    let (mut rsa, mut curve, mut point, mut modulus, mut exponent) = (false, None, None, None, None);
    for attribute in attributes {
        match attribute {
            Attribute::KeyType(kind) => rsa = *kind == KeyType::RSA,
            Attribute::EcParams(parameters) => curve = encoding::algorithm_of_curve(parameters),
            Attribute::EcPoint(octets) => point = Some(octets),
            Attribute::Modulus(octets) if !octets.is_empty() => modulus = Some(octets),
            Attribute::PublicExponent(octets) if !octets.is_empty() => exponent = Some(octets),
            _ => {}
        }
    }
    if rsa {
        return Some(der::rsa_subject_public_key_info(modulus?, exponent?));
    }
    let curve = curve?;
    der::point_subject_public_key_info(curve, encoding::point(point?, curve)?)
}

/// Whether the token has finished generating the key. SoftHSM stores a private object first and its value, with
/// CKA_LOCAL, in a second step, so a process that is killed between the two leaves an object without a key.
fn is_complete(session: &LoggedInSession, private: ObjectHandle) -> Result<bool, Error> {
    Ok(session.raw().get_attributes(private, &[AttributeType::Local])?.contains(&Attribute::Local(true)))
}

/// Reads back what the token says of a private key, and refuses one that could leave the token, or ever could.
fn verify_attributes(session: &LoggedInSession, pair: &KeyPair, id: &KeyId) -> Result<(), Fault> {
    let demanded = [
        (AttributeType::Token, Attribute::Token(true)),
        (AttributeType::Private, Attribute::Private(true)),
        (AttributeType::Sensitive, Attribute::Sensitive(true)),
        (AttributeType::AlwaysSensitive, Attribute::AlwaysSensitive(true)),
        (AttributeType::Extractable, Attribute::Extractable(false)),
        (AttributeType::NeverExtractable, Attribute::NeverExtractable(true)),
        // Generated in the token, not imported.
        (AttributeType::Local, Attribute::Local(true)),
        (AttributeType::Sign, Attribute::Sign(true)),
        (AttributeType::Id, Attribute::Id(id.as_bytes().to_vec())),
        (AttributeType::Label, Attribute::Label(label(id))),
    ];
    let kinds: Vec<AttributeType> = demanded.iter().map(|(kind, _)| *kind).collect();
    let actual = session.raw().get_attributes(pair.private, &kinds)?;
    for (kind, attribute) in demanded {
        if !actual.contains(&attribute) {
            let detail = format!("key {id} is not as it must be in the token: {kind} is otherwise");
            return Err(BackendError::new(BackendErrorKind::Unsupported, detail)
                .with_hint("a key that could leave its token is not used: delete it if it is not pintle's own, or use another token")
                .into());
        }
    }
    Ok(())
}

/// Signs with the key in each way that it will have to, and verifies that under its public half: a device that cannot is
/// found out now, and not when the certificate has been issued.
fn self_test(session: &LoggedInSession, pair: &KeyPair) -> Result<(), Fault> {
    const MESSAGE: &[u8] = b"pintle self-test";
    let algorithm = pair.public_key.algorithm();
    for scheme in algorithm.required_schemes() {
        match signature::sign(session.raw(), pair.private, *scheme, MESSAGE) {
            Ok(signature) if pair.public_key.verifies(*scheme, MESSAGE, &signature) => {}
            // Modules that reach a TPM may use the longest salt that fits, whatever they are asked for.
            Ok(_) if algorithm.is_rsa() => return Err(scheme.not_usable("its signature does not verify").into()),
            Ok(_) => {
                let detail = format!("a signature that the token made with {scheme:?} does not verify");
                return Err(corrupt(detail).into());
            }
            Err(Fault::Device(error)) if is_mechanism_missing(&error) => {
                return Err(scheme.not_usable(&describe(&error)).into());
            }
            Err(fault) => return Err(fault),
        }
    }
    Ok(())
}
