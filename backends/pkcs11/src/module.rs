//! Loading a module once in a process, and initialising it anew when its token went away.
//!
//! C_Initialize and C_Finalize are per process (PKCS #11 v3.1, section 5.4), so everything in this process that uses
//! one module shares one [`Module`]. Some modules look for tokens only when they are initialised (SoftHSM does), so a
//! token that comes back is seen only after C_Finalize and C_Initialize. Calls hold the module shared; a new
//! initialisation holds it exclusively, and happens only when no call is running.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, TryLockError};
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::RvError;
use pintle_plugins_api::{BackendError, BackendErrorKind};

use crate::fault::{describe, return_value};
use crate::misconfigured;

/// The modules of this process, by canonical path. They stay: unloading somebody's library is asking for trouble.
static MODULES: Mutex<BTreeMap<PathBuf, Arc<Module>>> = Mutex::new(BTreeMap::new());

/// A module that is loaded.
pub(crate) struct Module {
    path: PathBuf,
    state: RwLock<Initialization>,
}

/// A module's present initialisation.
pub(crate) struct Initialization {
    pkcs11: Pkcs11,
    /// Why the last C_Initialize did not succeed, if it did not.
    failure: Option<BackendError>,
    /// Whether it is ours to finalize: not if somebody else in this process initialised the module first.
    ours: bool,
    generation: u64,
    reloaded: Option<Instant>,
}

impl Module {
    /// The module at `path`, loaded and initialised now if this process has not done so before.
    ///
    /// # Errors
    /// `Unavailable` if there is no such file or it does not initialise; `Unsupported` if it is not a module, or
    /// somebody other than root or this process's user could replace it.
    pub(crate) fn load(path: &Path) -> Result<Arc<Self>, BackendError> {
        let path = trusted(path)?;
        let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&path) {
            return Ok(Arc::clone(module));
        }
        let pkcs11 = Pkcs11::new(&path).map_err(|error| {
            misconfigured(format!("{} is not a PKCS#11 module: {}", path.display(), describe(&error)))
        })?;
        let ours = initialize(&pkcs11, &path)?;
        let state = Initialization { pkcs11, failure: None, ours, generation: 0, reloaded: None };
        let module = Arc::new(Self { path: path.clone(), state: RwLock::new(state) });
        modules.insert(path, Arc::clone(&module));
        Ok(module)
    }

    /// The module for one call: it is not finalized while this is held.
    pub(crate) fn hold(&self) -> Result<RwLockReadGuard<'_, Initialization>, BackendError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match &state.failure {
            None => Ok(state),
            Some(failure) => Err(failure.clone()),
        }
    }

    /// Initialises the module anew, unless that was done less than `interval` ago, or another thread is in a call, or
    /// somebody else initialised it. Returns whether there is a new initialisation.
    pub(crate) fn reload(&self, interval: Duration) -> bool {
        let mut state = match self.state.try_write() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        if !state.ours || state.reloaded.is_some_and(|last| last.elapsed() < interval) {
            return false;
        }
        state.reloaded = Some(Instant::now());
        state.generation += 1;
        // It may well fail, on a module that is in trouble; what counts is whether it initialises.
        let _ = state.pkcs11.clone().finalize();
        state.failure = initialize(&state.pkcs11, &self.path).err();
        state.failure.is_none()
    }
}

impl Initialization {
    /// The module's functions.
    pub(crate) fn pkcs11(&self) -> &Pkcs11 {
        &self.pkcs11
    }

    /// Counts initialisations. Handles of an earlier one mean nothing, or something else.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }
}

/// C_Initialize. Returns whether we did it, rather than somebody else before us.
fn initialize(pkcs11: &Pkcs11, path: &Path) -> Result<bool, BackendError> {
    let module = path.display();
    match pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        Ok(()) => Ok(true),
        Err(error) => match return_value(&error) {
            Some(RvError::CryptokiAlreadyInitialized) => Ok(false),
            Some(RvError::CantLock | RvError::NeedToCreateThreads) => {
                let detail =
                    format!("the module {module} cannot be used by a program with threads: {}", describe(&error));
                Err(misconfigured(detail))
            }
            _ => Err(BackendError::new(
                BackendErrorKind::Unavailable,
                format!("the module {module} does not initialise: {}", describe(&error)),
            )
            .with_hint("look at the module's own configuration and log; pintle tries again by itself")),
        },
    }
}

/// That the path of a module says where it is.
pub(crate) fn check_path(path: &Path) -> Result<(), BackendError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(misconfigured(format!("the module's path {} is not absolute", path.display()))
        .with_hint("give its full path, such as /usr/lib/softhsm/libsofthsm2.so"))
}

/// The canonical path, if neither the file nor anything on the way to it can be changed by anybody but root and the
/// user that this process is. Loading a module is running its code.
///
/// # Errors
/// `Unavailable` if there is nothing at `path`; `Unsupported` if it is not to be trusted.
pub(crate) fn trusted(path: &Path) -> Result<PathBuf, BackendError> {
    check_path(path)?;
    let unavailable = |error: std::io::Error| {
        BackendError::new(BackendErrorKind::Unavailable, format!("the module {}: {error}", path.display()))
            .with_hint("install the module's package, or correct the path that the configuration names")
    };
    let canonical = fs::canonicalize(path).map_err(unavailable)?;
    let this_user = rustix::process::geteuid().as_raw();
    for part in canonical.ancestors() {
        let metadata = fs::symlink_metadata(part).map_err(unavailable)?;
        if metadata.uid() != 0 && metadata.uid() != this_user {
            return Err(misconfigured(format!(
                "the module {} is not trusted: {} belongs to user {}",
                path.display(),
                part.display(),
                metadata.uid()
            ))
            .with_hint(format!("chown root {}", part.display())));
        }
        if metadata.mode() & 0o022 != 0 {
            return Err(misconfigured(format!(
                "the module {} is not trusted: {} is writable by others",
                path.display(),
                part.display()
            ))
            // A directory that is everybody's, such as /tmp, must stay so.
            .with_hint(if part.is_dir() && metadata.mode() & 0o1000 != 0 {
                format!("install the module where only root can write, not in {}", part.display())
            } else {
                format!("chmod go-w {}", part.display())
            }));
        }
    }
    if !fs::metadata(&canonical).map_err(unavailable)?.is_file() {
        return Err(misconfigured(format!("the module {} is not a regular file", path.display())));
    }
    Ok(canonical)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_a_module_that_nobody_else_can_replace_is_trusted() {
        let error = trusted(Path::new("module.so")).expect_err("relative");
        assert_eq!(error.kind, BackendErrorKind::Unsupported);
        let error = trusted(Path::new("/nonexistent/module.so")).expect_err("absent");
        assert_eq!(error.kind, BackendErrorKind::Unavailable);
        assert!(trusted(Path::new("/proc/self/exe")).is_ok() || cfg!(not(target_os = "linux")));

        // Below the temporary directory, which everybody can write to.
        let directory = tempfile::tempdir().expect("a directory");
        let module = directory.path().join("module.so");
        fs::write(&module, "").expect("written");
        fs::set_permissions(&module, fs::Permissions::from_mode(0o666)).expect("mode set");
        let error = trusted(&module).expect_err("writable");
        assert_eq!(error.kind, BackendErrorKind::Unsupported);
        assert_eq!(error.hint, Some(format!("chmod go-w {}", module.display())));
        fs::set_permissions(&module, fs::Permissions::from_mode(0o644)).expect("mode set");
        let error = trusted(&module).expect_err("in a writable directory");
        assert!(error.detail.contains("is writable by others"), "{error}");
        assert!(error.hint.is_some_and(|hint| !hint.contains("chmod")), "the temporary directory stays everybody's");
    }

    #[test]
    fn a_library_that_is_no_module_is_named_as_such() {
        let library = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib/aarch64-linux-gnu/libm.so.6", "/lib64/libm.so.6"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.exists())
            .expect("a C library");
        let error = Module::load(library).err().expect("not a module");
        assert_eq!(error.kind, BackendErrorKind::Unsupported);
        assert!(error.detail.contains("is not a PKCS#11 module"), "{error}");
    }
}
