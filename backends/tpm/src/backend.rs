//! The key backend.

use std::collections::HashMap;

use pintle_plugins_api::abi::DigestSigner;
use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, Resource, SignatureScheme,
};
use tss_esapi::Context;
use tss_esapi::constants::tss::{TPM2_RH_NULL, TPM2_ST_HASHCHECK};
use tss_esapi::handles::{KeyHandle, ObjectHandle};
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::structures::{Digest, Public, PublicParameters, Signature};
use tss_esapi::tss2_esys::TPMT_TK_HASHCHECK;
use tss_esapi::utils::TpmsContext;

use crate::Configuration;
use crate::device::{Device, is_busy};
use crate::directory::Directory;
use crate::key_file::KeyFile;
use crate::template;

/// What a new key signs to show that it works.
const SELF_TEST: &[u8] = b"pintle: self-test of a new key";

/// Keys in a TPM.
///
/// # Guarantees
/// A key is generated in the TPM and never leaves it unencrypted (fixedTPM, fixedParent, sensitiveDataOrigin). Before
/// it is used it has made signatures that verify. Nothing is left in the TPM between calls: neither transient objects
/// nor persistent ones.
///
/// # Errors
/// `Unavailable` while the TPM does not answer or others hold its slots, after 4 seconds; `KeyLost` if the key's file
/// is there and the TPM is another one, or was cleared; `Corrupt` if the file is no key's; `Unsupported` for
/// algorithms that this TPM does not have.
pub struct TpmBackend {
    device: Device,
    directory: Directory,
    /// Keys that were loaded before, as the TPM saved them (TPM2_ContextSave): loading one so spares the TPM the
    /// making of the parent, by far the slowest part of a signature. A saved key is encrypted, and the TPM that
    /// restarted or was cleared refuses it.
    saved: HashMap<KeyId, Saved>,
}

struct Saved {
    /// The key's file at that time.
    text: String,
    context: TpmsContext,
}

/// The function that the plugin exports.
pub(crate) fn open(configuration: &str) -> Result<Box<dyn DigestSigner>, BackendError> {
    Ok(Box::new(TpmBackend::open(&Configuration::from_json(configuration)?)?))
}

impl TpmBackend {
    /// Opens the directory of the key files. The TPM itself is connected to when it is needed.
    ///
    /// # Errors
    /// `Unsupported` if the configuration asks for what this backend cannot do; `Unavailable` if the directory cannot
    /// be made or read.
    pub fn open(configuration: &Configuration) -> Result<Self, BackendError> {
        let device = Device::new(configuration.address()?, configuration.tcti.clone());
        Ok(Self {
            device,
            directory: Directory::open(&configuration.directory, configuration.make_directory)?,
            saved: HashMap::new(),
        })
    }

    /// The key's file: its text, what it says, and the key's public half.
    fn read(&self, id: &KeyId) -> Result<(String, KeyFile, PublicKey), BackendError> {
        let text = self.directory.read(id)?;
        let parsed = KeyFile::from_pem(&text).and_then(|file| {
            let public_key = template::public_key(&file.public)?;
            Some((file, public_key))
        });
        let Some((file, public_key)) = parsed else {
            let path = self.directory.path(id)?;
            let detail = format!("{} is no TSS2 PRIVATE KEY of pintle's", path.display());
            return Err(BackendError::new(BackendErrorKind::Corrupt, detail)
                .with_hint("restore the file, or remove it and enrol again"));
        };
        Ok((text, file, public_key))
    }

    /// Loads the key, runs `operation` with it and flushes it.
    fn with_key<T>(
        &mut self,
        id: &KeyId,
        text: &str,
        file: &KeyFile,
        doing: &str,
        mut operation: impl FnMut(&mut Context, KeyHandle) -> tss_esapi::Result<T>,
    ) -> Result<T, BackendError> {
        let mut saved = self.saved.remove(id).filter(|saved| saved.text == text);
        let mut loading = false;
        let result = self.device.run(|context| {
            loading = false;
            let key = match restore(context, &mut saved)? {
                Some(key) => key,
                None => {
                    let parent = storage_primary(context)?;
                    loading = true;
                    let key = context.execute_with_temporary_object(parent, |context, parent| {
                        context.load(parent.into(), file.private.clone(), file.public.clone())
                    })?;
                    loading = false;
                    // Only speed is lost without it.
                    saved =
                        context.context_save(key.into()).ok().map(|context| Saved { text: text.to_owned(), context });
                    key.into()
                }
            };
            context.execute_with_temporary_object(key, |context, key| operation(context, key.into()))
        });
        let failure = match result {
            Ok(result) => {
                self.saved.extend(saved.map(|saved| (id.clone(), saved)));
                return Ok(result);
            }
            Err(failure) => failure,
        };
        let (lost, answer) = (failure.is_integrity(), failure.is_answer());
        let mut error = failure.into_error(doing);
        if loading && lost {
            error.kind = BackendErrorKind::KeyLost;
            error.hint = Some("the TPM was cleared or replaced since the key was made: enrol again".to_owned());
        } else if loading && answer && error.kind == BackendErrorKind::Unsupported {
            error.kind = BackendErrorKind::Corrupt;
            error.hint = Some(format!("the file of key {id} is damaged: restore it, or remove it and enrol again"));
        }
        Err(error)
    }

    /// Makes a key that works, which is nowhere but in the answer.
    fn create(&mut self, algorithm: KeyAlgorithm) -> Result<KeyFile, BackendError> {
        let unsupported = || {
            BackendError::new(BackendErrorKind::Unsupported, format!("the TPM has no {algorithm} keys"))
                .with_hint("use ecdsa-p256, which every TPM 2.0 has")
        };
        let template = template::signing_key(algorithm).ok().flatten().ok_or_else(unsupported)?;
        let parameters = parameters(&template).ok_or_else(unsupported)?;
        let tested =
            self.device.run(|context| context.execute_without_session(|context| context.test_parms(parameters)));
        match tested {
            Err(failure) if failure.is_unsupported() => return Err(unsupported()),
            tested => tested.map_err(|failure| failure.into_error("testing parameters"))?,
        }
        let created = self.device.run(|context| {
            let parent = storage_primary(context)?;
            context.execute_with_temporary_object(parent, |context, parent| {
                let created = context.create(parent.into(), template.clone(), None, None, None, None)?;
                Ok(KeyFile { public: created.out_public, private: created.out_private })
            })
        });
        created.map_err(|failure| failure.into_error("creating a key"))
    }

    /// Refuses a key whose signatures nobody could use.
    fn self_test(
        &mut self,
        id: &KeyId,
        text: &str,
        file: &KeyFile,
        algorithm: KeyAlgorithm,
    ) -> Result<(), BackendError> {
        let attributes = template::signing_attributes().ok();
        let public_key = template::public_key(&file.public).filter(|key| key.algorithm() == algorithm);
        let Some(public_key) = public_key.filter(|_| Some(file.public.object_attributes()) == attributes) else {
            let detail = format!("the TPM made another key than the {algorithm} one that was asked for");
            return Err(BackendError::new(BackendErrorKind::Corrupt, detail).with_hint("update the TPM's firmware"));
        };
        for scheme in algorithm.required_schemes().iter().copied() {
            let digest = scheme.digest(SELF_TEST).unwrap_or_default();
            let signature = self.sign_with(id, text, file, scheme, &digest)?;
            if !public_key.verifies(scheme, SELF_TEST, &signature) {
                // Known of PSS: some TPMs use the longest salt that fits, and TLS 1.3 demands one as long as the
                // digest (RFC 8446, section 4.2.3).
                return Err(scheme.not_usable("the TPM's signature does not verify"));
            }
        }
        Ok(())
    }

    fn sign_with(
        &mut self,
        id: &KeyId,
        text: &str,
        file: &KeyFile,
        scheme: SignatureScheme,
        digest: &[u8],
    ) -> Result<Vec<u8>, BackendError> {
        let asked = template::scheme(scheme).filter(|(_, length)| *length == digest.len());
        let (Some((tpm_scheme, _)), Ok(digest)) = (asked, Digest::try_from(digest)) else {
            let detail = format!("{} bytes are no digest of {scheme:?}", digest.len());
            return Err(BackendError::new(BackendErrorKind::Corrupt, detail));
        };
        let signed: Signature = self.with_key(id, text, file, "signing", |context, key| {
            // The key is not restricted, so the TPM need not have hashed the message itself.
            let no_ticket =
                TPMT_TK_HASHCHECK { tag: TPM2_ST_HASHCHECK, hierarchy: TPM2_RH_NULL, digest: Default::default() };
            context.sign(key, digest.clone(), tpm_scheme, no_ticket.try_into()?)
        })?;
        template::signature(&signed, &file.public)
            .ok_or_else(|| BackendError::new(BackendErrorKind::Corrupt, "the TPM answered no signature"))
    }
}

impl KeyBackend for TpmBackend {
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        let public_key = match self.public_key(id) {
            Err(error) if error.kind == BackendErrorKind::NotFound => {
                // Too long a name is found before the TPM spends a minute on a key.
                self.directory.path(id)?;
                let file = self.create(algorithm)?;
                let text = file.to_pem().ok_or_else(|| {
                    BackendError::new(BackendErrorKind::Corrupt, "the TPM's answer cannot be written as a key file")
                })?;
                self.self_test(id, &text, &file, algorithm)?;
                self.directory.create(id, &text)?;
                // Another process may have been faster; the file says whose key it is.
                self.read(id)?.2
            }
            existing => existing?,
        };
        if public_key.algorithm() != algorithm {
            let detail = format!("key {id} is of {}, not of {algorithm}", public_key.algorithm());
            return Err(BackendError::new(BackendErrorKind::Conflict, detail));
        }
        Ok(public_key)
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        let (text, file, public_key) = self.read(id)?;
        // The file alone would do, but not say that the TPM was cleared.
        self.with_key(id, &text, &file, "loading a key", |_, _| Ok(()))?;
        Ok(public_key)
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        let digest = scheme.digest(message);
        self.sign_digest(id, scheme, digest.as_deref().unwrap_or(message))
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        self.device.check()?;
        self.saved.remove(id);
        self.directory.remove(id)
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        self.device.check()?;
        self.directory.list()
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        self.read(id).map(|(text, _, _)| KeyReference::Pem(text))
    }

    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        // A key takes nothing of the TPM but while it signs: it is a file.
        let mut resources = vec![Resource::new("files", self.directory.list()?.len() as u64, None)];
        resources.append(&mut self.device.usage()?);
        Ok(resources)
    }
}

impl DigestSigner for TpmBackend {
    fn sign_digest(&mut self, id: &KeyId, scheme: SignatureScheme, digest: &[u8]) -> Result<Vec<u8>, BackendError> {
        let (text, file, public_key) = self.read(id)?;
        if !public_key.algorithm().schemes().contains(&scheme) {
            let detail = format!("key {id} is of {} and does not sign with {scheme:?}", public_key.algorithm());
            return Err(BackendError::new(BackendErrorKind::Unsupported, detail));
        }
        self.sign_with(id, &text, &file, scheme, digest)
    }
}

/// Loads a saved key; `None`, and it is forgotten, if the TPM does not know it any more.
fn restore(context: &mut Context, saved: &mut Option<Saved>) -> tss_esapi::Result<Option<ObjectHandle>> {
    let Some(Saved { context: bytes, .. }) = saved else { return Ok(None) };
    match context.context_load(bytes.clone()) {
        Ok(key) => Ok(Some(key)),
        Err(error) if is_busy(error) => Err(error),
        Err(_) => {
            *saved = None;
            Ok(None)
        }
    }
}

fn storage_primary(context: &mut Context) -> tss_esapi::Result<ObjectHandle> {
    let primary = context.create_primary(Hierarchy::Owner, template::storage_primary()?, None, None, None, None)?;
    Ok(primary.key_handle.into())
}

fn parameters(public: &Public) -> Option<PublicParameters> {
    match public {
        Public::Ecc { parameters, .. } => Some(PublicParameters::Ecc(*parameters)),
        Public::Rsa { parameters, .. } => Some(PublicParameters::Rsa(*parameters)),
        _ => None,
    }
}
