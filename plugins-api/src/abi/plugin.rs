//! What a plugin written in Rust needs: implement [`DigestSigner`] and name a function that opens it.
//!
//! ```text
//! fn open(configuration: &str) -> Result<Box<dyn DigestSigner>, BackendError> { … }
//! pintle_plugins_api::export_backend!(open);
//! ```
//!
//! Build the plugin as a `cdylib` and never with `panic = "abort"`: a panic is caught at the entry where it would
//! leave the plugin, and becomes an error of that one call.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{
    PINTLE_ABI_MAJOR, PINTLE_ABI_MINOR, PINTLE_BUFFER_TOO_SMALL, PINTLE_OK, PINTLE_REFERENCE_FILE,
    PINTLE_REFERENCE_PEM, PINTLE_REFERENCE_URI, PintleBackend, PintleBuffer, PintleBytes, PintleContext, PintleHost,
};
use crate::{BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, Resource, SignatureScheme};

/// A key backend that signs digests, as the C ABI demands: devices differ in what they can hash, so the host hashes.
pub trait DigestSigner: KeyBackend {
    /// Signs `digest`, the message's digest by the hash function of `scheme`; with Ed25519 the message itself.
    ///
    /// The signature is encoded as [`KeyBackend::sign`] says.
    ///
    /// # Errors
    /// As [`KeyBackend::sign`].
    fn sign_digest(&mut self, id: &KeyId, scheme: SignatureScheme, digest: &[u8]) -> Result<Vec<u8>, BackendError>;
}

/// Exports a backend over the C ABI: `export_backend!(path::to::open)`, once in a `cdylib`.
///
/// The function is a `fn(&str) -> Result<Box<dyn DigestSigner>, BackendError>` and gets the configuration, a JSON
/// object.
#[macro_export]
macro_rules! export_backend {
    ($open:path) => {
        const _: () = {
            struct Exported;

            impl $crate::abi::plugin::Open for Exported {
                fn open(
                    configuration: &str,
                ) -> ::std::result::Result<
                    ::std::boxed::Box<dyn $crate::abi::plugin::DigestSigner>,
                    $crate::BackendError,
                > {
                    $open(configuration)
                }
            }

            static TABLE: $crate::abi::PintleBackend = $crate::abi::plugin::table::<Exported>();

            // NULL is None: the guaranteed layout of an Option of a reference.
            #[unsafe(no_mangle)]
            extern "C" fn pintle_backend_v1(
                host: ::std::option::Option<&'static $crate::abi::PintleHost>,
            ) -> ::std::option::Option<&'static $crate::abi::PintleBackend> {
                $crate::abi::plugin::negotiate(host, &TABLE)
            }
        };
    };
}

/// How [`export_backend!`](crate::export_backend) hands over the function that it was given.
#[doc(hidden)]
pub trait Open {
    fn open(configuration: &str) -> Result<Box<dyn DigestSigner>, BackendError>;
}

/// The table of a backend that `O` opens.
#[doc(hidden)]
pub const fn table<O: Open>() -> PintleBackend {
    PintleBackend {
        struct_size: size_of::<PintleBackend>(),
        abi_major: PINTLE_ABI_MAJOR,
        abi_minor: PINTLE_ABI_MINOR,
        open: Some(open::<O>),
        close: Some(close),
        generate: Some(generate),
        public_key: Some(public_key),
        sign: Some(sign),
        delete_key: Some(delete_key),
        list: Some(list),
        reference: Some(reference),
        last_error: Some(last_error),
        usage: Some(usage),
    }
}

/// The table, if the host speaks this major version.
#[doc(hidden)]
pub fn negotiate(host: Option<&PintleHost>, table: &'static PintleBackend) -> Option<&'static PintleBackend> {
    host.is_some_and(|host| host.abi_major == PINTLE_ABI_MAJOR).then_some(table)
}

/// What a [`PintleContext`] points to.
struct Context {
    backend: Box<dyn DigestSigner>,
    last_error: String,
}

unsafe extern "C" fn open<O: Open>(
    configuration: PintleBytes,
    context: *mut *mut PintleContext,
    error_text: *mut PintleBuffer,
) -> i32 {
    // SAFETY: the host's octets are valid during the call.
    let configuration = unsafe { octets(configuration) };
    let opened = caught(|| {
        let configuration = std::str::from_utf8(configuration)
            .map_err(|_| BackendError::new(BackendErrorKind::Corrupt, "the configuration is not UTF-8"))?;
        O::open(configuration)
    });
    match opened {
        Ok(backend) => {
            let opened = Box::new(Context { backend, last_error: String::new() });
            // SAFETY: the host gives a place for one pointer, which need not be initialised.
            unsafe { context.write(Box::into_raw(opened).cast()) };
            PINTLE_OK
        }
        Err(error) => {
            // SAFETY: the host's buffer is valid during the call. That the text does not fit changes nothing.
            unsafe { fill(error_text, error_lines(&error).as_bytes()) };
            error.kind as i32
        }
    }
}

unsafe extern "C" fn close(context: *mut PintleContext) {
    // SAFETY: the context came from `open` and the host does not use it again.
    let context = unsafe { Box::from_raw(context.cast::<Context>()) };
    // There is nobody left to tell about an error.
    let _ = caught(|| {
        drop(context);
        Ok(())
    });
}

unsafe extern "C" fn generate(
    context: *mut PintleContext,
    id: PintleBytes,
    algorithm: i32,
    public_key: *mut PintleBuffer,
) -> i32 {
    // SAFETY: the host's pointers are valid during the call, and the context came from `open`.
    unsafe {
        answer(context, public_key, |backend| {
            let algorithm = KeyAlgorithm::from_code(algorithm)
                .ok_or_else(|| unsupported(format!("key algorithm {algorithm} is not known")))?;
            Ok(backend.generate(&key_id(id)?, algorithm)?.as_der().to_vec())
        })
    }
}

unsafe extern "C" fn public_key(context: *mut PintleContext, id: PintleBytes, public_key: *mut PintleBuffer) -> i32 {
    // SAFETY: the host's pointers are valid during the call, and the context came from `open`.
    unsafe { answer(context, public_key, |backend| Ok(backend.public_key(&key_id(id)?)?.as_der().to_vec())) }
}

unsafe extern "C" fn sign(
    context: *mut PintleContext,
    id: PintleBytes,
    scheme: i32,
    digest: PintleBytes,
    signature: *mut PintleBuffer,
) -> i32 {
    // SAFETY: the host's pointers are valid during the call, and the context came from `open`.
    unsafe {
        answer(context, signature, |backend| {
            let scheme = SignatureScheme::from_code(scheme)
                .ok_or_else(|| unsupported(format!("signature scheme {scheme} is not known")))?;
            backend.sign_digest(&key_id(id)?, scheme, octets(digest))
        })
    }
}

unsafe extern "C" fn delete_key(context: *mut PintleContext, id: PintleBytes) -> i32 {
    // SAFETY: the host's octets are valid during the call, and the context came from `open`.
    match unsafe { call(context, |backend| backend.delete(&key_id(id)?)) } {
        Ok(()) => PINTLE_OK,
        Err(code) => code,
    }
}

unsafe extern "C" fn list(context: *mut PintleContext, ids: *mut PintleBuffer) -> i32 {
    // SAFETY: the host's buffer is valid during the call, and the context came from `open`.
    unsafe {
        answer(context, ids, |backend| {
            let mut written = Vec::new();
            for id in backend.list()? {
                // KeyId::MAXIMUM_LENGTH is less than 256.
                written.push(id.as_bytes().len() as u8);
                written.extend_from_slice(id.as_bytes());
            }
            Ok(written)
        })
    }
}

unsafe extern "C" fn reference(
    context: *mut PintleContext,
    id: PintleBytes,
    kind: *mut i32,
    text: *mut PintleBuffer,
) -> i32 {
    // SAFETY: the host's pointers are valid during the call, and the context came from `open`.
    unsafe {
        answer(context, text, |backend| {
            let (number, text) = match backend.reference(&key_id(id)?)? {
                KeyReference::File(path) => (PINTLE_REFERENCE_FILE, path.into_os_string().into_encoded_bytes()),
                KeyReference::Pem(pem) => (PINTLE_REFERENCE_PEM, pem.into_bytes()),
                KeyReference::Uri(uri) => (PINTLE_REFERENCE_URI, uri.into_bytes()),
            };
            kind.write(number);
            Ok(text)
        })
    }
}

unsafe extern "C" fn last_error(context: *mut PintleContext, text: *mut PintleBuffer) -> i32 {
    // SAFETY: the context came from `open`, and no other call on it is under way.
    let context = unsafe { &*context.cast::<Context>() };
    // SAFETY: the host's buffer is valid during the call.
    unsafe { fill(text, context.last_error.as_bytes()) }
}

unsafe extern "C" fn usage(context: *mut PintleContext, lines: *mut PintleBuffer) -> i32 {
    // SAFETY: the host's buffer is valid during the call, and the context came from `open`.
    unsafe {
        answer(context, lines, |backend| {
            let line = |Resource { name, used, limit }: Resource| {
                let limit = limit.map_or_else(|| "-".to_owned(), |limit| limit.to_string());
                format!("{used} {limit} {name}\n")
            };
            Ok(backend.usage()?.into_iter().map(line).collect::<String>().into_bytes())
        })
    }
}

/// Runs `operation` on the open backend and writes what it returns.
///
/// # Safety
/// `context` came from [`open`] and no other call on it is under way; `buffer` is valid.
unsafe fn answer(
    context: *mut PintleContext,
    buffer: *mut PintleBuffer,
    operation: impl FnOnce(&mut dyn DigestSigner) -> Result<Vec<u8>, BackendError>,
) -> i32 {
    // SAFETY: as this function's callers promise.
    match unsafe { call(context, operation) } {
        // SAFETY: as this function's callers promise.
        Ok(octets) => unsafe { fill(buffer, &octets) },
        Err(code) => code,
    }
}

/// Runs `operation` on the open backend and remembers what went wrong.
///
/// # Safety
/// `context` came from [`open`] and no other call on it is under way.
unsafe fn call<T>(
    context: *mut PintleContext,
    operation: impl FnOnce(&mut dyn DigestSigner) -> Result<T, BackendError>,
) -> Result<T, i32> {
    // SAFETY: as this function's callers promise: the pointer is to a live Context and nothing else uses it now.
    let context = unsafe { &mut *context.cast::<Context>() };
    caught(|| operation(context.backend.as_mut())).map_err(|error| {
        context.last_error = error_lines(&error);
        error.kind as i32
    })
}

/// Turns a panic into an error: one that left an `extern "C"` function would abort the host.
fn caught<T>(operation: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    // After a panic the backend may be inconsistent, but not unsound: that it is used again is no worse than in any
    // other program that outlives a panicking thread.
    catch_unwind(AssertUnwindSafe(operation)).unwrap_or_else(|panic| {
        let message = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
            (Some(text), _) => (*text).to_owned(),
            (_, Some(text)) => text.clone(),
            _ => "no message".to_owned(),
        };
        // Dropping an unknown payload could panic again.
        std::mem::forget(panic);
        Err(BackendError::new(BackendErrorKind::Corrupt, format!("the plugin panicked: {message}")))
    })
}

/// The host's octets.
///
/// # Safety
/// They are valid for as long as the caller keeps the slice.
unsafe fn octets<'call>(bytes: PintleBytes) -> &'call [u8] {
    if bytes.pointer.is_null() || bytes.length == 0 {
        return &[];
    }
    // SAFETY: as this function's callers promise.
    unsafe { std::slice::from_raw_parts(bytes.pointer, bytes.length) }
}

/// Writes `content` into the host's buffer, if it fits.
///
/// # Safety
/// `buffer` points to a valid buffer.
unsafe fn fill(buffer: *mut PintleBuffer, content: &[u8]) -> i32 {
    // SAFETY: as this function's callers promise.
    let buffer = unsafe { &mut *buffer };
    buffer.length = content.len();
    if content.len() > buffer.capacity {
        return PINTLE_BUFFER_TOO_SMALL;
    }
    if !content.is_empty() {
        // SAFETY: `capacity` octets may be written at `pointer`, and the host's memory does not overlap ours.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), buffer.pointer, content.len()) };
    }
    PINTLE_OK
}

/// # Safety
/// The octets are valid during the call.
unsafe fn key_id(bytes: PintleBytes) -> Result<KeyId, BackendError> {
    // SAFETY: as this function's callers promise.
    KeyId::new(unsafe { octets(bytes) })
        .map_err(|invalid| BackendError::new(BackendErrorKind::Corrupt, invalid.to_string()))
}

fn unsupported(detail: String) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, detail)
}

/// The error as [`PintleBackend::last_error`] gives it: a line that says what happened, perhaps one that says what to do.
fn error_lines(error: &BackendError) -> String {
    // Short enough, in UTF-8, for any host's buffer.
    let line = |text: &str| text.replace(['\r', '\n'], " ").chars().take(250).collect::<String>();
    match &error.hint {
        Some(hint) => format!("{}\n{}", line(&error.detail), line(hint)),
        None => line(&error.detail),
    }
}
