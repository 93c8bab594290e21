//! The memory of refused PINs, which outlives the process that held the module.
//!
//! A module remembers in its own process which PIN was refused. When this process is a child that has ended since, the
//! next one would try the same PIN again, and lock the token (case C27). So the agent remembers it too, and keeps it in a
//! file for its own next process and for the commands beside it. The rule is the module's own: the PIN is tried again when
//! its file has changed, and not before; the hint is the one that the module gave. What is kept says nothing of the PIN
//! itself, not even its length.

use std::collections::HashMap;
use std::fs::{DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, Resource, SignatureScheme,
};
use rustix::process::{Gid, Uid};
use serde::{Deserialize, Serialize};

use super::module::{ModuleConfiguration, PinOrigin};
use crate::store::{FileStamp, durable};
use crate::world::{SystemFiles, User, files};

/// The state of a PIN's file as this process sees it or, where it may not, as `user` does, as whom the module runs.
fn stamp_of(path: &Path, user: Option<User>) -> Option<FileStamp> {
    let metadata = match (std::fs::metadata(path), user) {
        (Err(error), Some(user)) if error.kind() == io::ErrorKind::PermissionDenied => metadata_as(user, path),
        (metadata, _) => metadata,
    };
    metadata.ok().map(|found| FileStamp::from(&files::Metadata::from(&found)))
}

/// What `user` sees of a file. Effective ids are a thread's own, so one that ends at once takes them on.
fn metadata_as(user: User, path: &Path) -> io::Result<Metadata> {
    let look = || {
        rustix::thread::set_thread_res_gid(None, Gid::from_raw(user.gid), None)?;
        rustix::thread::set_thread_res_uid(None, Uid::from_raw(user.uid), None)?;
        std::fs::metadata(path)
    };
    std::thread::scope(|scope| scope.spawn(look).join()).unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

/// The state of a module's PIN before a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PinState(PinOrigin, Option<FileStamp>);

impl PinState {
    /// As it is now. It is taken before the call: a file that is replaced meanwhile then counts as another one.
    pub(super) fn now(origin: &PinOrigin, user: Option<User>) -> Self {
        let stamp = match origin {
            PinOrigin::File(path) => stamp_of(path, user),
            PinOrigin::None | PinOrigin::Unknown => None,
        };
        Self(origin.clone(), stamp)
    }
}

/// What was refused to this process, by module. Two backends may be one token.
static REFUSED: LazyLock<Mutex<HashMap<String, (PinState, BackendError)>>> = LazyLock::new(Mutex::default);

/// A refusal as it is kept. A PIN of which only the module knows where it is cannot be: that it has changed would not
/// be seen. Nor is such a module's own configuration for anybody's file.
#[derive(Serialize, Deserialize)]
struct Kept {
    module: ModuleConfiguration,
    pin_file: PathBuf,
    state: FileStamp,
    error: BackendError,
}

/// The PINs that were refused to this process and, where there is a file for it, to those before and beside it.
#[derive(Clone, Debug, Default)]
pub(super) struct RefusedPins {
    file: Option<PathBuf>,
}

impl RefusedPins {
    /// Kept in this file as well; in memory alone where it cannot be written.
    pub(super) fn kept_in(file: PathBuf) -> Self {
        Self { file: Some(file) }
    }

    /// Remembers that `module` was `Locked` with the PIN in this state.
    pub(super) fn remember(&self, module: &ModuleConfiguration, state: PinState, error: &BackendError) {
        if let PinState(PinOrigin::File(pin_file), Some(state)) = &state {
            let (pin_file, state) = (pin_file.clone(), state.clone());
            let refusal = Kept { module: module.clone(), pin_file, state, error: error.clone() };
            self.change(module, Some(refusal));
        }
        if state.0 != PinOrigin::None {
            REFUSED.lock().unwrap_or_else(PoisonError::into_inner).insert(key(module), (state, error.clone()));
        }
    }

    /// Forgets it: the module let somebody in.
    pub(super) fn forget(&self, module: &ModuleConfiguration) {
        REFUSED.lock().unwrap_or_else(PoisonError::into_inner).remove(&key(module));
        if self.kept().iter().any(|kept| kept.module == *module) {
            self.change(module, None);
        }
    }

    /// Whether opening `module` anew, as `user`, would show the same PIN a second time; then the error of the first time.
    pub(super) fn still_refused(&self, module: &ModuleConfiguration, user: Option<User>) -> Option<BackendError> {
        let remembered = REFUSED.lock().unwrap_or_else(PoisonError::into_inner).get(&key(module)).cloned();
        let kept = || {
            let kept = self.kept().into_iter().find(|kept| kept.module == *module)?;
            Some((PinState(PinOrigin::File(kept.pin_file), Some(kept.state)), kept.error))
        };
        let is_current = |(state, _): &(PinState, BackendError)| PinState::now(&state.0, user) == *state;
        let (state, error) = remembered.filter(is_current).or_else(|| kept().filter(is_current))?;
        Some(match &state.0 {
            // The module has said what ends it.
            PinOrigin::File(_) => error,
            PinOrigin::None | PinOrigin::Unknown => {
                error.with_hint("give the module the right PIN, then restart pintle")
            }
        })
    }

    /// What the file holds. One that cannot be read, or that another version wrote, holds nothing.
    fn kept(&self) -> Vec<Kept> {
        let content = self.file.as_ref().and_then(|file| std::fs::read(file).ok());
        content.and_then(|content| serde_json::from_slice(&content).ok()).unwrap_or_default()
    }

    /// Has the file hold this of `module` and nothing else of it.
    fn change(&self, module: &ModuleConfiguration, refusal: Option<Kept>) {
        let Some(file) = &self.file else { return };
        let mut kept = self.kept();
        kept.retain(|kept| kept.module != *module);
        kept.extend(refusal);
        // The state directory need not be there before the first start. Where it cannot be written, there is the memory.
        let _ = DirBuilder::new().recursive(true).mode(0o700).create(durable::directory_of(file));
        let _ = serde_json::to_vec(&kept).map(|content| durable::replace(&SystemFiles, file, &content, 0o600));
    }
}

fn key(module: &ModuleConfiguration) -> String {
    serde_json::to_string(module).unwrap_or_default()
}

/// A module in this process, of which it is remembered that it refused a PIN.
pub(super) struct Remembering {
    pub(super) backend: Box<dyn KeyBackend>,
    pub(super) module: ModuleConfiguration,
    pub(super) refused: RefusedPins,
    /// Whether the module may be one that refused a PIN.
    pub(super) doubtful: bool,
}

impl Remembering {
    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut dyn KeyBackend) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let pin = PinState::now(&self.module.pin(), None);
        let outcome = call(&mut *self.backend);
        match &outcome {
            Err(error) if error.kind == BackendErrorKind::Locked => {
                self.refused.remember(&self.module, pin, error);
                self.doubtful = true;
            }
            Ok(_) if self.doubtful => {
                self.refused.forget(&self.module);
                self.doubtful = false;
            }
            _ => {}
        }
        outcome
    }
}

impl KeyBackend for Remembering {
    fn generate(&mut self, id: &KeyId, algorithm: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        self.call(|backend| backend.generate(id, algorithm))
    }

    fn public_key(&mut self, id: &KeyId) -> Result<PublicKey, BackendError> {
        self.call(|backend| backend.public_key(id))
    }

    fn sign(&mut self, id: &KeyId, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        self.call(|backend| backend.sign(id, scheme, message))
    }

    fn delete(&mut self, id: &KeyId) -> Result<(), BackendError> {
        self.call(|backend| backend.delete(id))
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        self.call(|backend| backend.list())
    }

    fn reference(&mut self, id: &KeyId) -> Result<KeyReference, BackendError> {
        self.call(|backend| backend.reference(id))
    }

    fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        self.call(|backend| backend.usage())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    use rustix::thread::CapabilitySet;

    use super::*;

    fn token(label: &str, pin: &Path) -> ModuleConfiguration {
        ModuleConfiguration::Pkcs11 {
            uri: format!("pkcs11:token={label}"),
            module: Some("/module.so".into()),
            pin_file: Some(pin.to_owned()),
        }
    }

    /// As editors and `mv` do it.
    fn write_anew(path: &Path, pin: &str) {
        let new = path.with_extension("new");
        fs::write(&new, pin).expect("written");
        fs::rename(new, path).expect("renamed");
    }

    fn refused() -> BackendError {
        BackendError::new(BackendErrorKind::Locked, "refused the PIN").with_hint("touch its file")
    }

    #[test]
    fn c27_a_refusal_stands_until_the_pins_file_changes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        fs::write(&path, "0000").expect("written");
        let (module, pins) = (token("refused", &path), RefusedPins::default());
        assert!(pins.still_refused(&module, None).is_none());
        pins.remember(&module, PinState::now(&module.pin(), None), &refused());
        assert_eq!(pins.still_refused(&module, None).expect("refused").detail, refused().detail);
        write_anew(&path, "12345");
        assert!(pins.still_refused(&module, None).is_none());
    }

    #[test]
    fn c27_a_refusal_is_kept_for_the_next_process() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pin");
        fs::write(&path, "931648").expect("written");
        let file = directory.path().join("state/refused-pins.json");
        let (module, pins) = (token("kept", &path), RefusedPins::kept_in(file.clone()));
        let another_process = || REFUSED.lock().expect("no panic").remove(&key(&module));
        pins.remember(&module, PinState::now(&module.pin(), None), &refused());
        another_process();
        let error = pins.still_refused(&module, None).expect("refused");
        assert_eq!(error.hint, refused().hint, "what the module said of its PIN");
        assert!(pins.still_refused(&token("other", &path), None).is_none());
        let content = fs::read_to_string(&file).expect("the file");
        assert!(!content.contains("931648") && !content.contains("size"), "{content}");
        assert_eq!(fs::metadata(&file).expect("the file").permissions().mode() & 0o7777, 0o600);
        write_anew(&path, "1234");
        assert!(pins.still_refused(&module, None).is_none());
        pins.remember(&module, PinState::now(&module.pin(), None), &refused());
        another_process();
        pins.forget(&module);
        assert!(pins.still_refused(&module, None).is_none());
        // Where nothing can be kept there is the memory.
        let pins = RefusedPins::kept_in(path.join("below-a-file"));
        pins.remember(&module, PinState::now(&module.pin(), None), &refused());
        assert!(pins.still_refused(&module, None).is_some());
    }

    #[test]
    fn c27_a_pin_that_only_the_modules_user_can_see_is_seen_to_change() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can look as somebody else");
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("its mode");
        let theirs = directory.path().join("theirs");
        fs::create_dir(&theirs).expect("a directory");
        let path = theirs.join("pin");
        fs::write(&path, "0000").expect("written");
        fs::set_permissions(&theirs, Permissions::from_mode(0o700)).expect("its mode");
        chown(&theirs, Some(65534), None).expect("its owner");
        let (module, pins) = (token("theirs", &path), RefusedPins::default());
        let user = Some(User { uid: 65534, gid: 65534 });
        let without_override = || {
            let mut sets = rustix::thread::capabilities(None).expect("capabilities");
            sets.effective -= CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
            rustix::thread::set_capabilities(None, sets).expect("fewer capabilities");
            assert_eq!(stamp_of(&path, None), None);
            pins.remember(&module, PinState::now(&module.pin(), user), &refused());
            assert!(pins.still_refused(&module, user).is_some());
        };
        std::thread::scope(|scope| scope.spawn(without_override).join()).expect("no panic");
        write_anew(&path, "1234");
        assert!(pins.still_refused(&module, user).is_none());
    }

    #[test]
    fn c27_a_plugin_that_was_refused_is_not_asked_again_and_a_tpm_is() {
        let plugin =
            |pin| ModuleConfiguration::Plugin { library: "refused".to_owned(), configuration: "{}".to_owned(), pin };
        let pins = RefusedPins::default();
        for pin in [true, false] {
            pins.remember(&plugin(pin), PinState::now(&plugin(pin).pin(), None), &refused());
            assert_eq!(pins.still_refused(&plugin(pin), None).is_some(), pin);
        }
    }
}
