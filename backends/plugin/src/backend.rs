//! A plugin as a key backend. What it answers is checked against what it answered before.

use std::collections::HashMap;
use std::path::PathBuf;

use pintle_plugins_api::abi::{PINTLE_REFERENCE_FILE, PINTLE_REFERENCE_PEM, PINTLE_REFERENCE_URI};
use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, Resource, SignatureScheme,
};

use crate::Trust;
use crate::context::{Context, printable};
use crate::module::load;

/// A key backend in a shared object.
///
/// # Guarantees
/// A public key is one, and the same every time; a signature verifies under it. A plugin that answers anything else
/// is `Corrupt`, and nothing of its answer is used.
#[derive(Debug)]
pub struct PluginBackend {
    context: Context,
    /// The public keys that the plugin has answered, by which its later answers are judged.
    known: HashMap<KeyId, PublicKey>,
}

impl PluginBackend {
    /// Opens an installed plugin: the bare name of a file in `/usr/lib/pintle/plugins` (`lib<name>.so`), or an
    /// absolute path. The configuration is a JSON object, of which only the plugin knows the meaning.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with).
    pub fn open(name: &str, configuration: &str) -> Result<Self, BackendError> {
        Self::open_with(&Trust::default(), name, configuration)
    }

    /// Opens a plugin that is elsewhere, or whose owner is not root.
    ///
    /// # Errors
    /// `Unavailable` if it is not there or cannot be linked, `Corrupt` if others could have written it or its table is
    /// incomplete, `Unsupported` if it speaks another version of the ABI; and whatever the plugin itself answers.
    pub fn open_with(trust: &Trust, name: &str, configuration: &str) -> Result<Self, BackendError> {
        let functions = load(trust, &trust.locate(name)?)?;
        let context = Context::open(name.to_owned(), functions, configuration)?;
        Ok(Self { context, known: HashMap::new() })
    }

    /// Believes a public key if it is one and was the same before.
    fn believe(&mut self, function: &str, id: &KeyId, der: Vec<u8>) -> Result<PublicKey, BackendError> {
        let key = PublicKey::from_der(der)
            .map_err(|invalid| self.context.broken(function, &format!("answered for key {id} what is {invalid}")))?;
        match self.known.get(id) {
            Some(known) if *known != key => {
                Err(self.context.broken(function, &format!("answered another public key for key {id} than before")))
            }
            Some(_) => Ok(key),
            None => {
                self.known.insert(id.clone(), key.clone());
                Ok(key)
            }
        }
    }

    /// Forgets a key that is gone, so that one made anew under the same id is believed.
    fn forget_gone<T>(&mut self, id: &KeyId, result: Result<T, BackendError>) -> Result<T, BackendError> {
        if let Err(BackendError { kind: BackendErrorKind::NotFound | BackendErrorKind::KeyLost, .. }) = &result {
            self.known.remove(id);
        }
        result
    }
}

impl KeyBackend for PluginBackend {
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        let result = self.context.generate(id, algorithm);
        let der = self.forget_gone(id, result)?;
        let key = self.believe("generate", id, der)?;
        if key.algorithm() != algorithm {
            self.known.remove(id);
            let what = format!("answered a key of {} for one of {algorithm}", key.algorithm());
            return Err(self.context.broken("generate", &what));
        }
        // What it cannot sign is found out now, and not when the certificate has been issued.
        for scheme in algorithm.required_schemes() {
            self.sign(id, *scheme, b"pintle self-test").map_err(|error| match error.kind {
                BackendErrorKind::Unsupported => scheme.not_usable(&error.detail),
                _ => error,
            })?;
        }
        Ok(key)
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        let result = self.context.public_key(id);
        let der = self.forget_gone(id, result)?;
        self.believe("public_key", id, der)
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        let key = match self.known.get(id) {
            Some(key) => key.clone(),
            None => self.public_key(id)?,
        };
        if !key.algorithm().schemes().contains(&scheme) {
            let detail = format!("key {id} is of {} and cannot sign with {scheme:?}", key.algorithm());
            return Err(BackendError::new(BackendErrorKind::Unsupported, detail));
        }
        let digest = scheme.digest(message);
        let result = self.context.sign(id, scheme, digest.as_deref().unwrap_or(message));
        let signature = self.forget_gone(id, result)?;
        if !key.verifies(scheme, message, &signature) {
            return Err(self.context.broken("sign", &format!("answered a signature that is not one of key {id}")));
        }
        Ok(signature)
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        self.context.delete(id)?;
        self.known.remove(id);
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        let bytes = self.context.list()?;
        let mut rest = bytes.as_slice();
        let mut ids = Vec::new();
        while let Some((&length, tail)) = rest.split_first() {
            let id = tail.get(..usize::from(length)).and_then(|id| KeyId::new(id).ok());
            ids.push(id.ok_or_else(|| self.context.broken("list", "answered what is no list of key ids"))?);
            rest = &tail[usize::from(length)..];
        }
        Ok(ids)
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        let result = self.context.reference(id);
        let (kind, text) = self.forget_gone(id, result)?;
        reference(kind, text)
            .ok_or_else(|| self.context.broken("reference", &format!("answered nonsense for key {id}")))
    }

    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        let lines = self.context.usage()?;
        resources(&lines).ok_or_else(|| self.context.broken("usage", "answered what is no list of resources"))
    }
}

/// The resources in these lines, if every line is one.
fn resources(lines: &[u8]) -> Option<Vec<Resource>> {
    let resource = |line: &str| {
        let (used, rest) = line.split_once(' ')?;
        let (limit, name) = rest.split_once(' ')?;
        let limit = if limit == "-" { None } else { Some(limit.parse().ok()?) };
        let used = used.parse().ok()?;
        (!name.is_empty() && printable(name) == name).then(|| Resource::new(name, used, limit))
    };
    std::str::from_utf8(lines).ok()?.lines().map(resource).collect()
}

/// The reference of this kind, if the text can be one.
fn reference(kind: i32, text: Vec<u8>) -> Option<KeyReference> {
    let text = String::from_utf8(text).ok()?;
    let one_line = !text.is_empty() && !text.contains(char::is_control);
    match kind {
        PINTLE_REFERENCE_FILE if one_line && text.starts_with('/') => Some(KeyReference::File(PathBuf::from(text))),
        PINTLE_REFERENCE_PEM if text.starts_with("-----BEGIN ") => Some(KeyReference::Pem(text)),
        PINTLE_REFERENCE_URI if one_line && text.contains(':') => Some(KeyReference::Uri(text)),
        _ => None,
    }
}
