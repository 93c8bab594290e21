//! A plugin in Rust that panics wherever it can: the tests' proof that no panic leaves a plugin.

use pintle_plugins_api::abi::DigestSigner;
use pintle_plugins_api::{
    BackendError, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, SignatureScheme, export_backend,
};

struct Panicking;

fn open(configuration: &str) -> Result<Box<dyn DigestSigner>, BackendError> {
    // The plugin has a standard library of its own, so this silences its expected panics only.
    std::panic::set_hook(Box::new(|_| {}));
    assert_ne!(configuration, "open", "panics in open");
    Ok(Box::new(Panicking))
}

export_backend!(open);

impl KeyBackend for Panicking {
    fn generate(&mut self, id: &KeyId, _: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        panic!("no key\n{id}");
    }

    fn public_key(&mut self, _: &KeyId) -> Result<PublicKey, BackendError> {
        let nothing: &[u8] = &[];
        Ok(PublicKey::from_der(&nothing[1..]).expect("never reached"))
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        self.sign_digest(id, scheme, message)
    }

    fn delete(&mut self, _: &KeyId) -> Result<(), BackendError> {
        std::panic::panic_any(7);
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        unreachable!("the list");
    }

    fn reference(&mut self, _: &KeyId) -> Result<KeyReference, BackendError> {
        panic!("no reference");
    }
}

impl DigestSigner for Panicking {
    fn sign_digest(&mut self, _: &KeyId, _: SignatureScheme, _: &[u8]) -> Result<Vec<u8>, BackendError> {
        panic!("no signature");
    }
}

impl Drop for Panicking {
    fn drop(&mut self) {
        panic!("no end");
    }
}
