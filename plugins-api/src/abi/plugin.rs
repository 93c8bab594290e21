//! For plugins written in Rust: implement [`DigestSigner`], and export a function that opens it.
//!
//! ```text
//! fn open(configuration: &str) -> Result<Box<dyn DigestSigner>, BackendError> { … }
//! pintle_plugins_api::export_backend!(open);
//! ```
//!
//! Build the plugin as a `cdylib` without `panic = "abort"`: the exported functions catch panics and return them as
//! errors of that call.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{
    PINTLE_ABI_MAJOR, PINTLE_ABI_MINOR, PINTLE_BUFFER_TOO_SMALL, PINTLE_OK, PINTLE_REFERENCE_FILE,
    PINTLE_REFERENCE_PEM, PINTLE_REFERENCE_URI, PintleBackend, PintleBuffer, PintleBytes, PintleContext, PintleHost,
};
use crate::{BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, Resource, SignatureScheme};

/// A key backend that signs digests, as the C ABI requires: devices support different hash functions, so the host
/// hashes.
pub trait DigestSigner: KeyBackend {
    /// Signs `digest`, the message's digest under the hash function of `scheme`; for Ed25519, the message itself.
    ///
    /// The signature is encoded as by [`KeyBackend::sign`].
    ///
    /// # Errors
    /// As [`KeyBackend::sign`].
    fn sign_digest(&mut self, id: &KeyId, scheme: SignatureScheme, digest: &[u8]) -> Result<Vec<u8>, BackendError>;
}

/// Exports a backend over the C ABI: call `export_backend!(path::to::open)` once in a `cdylib`.
///
/// `open` is a `fn(&str) -> Result<Box<dyn DigestSigner>, BackendError>`; its argument is the configuration, a JSON
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

            // NULL is None: Rust guarantees this layout for an Option of a reference.
            #[unsafe(no_mangle)]
            extern "C" fn pintle_backend_v1(
                host: ::std::option::Option<&'static $crate::abi::PintleHost>,
            ) -> ::std::option::Option<&'static $crate::abi::PintleBackend> {
                $crate::abi::plugin::negotiate(host, &TABLE)
            }
        };
    };
}

/// Passes the argument of [`export_backend!`](crate::export_backend) to the generic functions of the table.
#[doc(hidden)]
pub trait Open {
    fn open(configuration: &str) -> Result<Box<dyn DigestSigner>, BackendError>;
}

/// The table of the backend that `O` opens.
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

/// Returns the table if the host has the same major version.
#[doc(hidden)]
pub fn negotiate(host: Option<&PintleHost>, table: &'static PintleBackend) -> Option<&'static PintleBackend> {
    host.is_some_and(|host| host.abi_major == PINTLE_ABI_MAJOR).then_some(table)
}

/// The type behind a [`PintleContext`] pointer.
struct Context {
    backend: Box<dyn DigestSigner>,
    last_error: String,
}

unsafe extern "C" fn open<O: Open>(
    configuration: PintleBytes,
    context: *mut *mut PintleContext,
    error_text: *mut PintleBuffer,
) -> i32 {
    // SAFETY: the host's bytes are valid during the call.
    let configuration = unsafe { slice(configuration) };
    let opened = caught(|| {
        let configuration = std::str::from_utf8(configuration)
            .map_err(|_| BackendError::new(BackendErrorKind::Corrupt, "the configuration is not UTF-8"))?;
        O::open(configuration)
    });
    match opened {
        Ok(backend) => {
            let opened = Box::new(Context { backend, last_error: String::new() });
            // SAFETY: the host provides space for one pointer, which need not be initialised.
            unsafe { context.write(Box::into_raw(opened).cast()) };
            PINTLE_OK
        }
        Err(error) => {
            // SAFETY: the host's buffer is valid during the call. The error code is returned even if the text does not
            // fit.
            unsafe { fill(error_text, error_lines(&error).as_bytes()) };
            error.kind as i32
        }
    }
}

unsafe extern "C" fn close(context: *mut PintleContext) {
    // SAFETY: the context came from `open` and the host does not use it again.
    let context = unsafe { Box::from_raw(context.cast::<Context>()) };
    // `close` cannot return an error.
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
            backend.sign_digest(&key_id(id)?, scheme, slice(digest))
        })
    }
}

unsafe extern "C" fn delete_key(context: *mut PintleContext, id: PintleBytes) -> i32 {
    // SAFETY: the host's bytes are valid during the call, and the context came from `open`.
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
    // SAFETY: the context came from `open`, and no other call uses it.
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

/// Runs `operation` on the open backend and writes its result to `buffer`.
///
/// # Safety
/// `context` came from [`open`], no other call uses it, and `buffer` is valid.
unsafe fn answer(
    context: *mut PintleContext,
    buffer: *mut PintleBuffer,
    operation: impl FnOnce(&mut dyn DigestSigner) -> Result<Vec<u8>, BackendError>,
) -> i32 {
    // SAFETY: guaranteed by the caller.
    match unsafe { call(context, operation) } {
        // SAFETY: guaranteed by the caller.
        Ok(result) => unsafe { fill(buffer, &result) },
        Err(code) => code,
    }
}

/// Runs `operation` on the open backend and stores its error for [`last_error`].
///
/// # Safety
/// `context` came from [`open`], and no other call uses it.
unsafe fn call<T>(
    context: *mut PintleContext,
    operation: impl FnOnce(&mut dyn DigestSigner) -> Result<T, BackendError>,
) -> Result<T, i32> {
    // SAFETY: the caller guarantees that the pointer is to a live Context that nothing else uses.
    let context = unsafe { &mut *context.cast::<Context>() };
    caught(|| operation(context.backend.as_mut())).map_err(|error| {
        context.last_error = error_lines(&error);
        error.kind as i32
    })
}

/// Turns a panic into an error, because a panic in an `extern "C"` function aborts the process.
fn caught<T>(operation: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    // After a panic the backend may be inconsistent, but it is not unsound, so later calls may use it again.
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

/// # Safety
/// The bytes are valid for as long as the caller keeps the slice.
unsafe fn slice<'call>(bytes: PintleBytes) -> &'call [u8] {
    if bytes.pointer.is_null() || bytes.length == 0 {
        return &[];
    }
    // SAFETY: guaranteed by the caller.
    unsafe { std::slice::from_raw_parts(bytes.pointer, bytes.length) }
}

/// Writes `content` into the host's buffer if it fits.
///
/// # Safety
/// `buffer` points to a valid buffer.
unsafe fn fill(buffer: *mut PintleBuffer, content: &[u8]) -> i32 {
    // SAFETY: guaranteed by the caller.
    let buffer = unsafe { &mut *buffer };
    buffer.length = content.len();
    if content.len() > buffer.capacity {
        return PINTLE_BUFFER_TOO_SMALL;
    }
    if !content.is_empty() {
        // SAFETY: `capacity` bytes may be written at `pointer`, and the host's buffer does not overlap `content`.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), buffer.pointer, content.len()) };
    }
    PINTLE_OK
}

/// # Safety
/// The bytes are valid during the call.
unsafe fn key_id(bytes: PintleBytes) -> Result<KeyId, BackendError> {
    // SAFETY: guaranteed by the caller.
    KeyId::new(unsafe { slice(bytes) })
        .map_err(|invalid| BackendError::new(BackendErrorKind::Corrupt, invalid.to_string()))
}

fn unsupported(detail: String) -> BackendError {
    BackendError::new(BackendErrorKind::Unsupported, detail)
}

/// Formats an error for [`PintleBackend::last_error`]: the detail on one line, and the hint, if any, on a second one.
fn error_lines(error: &BackendError) -> String {
    // Short enough, in UTF-8, for the host's buffer.
    let line = |text: &str| text.replace(['\r', '\n'], " ").chars().take(250).collect::<String>();
    match &error.hint {
        Some(hint) => format!("{}\n{}", line(&error.detail), line(hint)),
        None => line(&error.detail),
    }
}
