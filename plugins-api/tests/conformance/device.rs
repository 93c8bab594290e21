//! A device that is honest, or tells one lie.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
use pintle_plugins_api::conformance::{Harness, Situation};
use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, Resource, SignatureScheme,
};

use crate::lie::Lie;

/// A key that was there before the suite.
pub(crate) const OPERATORS_KEY: &[u8] = b"node-1/client/7";

/// A device in memory.
#[derive(Clone)]
pub(crate) struct Device {
    lie: Option<Lie>,
    store: Arc<Mutex<Store>>,
}

/// What is in it, and how it stands.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) keys: BTreeMap<KeyId, Arc<Key>>,
    /// Deleted ones, for the lies that still have them.
    deleted: BTreeMap<KeyId, Arc<Key>>,
    situation: Option<Situation>,
    was_gone: bool,
    lost: BTreeSet<KeyId>,
    pin_attempts: u64,
    open: usize,
}

/// A private key.
pub(crate) enum Key {
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl Key {
    fn new(algorithm: KeyAlgorithm) -> Self {
        match algorithm {
            KeyAlgorithm::EcdsaP256 => {
                Self::Ecdsa(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key"))
            }
            _ => Self::Ed25519(Ed25519KeyPair::generate().expect("a key")),
        }
    }

    fn public_key(&self) -> PublicKey {
        let der = match self {
            Self::Ecdsa(pair) => pair.public_key().as_der(),
            Self::Ed25519(pair) => pair.public_key().as_der(),
        };
        PublicKey::from_der(der.expect("DER").as_ref()).expect("a SubjectPublicKeyInfo")
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        match self {
            Self::Ecdsa(pair) => pair.sign(&SystemRandom::new(), message).expect("a signature").as_ref().to_vec(),
            Self::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
        }
    }
}

impl Device {
    pub(crate) fn new(lie: Option<Lie>) -> Self {
        let device = Self { lie, store: Arc::default() };
        let id = KeyId::new(OPERATORS_KEY).expect("an id");
        device.store().keys.insert(id, Arc::new(Key::new(KeyAlgorithm::EcdsaP256)));
        device
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Harness for Device {
    fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError> {
        let mut store = self.store();
        if self.lie == Some(Lie::OpensOnlyOnce) && store.open > 0 {
            return Err(error(BackendErrorKind::Unavailable));
        }
        if self.lie == Some(Lie::KeysForgottenAtRestart) {
            store.keys.retain(|id, _| id.as_bytes() == OPERATORS_KEY);
        }
        if self.lie == Some(Lie::DeletedKeyComesBackAtRestart) {
            let mut deleted = std::mem::take(&mut store.deleted);
            store.keys.append(&mut deleted);
        }
        store.open += 1;
        let locked = store.situation == Some(Situation::WrongPin);
        store.pin_attempts += 1;
        Ok(Box::new(Opened { device: self.clone(), locked }))
    }

    fn algorithms(&self) -> Vec<KeyAlgorithm> {
        vec![KeyAlgorithm::EcdsaP256, KeyAlgorithm::Ed25519]
    }

    fn arrange(&mut self, situation: Situation) -> bool {
        let mut store = self.store();
        store.situation = Some(situation);
        store.was_gone |= situation == Situation::DeviceGone;
        if situation == Situation::KeysLost {
            let keys = std::mem::take(&mut store.keys);
            store.lost.extend(keys.keys().cloned());
            store.deleted.extend(keys);
        }
        true
    }

    fn restore(&mut self) {
        self.store().situation = None;
    }

    fn pin_attempts(&mut self) -> Option<u64> {
        Some(self.store().pin_attempts)
    }
}

/// The device as one caller has it open.
struct Opened {
    device: Device,
    locked: bool,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.device.store().open -= 1;
    }
}

impl Opened {
    fn lies(&self, lie: Lie) -> bool {
        self.device.lie == Some(lie)
    }

    /// The store, if it can be reached.
    pub(crate) fn store(&self) -> Result<MutexGuard<'_, Store>, BackendError> {
        let mut store = self.device.store();
        if self.locked {
            store.pin_attempts += u64::from(self.lies(Lie::WrongPinIsRetried));
            let kind = if self.lies(Lie::WrongPinIsUnavailable) {
                BackendErrorKind::Unavailable
            } else {
                BackendErrorKind::Locked
            };
            return Err(error(kind));
        }
        if store.situation == Some(Situation::DeviceGone) {
            let kind = if self.lies(Lie::GoneDeviceIsNotFound) {
                BackendErrorKind::NotFound
            } else {
                BackendErrorKind::Unavailable
            };
            return Err(error(kind));
        }
        if store.was_gone && self.lies(Lie::ReturnedDeviceIsLocked) {
            return Err(error(BackendErrorKind::Locked));
        }
        Ok(store)
    }

    /// The id as the device knows it.
    fn stored(&self, store: &Store, id: &KeyId) -> KeyId {
        let octets = id.as_bytes();
        let stored = if self.lies(Lie::IdEndsAtNul) {
            octets.split(|octet| *octet == 0).next().unwrap_or_default().to_vec()
        } else if self.lies(Lie::IdIsText) {
            String::from_utf8_lossy(octets).into_owned().into_bytes()
        } else if self.lies(Lie::IdIsPrefix) {
            let longer = store.keys.keys().find(|other| other.as_bytes().starts_with(octets));
            longer.unwrap_or(id).as_bytes().to_vec()
        } else {
            octets.to_vec()
        };
        KeyId::new(stored).expect("an id")
    }

    fn key(&self, store: &Store, id: &KeyId) -> Result<Arc<Key>, BackendError> {
        if let Some(key) = store.keys.get(&self.stored(store, id)) {
            return Ok(key.clone());
        }
        let lost = store.lost.contains(id);
        Err(match self.device.lie {
            Some(Lie::LostKeyIsCorrupt) if lost => error(BackendErrorKind::Corrupt),
            Some(Lie::AbsentKeyIsCorrupt) => error(BackendErrorKind::Corrupt),
            Some(Lie::ErrorOfManyLines) => BackendError::new(BackendErrorKind::NotFound, "first\nsecond"),
            _ if lost => error(BackendErrorKind::KeyLost),
            _ => error(BackendErrorKind::NotFound),
        })
    }
}

impl KeyBackend for Opened {
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        let mut store = self.store()?;
        let only_ed25519 = self.lies(Lie::OnlyEd25519);
        if algorithm != KeyAlgorithm::Ed25519 && (only_ed25519 || algorithm != KeyAlgorithm::EcdsaP256) {
            return Err(error(if self.lies(Lie::UnknownAlgorithmIsUnavailable) {
                BackendErrorKind::Unavailable
            } else {
                BackendErrorKind::Unsupported
            }));
        }
        let id = self.stored(&store, id);
        if let Some(key) = store.keys.get(&id)
            && !self.lies(Lie::NewKeyAtEachGenerate)
        {
            let public_key = key.public_key();
            return if public_key.algorithm() == algorithm || self.lies(Lie::ConflictIgnored) {
                Ok(public_key)
            } else {
                Err(error(BackendErrorKind::Conflict))
            };
        }
        let again = store.deleted.get(&id).filter(|_| self.lies(Lie::DeletedKeyIsGeneratedAgain));
        let same = store.keys.values().find(|key| key.public_key().algorithm() == algorithm);
        let key = match (again, same) {
            (Some(key), _) => key.clone(),
            (_, Some(key)) if self.lies(Lie::OneKeyForAll) => key.clone(),
            _ if self.lies(Lie::AnotherAlgorithmThanAsked) => Arc::new(Key::new(KeyAlgorithm::EcdsaP256)),
            _ => Arc::new(Key::new(algorithm)),
        };
        let public_key = key.public_key();
        store.keys.insert(id, key);
        Ok(public_key)
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        let store = self.store()?;
        match self.key(&store, id) {
            Err(_) if self.lies(Lie::AbsentKeyHasPublicKey) => Ok(Key::new(KeyAlgorithm::EcdsaP256).public_key()),
            answer => answer.map(|key| key.public_key()),
        }
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        let store = match self.store() {
            Err(_) if self.lies(Lie::GoneDeviceSigns) => return Ok(vec![0; 64]),
            store => store?,
        };
        let mut key = match self.key(&store, id) {
            Err(_) if self.lies(Lie::AbsentKeySigns) => return Ok(vec![0; 64]),
            Err(_) if self.lies(Lie::DeletedKeySignsFromMemory) || self.lies(Lie::LostKeySigns) => {
                store.deleted.get(id).cloned().ok_or_else(|| error(BackendErrorKind::NotFound))?
            }
            key => key?,
        };
        assert!(!(self.lies(Lie::Panics) && scheme == SignatureScheme::Ed25519), "a lie of the test");
        if self.lies(Lie::CallersMixedUp) && store.open > 1 {
            key = store.keys.values().next().expect("a key").clone();
        }
        if !key.public_key().algorithm().schemes().contains(&scheme) && !self.lies(Lie::ForeignSchemeAccepted) {
            return Err(error(BackendErrorKind::Unsupported));
        }
        match self.device.lie {
            Some(Lie::GarbageSignature) => Ok(vec![0; 64]),
            Some(Lie::EmptyMessageRefused) if message.is_empty() => Err(error(BackendErrorKind::Unsupported)),
            Some(Lie::LongMessageCut) => Ok(key.sign(&message[..message.len().min(1 << 16)])),
            _ => Ok(key.sign(message)),
        }
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        let mut store = match self.store() {
            Err(refusal) if self.lies(Lie::GoneDeviceDeletes) && refusal.kind == BackendErrorKind::Unavailable => {
                return Ok(());
            }
            store => store?,
        };
        if self.lies(Lie::DeleteDoesNothing) {
            return Ok(());
        }
        if self.lies(Lie::DeleteTakesAnotherKeyToo) {
            store.keys.remove(&KeyId::new(OPERATORS_KEY).expect("an id"));
        }
        let id = self.stored(&store, id);
        match store.keys.remove(&id) {
            Some(key) => {
                store.deleted.insert(id, key);
            }
            None if self.lies(Lie::DeleteOfAbsentKeyFails) => return Err(error(BackendErrorKind::NotFound)),
            None => {}
        }
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        let store = self.store()?;
        let mut ids: Vec<_> = store.keys.keys().cloned().collect();
        match self.device.lie {
            Some(Lie::ListIsEmpty) => ids.clear(),
            Some(Lie::ListRepeats) => ids.extend(ids.clone()),
            Some(Lie::ListShowsForeignKeys) if store.situation == Some(Situation::ForeignKey) => {
                ids.push(KeyId::new(*b"theirs").expect("an id"));
            }
            _ => {}
        }
        Ok(ids)
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        let store = self.store()?;
        self.key(&store, id)?;
        Ok(match self.device.lie {
            Some(Lie::ReferenceHoldsPrivateKey) => {
                KeyReference::Pem("-----BEGIN PRIVATE KEY-----\nMC4=\n-----END PRIVATE KEY-----\n".to_owned())
            }
            Some(Lie::ReferenceHoldsPin) => KeyReference::Uri("pkcs11:object=key?pin-value=1234".to_owned()),
            Some(Lie::ReferenceToAbsentFile) => KeyReference::File("/nonexistent/key.pem".into()),
            _ => KeyReference::Uri(format!("memory:{id}")),
        })
    }

    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        let used = self.store()?.keys.len() as u64;
        match self.device.lie {
            Some(Lie::UsageFails) => Err(error(BackendErrorKind::Unsupported)),
            Some(Lie::UsageHasNoName) => Ok(vec![Resource::new("", used, None)]),
            Some(Lie::UsageIsBeyondTheLimit) => Ok(vec![Resource::new("keys", used, Some(used - 1))]),
            _ => Ok(vec![Resource::new("keys", used, None)]),
        }
    }
}

fn error(kind: BackendErrorKind) -> BackendError {
    BackendError::new(kind, "by the device in memory")
}
