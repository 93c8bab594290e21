//! Loads a shared object, once and for ever, and checks the table that it answers with.
#![allow(unsafe_code, reason = "this is the host's side of a C ABI; every block says why it is sound")]

use std::collections::HashMap;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use pintle_plugins_api::abi::{
    PINTLE_ABI_MAJOR, PINTLE_ABI_MINOR, PintleBackend, PintleBuffer, PintleBytes, PintleContext, PintleHost,
};
use pintle_plugins_api::{BackendError, BackendErrorKind};
use rustix::fs::fstat;

use crate::Trust;

/// What the host tells every plugin.
static HOST: PintleHost =
    PintleHost { struct_size: size_of::<PintleHost>(), abi_major: PINTLE_ABI_MAJOR, abi_minor: PINTLE_ABI_MINOR };

/// Device and inode number of a file: while a descriptor of it is open, no other file has them.
type FileIdentity = (u64, u64);

/// What was loaded by this process, and what came of it. Nothing is ever unloaded: a module may have started threads
/// or registered destructors, which would run in unmapped memory.
static LOADED: Mutex<Option<HashMap<FileIdentity, Result<Functions, BackendError>>>> = Mutex::new(None);

pub(crate) type Open = unsafe extern "C" fn(PintleBytes, *mut *mut PintleContext, *mut PintleBuffer) -> i32;
pub(crate) type Close = unsafe extern "C" fn(*mut PintleContext);
pub(crate) type Generate = unsafe extern "C" fn(*mut PintleContext, PintleBytes, i32, *mut PintleBuffer) -> i32;
pub(crate) type PublicKeyOf = unsafe extern "C" fn(*mut PintleContext, PintleBytes, *mut PintleBuffer) -> i32;
pub(crate) type Sign =
    unsafe extern "C" fn(*mut PintleContext, PintleBytes, i32, PintleBytes, *mut PintleBuffer) -> i32;
pub(crate) type Delete = unsafe extern "C" fn(*mut PintleContext, PintleBytes) -> i32;
pub(crate) type List = unsafe extern "C" fn(*mut PintleContext, *mut PintleBuffer) -> i32;
pub(crate) type Reference = unsafe extern "C" fn(*mut PintleContext, PintleBytes, *mut i32, *mut PintleBuffer) -> i32;
pub(crate) type LastError = unsafe extern "C" fn(*mut PintleContext, *mut PintleBuffer) -> i32;
pub(crate) type Usage = unsafe extern "C" fn(*mut PintleContext, *mut PintleBuffer) -> i32;

/// How long the table was at version 1.0.
const LEAST_SIZE: usize = offset_of!(PintleBackend, last_error) + size_of::<Option<LastError>>();

/// The functions of a plugin, none of which is missing that every plugin must have. The plugin stays loaded, so they are valid for ever.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Functions {
    pub(crate) open: Open,
    pub(crate) close: Close,
    pub(crate) generate: Generate,
    pub(crate) public_key: PublicKeyOf,
    pub(crate) sign: Sign,
    pub(crate) delete_key: Delete,
    pub(crate) list: List,
    pub(crate) reference: Reference,
    pub(crate) last_error: LastError,
    pub(crate) usage: Option<Usage>,
}

/// Loads the plugin at `path`, or finds it loaded.
///
/// # Errors
/// As [`Trust::open`]; `Unavailable` if the dynamic linker cannot load it (a library that it needs may yet be
/// installed), `Unsupported` if it speaks another version of the ABI, `Corrupt` if its table is incomplete.
pub(crate) fn load(trust: &Trust, path: &Path) -> Result<Functions, BackendError> {
    let file = trust.open(path)?;
    let status = fstat(&file).map_err(|errno| unloadable(path, &errno.to_string()))?;
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    let identity = (status.st_dev, status.st_ino);
    if let Some(result) = loaded.get(&identity) {
        return result.clone();
    }
    let library = link(path, file)?;
    // A refused plugin stays loaded as well, and is remembered so that it is not loaded at each attempt.
    let functions = negotiate(path, &library);
    std::mem::forget(library);
    loaded.insert(identity, functions.clone());
    functions
}

/// Hands the very file that was checked to the dynamic linker.
fn link(path: &Path, file: OwnedFd) -> Result<Library, BackendError> {
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: the library's initialisers run here. They are trusted as the whole plugin is: only the owner of this
    // process's program, or root, can have written it.
    let library = unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
        // libloading's own text says only that dlopen failed; the linker's words are its source.
        let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        unloadable(path, &reason.replace(&name, &path.display().to_string()))
    })?;
    // The linker takes a name that it has seen for the library that it has loaded, so the number of this descriptor
    // must never be used again.
    let _ = file.into_raw_fd();
    Ok(library)
}

/// Exchanges tables with the plugin and copies what is used of its one.
fn negotiate(path: &Path, library: &Library) -> Result<Functions, BackendError> {
    type Entry = unsafe extern "C" fn(*const PintleHost) -> *const PintleBackend;
    // SAFETY: a symbol of this name has this type: that is the ABI, and the major version is in the name.
    let entry = unsafe { library.get::<Entry>("pintle_backend_v1") }.map_err(|_| {
        BackendError::new(
            BackendErrorKind::Unsupported,
            format!("{} does not export pintle_backend_v{PINTLE_ABI_MAJOR}", path.display()),
        )
        .with_hint(format!("install a plugin built for version {PINTLE_ABI_MAJOR} of pintle's plugin ABI"))
    })?;
    // SAFETY: the host's table is static. The plugin is trusted not to break the process on purpose.
    let table = unsafe { entry(&HOST) };
    if table.is_null() {
        return Err(unsupported_version(path, "does not work with this host"));
    }
    if !table.is_aligned() {
        return Err(incomplete(path, "its table is not aligned"));
    }
    // SAFETY: the ABI promises these fields in every table of this and all later minor versions; no more is read
    // until struct_size is known.
    let (struct_size, abi_major) = unsafe { ((*table).struct_size, (*table).abi_major) };
    if abi_major != PINTLE_ABI_MAJOR {
        return Err(unsupported_version(path, &format!("speaks version {abi_major}")));
    }
    if struct_size < LEAST_SIZE {
        return Err(incomplete(path, &format!("its table has only {struct_size} bytes")));
    }
    // A table that ends before a function, or in the middle of it, does not have it: NULL takes its place.
    let length = if struct_size < size_of::<PintleBackend>() { LEAST_SIZE } else { size_of::<PintleBackend>() };
    let mut copy = MaybeUninit::<PintleBackend>::zeroed();
    // SAFETY: the table has at least this length, and the copy too. The plugin keeps it unchanged as long as the
    // process lives.
    unsafe { ptr::copy_nonoverlapping(table.cast::<u8>(), copy.as_mut_ptr().cast(), length) };
    // SAFETY: every byte is set, and any bit pattern is a number, a function pointer or NULL.
    let table = unsafe { copy.assume_init() };
    let missing = |name| move || incomplete(path, &format!("its function {name} is missing"));
    Ok(Functions {
        open: table.open.ok_or_else(missing("open"))?,
        close: table.close.ok_or_else(missing("close"))?,
        generate: table.generate.ok_or_else(missing("generate"))?,
        public_key: table.public_key.ok_or_else(missing("public_key"))?,
        sign: table.sign.ok_or_else(missing("sign"))?,
        delete_key: table.delete_key.ok_or_else(missing("delete_key"))?,
        list: table.list.ok_or_else(missing("list"))?,
        reference: table.reference.ok_or_else(missing("reference"))?,
        last_error: table.last_error.ok_or_else(missing("last_error"))?,
        usage: table.usage,
    })
}

fn unloadable(path: &Path, reason: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Unavailable, format!("cannot load {}: {reason}", path.display()))
        .with_hint("install the libraries that it needs, see ldd(1)")
}

fn unsupported_version(path: &Path, what: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, format!("{} {what}", path.display())).with_hint(format!(
        "install a plugin built for version {PINTLE_ABI_MAJOR}.{PINTLE_ABI_MINOR} of pintle's plugin ABI"
    ))
}

fn incomplete(path: &Path, what: &str) -> BackendError {
    BackendError::new(BackendErrorKind::Corrupt, format!("{} is no usable plugin: {what}", path.display()))
        .with_hint("report it to the plugin's vendor")
}
