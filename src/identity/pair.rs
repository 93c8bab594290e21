//! What a pair is made of, and whether its halves belong together.

use std::io;
use std::path::Path;

use pintle_agent_core::Credential;
use pintle_agent_core::issued::{Leaf, public_key_of};
use pintle_agent_core::pem_block::PemBlocks;
use pintle_agent_core::rotation::PublishError;
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyReference, PublicKey};
use zeroize::Zeroizing;

use super::ports::Ports;
use crate::keys::Keyring;
use crate::store::PairDirectory;
use crate::telemetry::{Event, Telemetry};
use crate::world::Files;

/// More than any private key takes, bytes of PEM.
const LONGEST_KEY: u64 = 64 * 1024;

/// Writes the pair of this credential, makes it the current one, and tells.
pub(super) async fn write_pair(
    ports: &Ports,
    pairs: &PairDirectory,
    telemetry: &Telemetry,
    credential: &Credential,
) -> Result<(), PublishError> {
    let content = pair_content(ports, credential).await?;
    let path = pairs.publish(&content).map_err(|error| PublishError::Disk {
        detail: format!("the pair {} cannot be written: {error}", pairs.current().display()),
        hint: write_hint(pairs),
    })?;
    let (path, serial) = (path.display().to_string(), credential.serial().to_owned());
    telemetry.emit(Event::PairPublished { path, serial });
    Ok(())
}

/// What a person can do where the link to the current pair cannot be written.
pub(super) fn write_hint(pairs: &PairDirectory) -> String {
    let current = pairs.current();
    match pairs.obstacle() {
        Some(_) => format!("move it away: mv {0} {0}.old", current.display()),
        None => "make room on its file system, or make its directory writable".to_owned(),
    }
}

/// What a person can do about a pair that cannot be read.
pub(super) fn read_hint(pairs: &PairDirectory, path: &Path, error: &io::Error) -> String {
    let user = rustix::process::geteuid().as_raw();
    match pairs.owner_of(path) {
        _ if error.kind() != io::ErrorKind::PermissionDenied => "see whether its disk is broken".to_owned(),
        Some(owner) if owner == user => format!("chmod u+r {}", path.display()),
        Some(owner) => format!("run pintle as its owner, user {owner}, or: chown {user} {}", path.display()),
        None => format!("let user {user} enter the directories on the way to {}", path.display()),
    }
}

/// Whether the credential's key is in its backend. One that is gone from there, while a pair on disk holds it, is put back
/// first (case C52).
pub(super) async fn check_or_restore_key(
    keyring: &Keyring,
    pairs: &PairDirectory,
    telemetry: &Telemetry,
    credential: &Credential,
) -> Result<bool, BackendError> {
    match keyring.has(credential.key(), credential.public_key()).await {
        Err(error) if is_lost(&error) && restore_key(keyring, pairs, telemetry, credential).await => Ok(true),
        checked => checked,
    }
}

/// Whether the backend is sure that the key is gone.
pub(super) fn is_lost(error: &BackendError) -> bool {
    matches!(error.kind, BackendErrorKind::NotFound | BackendErrorKind::KeyLost)
}

/// Stores the credential's private key in its backend again, from a pair on disk that holds it; whether that was possible.
pub(super) async fn restore_key(
    keyring: &Keyring,
    pairs: &PairDirectory,
    telemetry: &Telemetry,
    credential: &Credential,
) -> bool {
    let is_its_own = |pair: &str| Leaf::of(pair).is_ok_and(|leaf| leaf.fingerprint == *credential.fingerprint());
    for pair in pairs.pairs().into_iter().flatten().filter(|pair| is_its_own(&pair.content)) {
        let Some(private_key) = private_key_of(&pair.content).filter(|_| leaf_key_of(&pair.content).is_ok()) else {
            continue;
        };
        if keyring.import(credential.key(), private_key).await.is_ok() {
            telemetry.emit(Event::DiskUnusable {
                path: credential.key().to_string(),
                reason: "its backend no longer had it".to_owned(),
                instead: format!("it is stored again from {}, which holds it", pair.path.display()),
            });
            return true;
        }
    }
    false
}

/// The pair as the kubelet has it: the chain, then whatever PEM names or holds the key.
async fn pair_content(ports: &Ports, issued: &Credential) -> Result<Zeroizing<String>, PublishError> {
    let unusable = |detail: String| PublishError::Disk { detail, hint: String::new() };
    let mut content = Zeroizing::new(issued.chain_pem());
    match ports.keyring.reference(issued.key()).await.map_err(PublishError::Backend)? {
        KeyReference::File(path) => {
            let key = key_in_file(ports.files.as_ref(), &path, issued.public_key()).map_err(unusable)?;
            content.push_str(&key);
        }
        KeyReference::Pem(pem) if is_one_key(&pem) => content.push_str(&pem),
        KeyReference::Pem(_) => {
            return Err(unusable(format!("the backend of key {} names it by no PEM of a key", issued.key())));
        }
        // A token's key has no PEM; who can use it names it by its URI.
        KeyReference::Uri(_) => {}
    }
    Ok(content)
}

/// The PEM of the private key in a file, which must be the one with this SubjectPublicKeyInfo. A plugin may name any
/// file, and may have fewer rights than the agent, so neither is anything else published nor is it waited for.
fn key_in_file(files: &dyn Files, path: &Path, subject_public_key_info: &[u8]) -> Result<Zeroizing<String>, String> {
    let failed = |reason: &str| format!("key {} cannot be read: {reason}", path.display());
    let content = files.read_no_follow(path, LONGEST_KEY).map_err(|error| failed(&error.to_string()))?;
    let text = std::str::from_utf8(&content).map_err(|_| failed("it is not text"))?;
    let text = Zeroizing::new(text.to_owned());
    let private_key = private_key_of(&text).filter(|_| is_one_key(&text));
    let public_key = private_key.and_then(|private_key| pintle_backend_file::public_key_of(&private_key));
    if public_key.is_some_and(|public_key| public_key.as_der() == subject_public_key_info) {
        Ok(text)
    } else {
        Err(failed("it does not hold the private key that the certificate is for"))
    }
}

/// Whether this is the PEM of a key and of nothing else.
fn is_one_key(text: &str) -> bool {
    let found = PemBlocks::of(text);
    let one = matches!(&found.blocks[..], [only] if only.label.ends_with("PRIVATE KEY")) && found.damaged.is_none();
    let text = text.trim();
    one && text.starts_with("-----BEGIN ") && text.ends_with("-----")
}

/// The public key of a pair's leaf, if the pair can be used: where it holds a private key, that is the leaf's.
pub(super) fn leaf_key_of(pair: &str) -> Result<PublicKey, String> {
    let leaf = public_key_of(pair).map_err(|rejection| rejection.to_string())?;
    match private_key_of(pair) {
        None if PemBlocks::of(pair).damaged.is_some() => {
            Err("one of its PEM blocks is damaged, and it may have been the private key".to_owned())
        }
        Some(private_key) if pintle_backend_file::public_key_of(&private_key).as_ref() != Some(&leaf) => {
            Err("its private key is not the one that its certificate is for".to_owned())
        }
        _ => Ok(leaf),
    }
}

/// The DER of the first private key in a pair.
pub(super) fn private_key_of(pair: &str) -> Option<Zeroizing<Vec<u8>>> {
    PemBlocks::of(pair).private_key().map(|key| key.content.clone())
}

#[cfg(test)]
mod tests {
    use rustix::fs::Mode;

    use super::*;
    use crate::world::SystemFiles;

    fn key() -> (String, Vec<u8>) {
        let key = rcgen::KeyPair::generate().expect("a key");
        (key.serialize_pem(), rcgen::PublicKeyData::subject_public_key_info(&key))
    }

    #[test]
    fn nothing_but_the_certificates_own_key_is_published() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("key");
        let ((own, public_key), (other, _)) = (key(), key());
        std::fs::write(&file, &own).expect("a file");
        assert_eq!(*key_in_file(&SystemFiles, &file, &public_key).expect("the key"), own);
        for wrong in ["root:*:19000:0:99999:7:::\n", &other, &format!("{own}{other}"), &format!("root:x\n{own}"), ""] {
            std::fs::write(&file, wrong).expect("a file");
            assert!(key_in_file(&SystemFiles, &file, &public_key).is_err(), "{wrong}");
        }
        std::fs::write(&file, own.repeat(1000)).expect("a file");
        assert!(key_in_file(&SystemFiles, &file, &public_key).is_err(), "too long");
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let (own, public_key) = key();
        let (file, link, pipe) =
            (directory.path().join("key"), directory.path().join("link"), directory.path().join("pipe"));
        std::fs::write(&file, &own).expect("a file");
        std::os::unix::fs::symlink(&file, &link).expect("a link");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RUSR | Mode::WUSR).expect("a pipe");
        for path in [&link, &pipe, Path::new("/dev/zero"), directory.path()] {
            assert!(key_in_file(&SystemFiles, path, &public_key).is_err(), "{}", path.display());
        }
    }
}
