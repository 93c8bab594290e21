//! The C ABI of a key backend in a shared object: the types of `include/pintle_backend.h`.
//!
//! The header is generated from this file, [`crate::error`] and [`crate::key`]; `tests/header.rs` fails when it has
//! drifted. [`plugin`] is what a plugin written in Rust needs; the agent's side is the crate `pintle-backend-plugin`.
#![allow(unsafe_code, reason = "this module is the plugin's side of a C ABI; every block says why it is sound")]

pub mod plugin;

pub use plugin::DigestSigner;

/// The major version of this ABI. It is also in the name of the exported symbol: another major version is another
/// symbol, and one shared object may export several.
pub const PINTLE_ABI_MAJOR: u32 = 1;

/// The minor version of this ABI: it grows by one when a table grows at its end.
pub const PINTLE_ABI_MINOR: u32 = 1;

/// A function succeeded. Every other answer is a `PintleError` or `PINTLE_BUFFER_TOO_SMALL`.
pub const PINTLE_OK: i32 = 0;

/// The result does not fit the caller's buffer. The buffer's `length` is the capacity that it needs; the host calls
/// again with a larger buffer, so a repeated call must be harmless.
pub const PINTLE_BUFFER_TOO_SMALL: i32 = -64;

/// `PintleBackend::reference` answers the absolute path of a PEM file that holds the private key itself.
pub const PINTLE_REFERENCE_FILE: i32 = 1;

/// `PintleBackend::reference` answers PEM text that names the key without holding it, such as `TSS2 PRIVATE KEY`.
pub const PINTLE_REFERENCE_PEM: i32 = 2;

/// `PintleBackend::reference` answers a URI, such as `pkcs11:` (RFC 7512).
pub const PINTLE_REFERENCE_URI: i32 = 3;

/// The longest id of a key, in octets.
pub const PINTLE_KEY_ID_MAXIMUM_LENGTH: usize = 128;

const _: () = assert!(PINTLE_KEY_ID_MAXIMUM_LENGTH == crate::KeyId::MAXIMUM_LENGTH);

/// Octets that the caller owns and the callee reads during the call only. Text is UTF-8 and has no terminating NUL.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PintleBytes {
    /// The first octet; may be NULL if there are none.
    pub pointer: *const u8,
    /// How many there are.
    pub length: usize,
}

/// A buffer that the caller owns and the callee fills during the call. The callee writes at most `capacity` octets at
/// `pointer`, sets `length`, and changes nothing else. Text is UTF-8 and needs no terminating NUL.
#[repr(C)]
#[derive(Debug)]
pub struct PintleBuffer {
    /// Where the octets go.
    pub pointer: *mut u8,
    /// How many octets fit.
    pub capacity: usize,
    /// How many octets were written, or, with `PINTLE_BUFFER_TOO_SMALL`, how many must fit.
    pub length: usize,
}

/// What the host tells a plugin about itself. Valid as long as the process lives.
#[repr(C)]
#[derive(Debug)]
pub struct PintleHost {
    /// `sizeof(PintleHost)` as the host was built. A field that lies beyond it does not exist.
    pub struct_size: usize,
    /// The host's `PINTLE_ABI_MAJOR`.
    pub abi_major: u32,
    /// The host's `PINTLE_ABI_MINOR`.
    pub abi_minor: u32,
}

/// An open backend: whatever a plugin keeps between calls. Only the plugin looks inside.
#[derive(Debug)]
pub struct PintleContext(());

/// What a plugin can do. The plugin owns the table, which is valid and unchanged as long as the process lives.
///
/// No function before `usage` may be NULL. Key ids are 1 to 128 arbitrary octets, not text.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PintleBackend {
    /// `sizeof(PintleBackend)` as the plugin was built. A field that lies beyond it does not exist.
    pub struct_size: usize,
    /// The plugin's `PINTLE_ABI_MAJOR`.
    pub abi_major: u32,
    /// The plugin's `PINTLE_ABI_MINOR`.
    pub abi_minor: u32,
    /// Opens the backend that `configuration`, a JSON object, describes, and stores it at `context`.
    ///
    /// On failure nothing is stored, nothing needs closing, and `error_text` says why as `last_error` would.
    pub open: Option<
        unsafe extern "C" fn(
            configuration: PintleBytes,
            context: *mut *mut PintleContext,
            error_text: *mut PintleBuffer,
        ) -> i32,
    >,
    /// Frees the context. Keys stay where they are. The context is not used again.
    pub close: Option<unsafe extern "C" fn(context: *mut PintleContext)>,
    /// Generates a key under `id`, or finds the key that already has this id (a repeat changes nothing), and writes
    /// its public half: a DER SubjectPublicKeyInfo (RFC 5280, section 4.1). `algorithm` is a `PintleKeyAlgorithm`.
    ///
    /// `PINTLE_ERROR_CONFLICT` if the key with this id is of another algorithm, `PINTLE_ERROR_UNSUPPORTED` for an
    /// algorithm that the device does not have.
    pub generate: Option<
        unsafe extern "C" fn(
            context: *mut PintleContext,
            id: PintleBytes,
            algorithm: i32,
            public_key: *mut PintleBuffer,
        ) -> i32,
    >,
    /// Writes the public half of the key, a DER SubjectPublicKeyInfo. It is the same every time.
    ///
    /// `PINTLE_ERROR_NOT_FOUND` only if there certainly is no such key: not when the device is absent, busy or locked.
    pub public_key: Option<
        unsafe extern "C" fn(context: *mut PintleContext, id: PintleBytes, public_key: *mut PintleBuffer) -> i32,
    >,
    /// Signs. `scheme` is a `PintleSignatureScheme`. `digest` is the message's digest by the scheme's hash function;
    /// with Ed25519 it is the message itself.
    ///
    /// ECDSA signatures are DER (`ECDSA-Sig-Value`, RFC 3279, section 2.2.3), RSA ones as long as the modulus, with a
    /// PSS salt as long as the digest; Ed25519 ones have 64 octets. The host verifies each under the public key.
    pub sign: Option<
        unsafe extern "C" fn(
            context: *mut PintleContext,
            id: PintleBytes,
            scheme: i32,
            digest: PintleBytes,
            signature: *mut PintleBuffer,
        ) -> i32,
    >,
    /// Destroys the key. If there is none that is a success too.
    pub delete_key: Option<unsafe extern "C" fn(context: *mut PintleContext, id: PintleBytes) -> i32>,
    /// Writes the ids of the keys that this backend made for pintle, and of no others, in any order and without
    /// separators: each is one octet with the id's length, followed by the id.
    pub list: Option<unsafe extern "C" fn(context: *mut PintleContext, ids: *mut PintleBuffer) -> i32>,
    /// Writes how a program outside pintle names the key, and at `kind` which of the `PINTLE_REFERENCE_` kinds it is.
    pub reference: Option<
        unsafe extern "C" fn(
            context: *mut PintleContext,
            id: PintleBytes,
            kind: *mut i32,
            text: *mut PintleBuffer,
        ) -> i32,
    >,
    /// Writes what went wrong in the latest call on this context that failed: one line that names the thing at fault
    /// and holds no secret, and, where a person can do something about it, a second line that says what. Empty if
    /// there is nothing to say. Must not change what it reports, and if it fails the host does without the text.
    pub last_error: Option<unsafe extern "C" fn(context: *mut PintleContext, text: *mut PintleBuffer) -> i32>,
    /// Writes how much is taken of what the device can run out of, one line each, ended by a line feed: how much is
    /// taken, a space, how much there is (`-` if that is not known), a space, and what it is, such as
    /// `1 16 sessions`. Of what keys consist of, such as objects, those made for pintle are counted; of everything
    /// else, what the device counts.
    ///
    /// Since 1.1. May be NULL, or lie beyond `struct_size`: then nothing is said.
    pub usage: Option<unsafe extern "C" fn(context: *mut PintleContext, lines: *mut PintleBuffer) -> i32>,
}

unsafe extern "C" {
    /// The one symbol that a plugin exports. Returns its table, or NULL if it cannot work with this host.
    ///
    /// The host calls it once for each time that it loads the shared object, and never unloads it.
    pub fn pintle_backend_v1(host: *const PintleHost) -> *const PintleBackend;
}
