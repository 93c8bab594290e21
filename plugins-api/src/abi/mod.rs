//! The C ABI of a key backend in a shared object: the types of `include/pintle_backend.h`.
//!
//! The header is generated from this file, [`crate::error`] and [`crate::key`]; `tests/header.rs` fails if it is out of
//! date. [`plugin`] is for plugins written in Rust; the agent's side is the crate `pintle-backend-plugin`.
#![allow(unsafe_code, reason = "this module is the plugin's side of a C ABI; every block says why it is sound")]

pub mod plugin;

pub use plugin::DigestSigner;

/// The major version of this ABI. It is part of the exported symbol's name: each major version has its own symbol, and
/// one shared object may export several.
pub const PINTLE_ABI_MAJOR: u32 = 1;

/// The minor version of this ABI: it increases by one when fields are added at the end of a table.
pub const PINTLE_ABI_MINOR: u32 = 1;

/// A function succeeded. Every other return value is a `PintleError` or `PINTLE_BUFFER_TOO_SMALL`.
pub const PINTLE_OK: i32 = 0;

/// The result does not fit in the caller's buffer. The buffer's `length` is the required capacity; the host calls again
/// with a larger buffer, so repeating a call must be harmless.
pub const PINTLE_BUFFER_TOO_SMALL: i32 = -64;

/// `PintleBackend::reference` returns the absolute path of a PEM file that contains the private key.
pub const PINTLE_REFERENCE_FILE: i32 = 1;

/// `PintleBackend::reference` returns PEM text that identifies the key without containing it, such as `TSS2 PRIVATE
/// KEY`.
pub const PINTLE_REFERENCE_PEM: i32 = 2;

/// `PintleBackend::reference` returns a URI, such as `pkcs11:` (RFC 7512).
pub const PINTLE_REFERENCE_URI: i32 = 3;

/// The maximum length of a key id, in bytes.
pub const PINTLE_KEY_ID_MAXIMUM_LENGTH: usize = 128;

const _: () = assert!(PINTLE_KEY_ID_MAXIMUM_LENGTH == crate::KeyId::MAXIMUM_LENGTH);

/// Bytes that the caller owns and the callee reads only during the call. Text is UTF-8 without a terminating NUL.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PintleBytes {
    /// The first byte; may be NULL if `length` is 0.
    pub pointer: *const u8,
    /// The number of bytes.
    pub length: usize,
}

/// A buffer that the caller owns and the callee fills during the call. The callee writes at most `capacity` bytes at
/// `pointer`, sets `length`, and changes nothing else. Text is UTF-8 and needs no terminating NUL.
#[repr(C)]
#[derive(Debug)]
pub struct PintleBuffer {
    /// Where to write the result.
    pub pointer: *mut u8,
    /// The size of the buffer in bytes.
    pub capacity: usize,
    /// The number of bytes written, or, with `PINTLE_BUFFER_TOO_SMALL`, the required capacity.
    pub length: usize,
}

/// The host's version. Valid until the process exits.
#[repr(C)]
#[derive(Debug)]
pub struct PintleHost {
    /// `sizeof(PintleHost)` when the host was built. Fields beyond it do not exist.
    pub struct_size: usize,
    /// The host's `PINTLE_ABI_MAJOR`.
    pub abi_major: u32,
    /// The host's `PINTLE_ABI_MINOR`.
    pub abi_minor: u32,
}

/// An open backend: the plugin's own state between calls. Opaque to the host.
#[derive(Debug)]
pub struct PintleContext(());

/// The functions of a plugin. The plugin owns this table, which must stay valid and unchanged until the process exits.
///
/// No function before `usage` may be NULL. Key ids are 1 to 128 arbitrary bytes, not text.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PintleBackend {
    /// `sizeof(PintleBackend)` when the plugin was built. Fields beyond it do not exist.
    pub struct_size: usize,
    /// The plugin's `PINTLE_ABI_MAJOR`.
    pub abi_major: u32,
    /// The plugin's `PINTLE_ABI_MINOR`.
    pub abi_minor: u32,
    /// Opens the backend described by `configuration`, a JSON object, and stores it at `context`.
    ///
    /// On failure it stores nothing at `context` and writes the reason to `error_text`, in the format of `last_error`;
    /// the host does not call `close`.
    pub open: Option<
        unsafe extern "C" fn(
            configuration: PintleBytes,
            context: *mut *mut PintleContext,
            error_text: *mut PintleBuffer,
        ) -> i32,
    >,
    /// Frees the context. Keys are kept. The host does not use the context again.
    pub close: Option<unsafe extern "C" fn(context: *mut PintleContext)>,
    /// Generates a key with this id, or finds the existing key with this id (repeating a call changes nothing), and
    /// writes its public key: a DER SubjectPublicKeyInfo (RFC 5280, section 4.1). `algorithm` is a
    /// `PintleKeyAlgorithm`.
    ///
    /// `PINTLE_ERROR_CONFLICT` if the key with this id has another algorithm, `PINTLE_ERROR_UNSUPPORTED` for an
    /// algorithm that the device does not support.
    pub generate: Option<
        unsafe extern "C" fn(
            context: *mut PintleContext,
            id: PintleBytes,
            algorithm: i32,
            public_key: *mut PintleBuffer,
        ) -> i32,
    >,
    /// Writes the public key, a DER SubjectPublicKeyInfo. It is the same on every call.
    ///
    /// `PINTLE_ERROR_NOT_FOUND` only if the key certainly does not exist: not if the device is absent, busy or locked.
    pub public_key: Option<
        unsafe extern "C" fn(context: *mut PintleContext, id: PintleBytes, public_key: *mut PintleBuffer) -> i32,
    >,
    /// Signs `digest`. `scheme` is a `PintleSignatureScheme`. `digest` is the message's digest under the scheme's hash
    /// function; for Ed25519 it is the message itself.
    ///
    /// ECDSA signatures are DER (`ECDSA-Sig-Value`, RFC 3279, section 2.2.3). RSA signatures are as long as the
    /// modulus, with a PSS salt as long as the digest. Ed25519 signatures are 64 bytes. The host verifies each with the
    /// public key.
    pub sign: Option<
        unsafe extern "C" fn(
            context: *mut PintleContext,
            id: PintleBytes,
            scheme: i32,
            digest: PintleBytes,
            signature: *mut PintleBuffer,
        ) -> i32,
    >,
    /// Destroys the key. Succeeds if there is no such key.
    pub delete_key: Option<unsafe extern "C" fn(context: *mut PintleContext, id: PintleBytes) -> i32>,
    /// Writes the ids of the keys that this backend made for pintle, and no others, in any order and without
    /// separators: each is one byte with the id's length, followed by the id.
    pub list: Option<unsafe extern "C" fn(context: *mut PintleContext, ids: *mut PintleBuffer) -> i32>,
    /// Writes how programs outside pintle refer to the key, and stores the `PINTLE_REFERENCE_` kind at `kind`.
    pub reference: Option<
        unsafe extern "C" fn(
            context: *mut PintleContext,
            id: PintleBytes,
            kind: *mut i32,
            text: *mut PintleBuffer,
        ) -> i32,
    >,
    /// Writes the error of the last failed call on this context: one line that names the object at fault and contains
    /// no secret, and, if an operator can act, a second line that says what to do. Writes nothing if there is no error.
    /// Must not change the stored error. If it fails, the host continues without the text.
    pub last_error: Option<unsafe extern "C" fn(context: *mut PintleContext, text: *mut PintleBuffer) -> i32>,
    /// Writes the usage of the device's limited resources, one line each: the amount in use, a space, the limit (`-` if
    /// unknown), a space, the name, and a line feed, such as `1 16 sessions`. For resources that keys consist of, such
    /// as objects, count only those made for pintle; for others, report the device's count.
    ///
    /// Since 1.1. May be NULL or lie beyond `struct_size`; usage is then not reported.
    pub usage: Option<unsafe extern "C" fn(context: *mut PintleContext, lines: *mut PintleBuffer) -> i32>,
}

unsafe extern "C" {
    /// The only symbol that a plugin exports. Returns the plugin's table, or NULL if it does not support this host.
    ///
    /// The host calls it once each time it loads the shared object, and never unloads the shared object.
    pub fn pintle_backend_v1(host: *const PintleHost) -> *const PintleBackend;
}
