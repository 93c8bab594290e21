//! Private keys as PKCS#8 PEM files in one directory.
//!
//! The file is named by the text of the key's id and ends in `.pem`. A key comes into being by a rename, after its
//! content is on the disk, and the rename is on the disk before [`generate`](KeyBackend::generate) answers: after a
//! crash at any moment there is the whole key or none.
//!
//! - `directory`: everything that touches the file system, with its checks of owner and mode
//! - `private_key`: parsing, generating and signing
//! - `pem`: RFC 7468 without leaving copies in memory

mod directory;
mod pem;
mod private_key;

use std::collections::HashMap;
use std::path::Path;

use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyImport, KeyReference, PublicKey, Resource,
    SignatureScheme,
};

use directory::{Directory, Stamp};
use private_key::PrivateKey;

/// Keeps private keys as files.
///
/// # Guarantees
/// A key file is PKCS#8 PEM (RFC 5958, RFC 7468) with mode 0600, owned by the user that the process runs as; a
/// directory or file that others could read or replace is refused, not repaired. The files are the truth: what is
/// remembered of them in memory is used only while the file is still the same one, and is wiped when it is dropped.
///
/// # Assumptions
/// The directory belongs to pintle. Several processes may use it at once (a lock on the directory, `flock(2)`, keeps
/// two from writing at the same time); files that are not PKCS#8 PEM are nobody's business and are left alone.
///
/// # Errors
/// `Unavailable`, with a hint, for whatever the file system refuses: permissions, a full disk, a missing directory.
/// `Corrupt` for a key file that is empty, torn or holds something else. `Unsupported` for an id that is too long for
/// a file name once it is text (83 odd bytes always fit). Never `Locked` or `KeyLost`.
pub struct FileBackend {
    directory: Directory,
    /// Keys that were read before, each with the state of its file at that time.
    remembered: HashMap<KeyId, Remembered>,
}

struct Remembered {
    stamp: Stamp,
    key: PrivateKey,
    public_key: PublicKey,
}

impl FileBackend {
    /// Opens the directory, or makes it with mode 0700, and removes what a crash may have left in it.
    ///
    /// # Errors
    /// `Unavailable`, with a hint, if the directory cannot be made or read, or belongs to another user, or is
    /// accessible to others.
    pub fn open(directory: &Path) -> Result<Self, BackendError> {
        Ok(Self { directory: Directory::open(directory)?, remembered: HashMap::new() })
    }

    /// The key as its file has it now.
    fn load(&mut self, id: &KeyId) -> Result<&Remembered, BackendError> {
        let stamp = self.directory.stamp(id);
        let fresh = stamp.is_some()
            && self.remembered.get(id).is_some_and(|remembered| Some(&remembered.stamp) == stamp.as_ref());
        if !fresh {
            self.remembered.remove(id);
            let (pem, stamp) = self.directory.read(id)?;
            let key = pem::decode(&pem).and_then(|pkcs8| PrivateKey::from_pkcs8(&pkcs8));
            let Some((key, public_key)) = key else {
                return Err(self.corrupt(id));
            };
            self.remembered.insert(id.clone(), Remembered { stamp, key, public_key });
        }
        self.remembered.get(id).ok_or_else(|| self.corrupt(id))
    }

    /// Writes the key unless the id has one already; answers whichever the file has then.
    fn store(&mut self, id: &KeyId, key: &PrivateKey) -> Result<PublicKey, BackendError> {
        let pkcs8 = key
            .to_pkcs8()
            .ok_or_else(|| BackendError::new(BackendErrorKind::Unsupported, "the key cannot be encoded as PKCS#8"))?;
        self.directory.create(id, pem::encode(&pkcs8).as_bytes())?;
        Ok(self.load(id)?.public_key.clone())
    }

    fn corrupt(&self, id: &KeyId) -> BackendError {
        let path = self.directory.path(id);
        BackendError::new(
            BackendErrorKind::Corrupt,
            format!("{} is not a PKCS#8 PEM private key that pintle can use", path.display()),
        )
        .with_hint("restore the file from a backup, or remove it: the node then enrols with a new key")
    }
}

/// The public half of a DER private key: PKCS#8 (RFC 5958), SEC 1 (RFC 5915) or PKCS#1 (RFC 8017). `None` if it is none
/// that pintle can use.
pub fn public_key_of(private_key: &[u8]) -> Option<PublicKey> {
    PrivateKey::from_der(private_key).map(|(_, public_key)| public_key)
}

impl KeyBackend for FileBackend {
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        let public_key = match self.load(id) {
            Ok(existing) => {
                let public_key = existing.public_key.clone();
                // The process that made it may have ended between the rename and its way to the disk.
                self.directory.synchronize()?;
                public_key
            }
            Err(error) if error.kind == BackendErrorKind::NotFound => {
                // Refused before seconds go into an RSA key.
                self.directory.check_name(id)?;
                let key = PrivateKey::generate(algorithm).ok_or_else(|| {
                    BackendError::new(BackendErrorKind::Unavailable, format!("generating an {algorithm} key failed"))
                })?;
                self.store(id, &key)?
            }
            Err(error) => return Err(error),
        };
        if public_key.algorithm() == algorithm {
            Ok(public_key)
        } else {
            Err(BackendError::new(
                BackendErrorKind::Conflict,
                format!(
                    "{} holds an {} key, not {algorithm}",
                    self.directory.path(id).display(),
                    public_key.algorithm()
                ),
            ))
        }
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        Ok(self.load(id)?.public_key.clone())
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        let remembered = self.load(id)?;
        let algorithm = remembered.public_key.algorithm();
        if !algorithm.schemes().contains(&scheme) {
            return Err(BackendError::new(
                BackendErrorKind::Unsupported,
                format!("an {algorithm} key does not sign with {scheme:?}"),
            ));
        }
        remembered
            .key
            .sign(scheme, message)
            .ok_or_else(|| BackendError::new(BackendErrorKind::Unavailable, format!("signing with {id} failed")))
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        self.remembered.remove(id);
        self.directory.remove(id)
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        self.directory.list()
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        self.load(id)?;
        Ok(KeyReference::File(self.directory.path(id)))
    }

    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        Ok(vec![Resource::new("files", self.list()?.len() as u64, None)])
    }

    fn importer(&mut self) -> Option<&mut dyn KeyImport> {
        Some(self)
    }
}

impl KeyImport for FileBackend {
    fn import(&mut self, id: &KeyId, private_key: &[u8]) -> Result<PublicKey, BackendError> {
        let Some((key, public_key)) = PrivateKey::from_der(private_key) else {
            return Err(BackendError::new(
                BackendErrorKind::Corrupt,
                "what is to be imported is not a PKCS#8, SEC 1 or PKCS#1 private key of an algorithm that pintle uses",
            ));
        };
        let stored = match self.load(id) {
            Err(error) if error.kind == BackendErrorKind::NotFound => self.store(id, &key)?,
            existing => {
                let stored = existing?.public_key.clone();
                self.directory.synchronize()?;
                stored
            }
        };
        if stored == public_key {
            Ok(public_key)
        } else {
            Err(BackendError::new(
                BackendErrorKind::Conflict,
                format!("{} holds another key", self.directory.path(id).display()),
            ))
        }
    }
}
