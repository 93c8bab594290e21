//! Devices that hold keys: slow, hung, lost, locked, cleared, and shared by several nodes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyImport, KeyReference, PublicKey,
    SignatureScheme,
};

/// The beginning of an Ed25519 SubjectPublicKeyInfo (RFC 8410, section 4); the 32 bytes of the key follow.
const PUBLIC_KEY: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// The beginning of an Ed25519 PKCS#8 private key (RFC 8410, section 7); the 32 bytes of the seed follow.
const PRIVATE_KEY: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// What a device does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Condition {
    #[default]
    Works,
    /// Answers after this time.
    Slow(Duration),
    /// Answers no call.
    Hangs,
    /// Answers everything with this error.
    Fails(BackendErrorKind),
    /// Does everything, and destroys nothing.
    DestroysNothing,
}

/// A key in a device.
pub(super) struct Key {
    seed: [u8; 32],
    pub(super) public_key: PublicKey,
    /// The node that made it; `None` for somebody else's.
    pub(super) maker: Option<usize>,
}

/// One device.
pub(super) struct Device {
    pub(super) condition: Condition,
    pub(super) keys: BTreeMap<KeyId, Key>,
    /// Whether a key's bytes can be published in a pair, as a file's can.
    exportable: bool,
    made: u64,
    number: u64,
    /// Keys that were destroyed by a call, and by which node; emptied by the one who checks them.
    pub(super) destroyed: Vec<(KeyId, Key, usize)>,
}

impl Device {
    pub(super) fn new(number: u64, exportable: bool) -> Self {
        Self { condition: Condition::Works, keys: BTreeMap::new(), exportable, made: 0, number, destroyed: Vec::new() }
    }

    /// A new key of this maker under this id.
    pub(super) fn make(&mut self, id: KeyId, maker: Option<usize>) -> PublicKey {
        self.made += 1;
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.number.to_be_bytes());
        seed[8..16].copy_from_slice(&self.made.to_be_bytes());
        self.keep(id, seed, maker)
    }

    fn keep(&mut self, id: KeyId, seed: [u8; 32], maker: Option<usize>) -> PublicKey {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).expect("any 32 bytes are a seed");
        let public_key = [&PUBLIC_KEY, pair.public_key().as_ref()].concat();
        let public_key = PublicKey::from_der(public_key).expect("an Ed25519 key");
        self.keys.insert(id, Key { seed, public_key: public_key.clone(), maker });
        public_key
    }
}

/// A device as one node reaches it.
#[derive(Clone)]
pub(super) struct NodeDevice {
    pub(super) device: Arc<Mutex<Device>>,
    pub(super) node: usize,
}

impl NodeDevice {
    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn condition(&self) -> Condition {
        self.device().condition
    }

    /// The device, if it answers properly.
    fn answering(&self) -> Result<MutexGuard<'_, Device>, BackendError> {
        let device = self.device();
        match device.condition {
            Condition::Fails(kind) => Err(BackendError::new(kind, "the simulated device says so")),
            _ => Ok(device),
        }
    }
}

fn not_found(id: &KeyId) -> BackendError {
    BackendError::new(BackendErrorKind::NotFound, format!("there is no key {id}"))
}

impl KeyBackend for NodeDevice {
    fn generate(&mut self, id: &KeyId, _: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        let mut device = self.answering()?;
        match device.keys.get(id) {
            // As a backend that cannot tell whose key it is.
            Some(key) if key.maker.is_some() => Ok(key.public_key.clone()),
            Some(_) => Err(BackendError::new(BackendErrorKind::Conflict, format!("another key has the id {id}"))),
            None => Ok(device.make(id.clone(), Some(self.node))),
        }
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        self.answering()?.keys.get(id).map(|key| key.public_key.clone()).ok_or_else(|| not_found(id))
    }

    fn sign(&mut self, id: &KeyId, _: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        let device = self.answering()?;
        let key = device.keys.get(id).ok_or_else(|| not_found(id))?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&key.seed).expect("any 32 bytes are a seed");
        Ok(pair.sign(message).as_ref().to_vec())
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        let node = self.node;
        let mut device = self.answering()?;
        if device.condition == Condition::DestroysNothing {
            return Err(BackendError::new(BackendErrorKind::Unavailable, "the simulated device destroys nothing"));
        }
        if let Some(key) = device.keys.remove(id) {
            device.destroyed.push((id.clone(), key, node));
        }
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        Ok(self.answering()?.keys.keys().cloned().collect())
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        let device = self.answering()?;
        let key = device.keys.get(id).ok_or_else(|| not_found(id))?;
        if device.exportable {
            let private_key = [PRIVATE_KEY.as_slice(), &key.seed].concat();
            Ok(KeyReference::Pem(pem::encode(&pem::Pem::new("PRIVATE KEY", private_key))))
        } else {
            Ok(KeyReference::Uri(format!("pkcs11:id={id}")))
        }
    }
}

impl KeyImport for NodeDevice {
    fn import(&mut self, id: &KeyId, private_key: &[u8]) -> Result<PublicKey, BackendError> {
        let node = self.node;
        let mut device = self.answering()?;
        let seed = private_key.strip_prefix(PRIVATE_KEY.as_slice()).and_then(|seed| seed.try_into().ok());
        let seed = seed.ok_or_else(|| BackendError::new(BackendErrorKind::Unsupported, "not an Ed25519 key"))?;
        Ok(device.keep(id.clone(), seed, Some(node)))
    }
}
