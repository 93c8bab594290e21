/*
 * The C ABI of a pintle key backend: the functions of a shared object that holds a node's private key.
 *
 * Threads: functions may block for as long as the device needs. The host never makes two calls on one context at once,
 * but successive calls may come from different threads, and calls on different contexts may overlap. There are no
 * callbacks. No exception and no longjmp may leave a function. The host makes its calls on a separate thread or in a
 * separate process, and kills a process that misses its deadline.
 *
 * Memory: the caller owns every argument. The memory of a PintleBytes is valid only during the call. Results are
 * written to the caller's PintleBuffer. Neither side frees memory that the other has allocated.
 *
 * Versions: both tables begin with their size and version and grow only at the end. Read a field only if it lies within
 * struct_size. Numbers never change their meaning.
 *
 * Return values: PINTLE_OK, PINTLE_BUFFER_TOO_SMALL, or a PintleError, chosen by what the caller should do next. The
 * host trusts no result: it parses public keys, verifies signatures and checks lengths.
 *
 * Trust: a plugin runs with the host's privileges. pintle loads a plugin only if no user but root, or the user that
 * runs pintle, can change the file or any directory in its path.
 *
 * Generated from plugins-api/src by its tests; do not edit.
 */

#ifndef PINTLE_BACKEND_H
#define PINTLE_BACKEND_H

#include <stddef.h>
#include <stdint.h>

/**
 * The major version of this ABI. It is part of the exported symbol's name: each major version has its own symbol, and
 * one shared object may export several.
 */
#define PINTLE_ABI_MAJOR 1

/**
 * The minor version of this ABI: it increases by one when fields are added at the end of a table.
 */
#define PINTLE_ABI_MINOR 1

/**
 * A function succeeded. Every other return value is a `PintleError` or `PINTLE_BUFFER_TOO_SMALL`.
 */
#define PINTLE_OK 0

/**
 * The result does not fit in the caller's buffer. The buffer's `length` is the required capacity; the host calls again
 * with a larger buffer, so repeating a call must be harmless.
 */
#define PINTLE_BUFFER_TOO_SMALL -64

/**
 * `PintleBackend::reference` returns the absolute path of a PEM file that contains the private key.
 */
#define PINTLE_REFERENCE_FILE 1

/**
 * `PintleBackend::reference` returns PEM text that identifies the key without containing it, such as `TSS2 PRIVATE
 * KEY`.
 */
#define PINTLE_REFERENCE_PEM 2

/**
 * `PintleBackend::reference` returns a URI, such as `pkcs11:` (RFC 7512).
 */
#define PINTLE_REFERENCE_URI 3

/**
 * The maximum length of a key id, in bytes.
 */
#define PINTLE_KEY_ID_MAXIMUM_LENGTH 128

/**
 * What the caller does next about a [`BackendError`].
 *
 * The numbers are those of the C ABI and of the isolation protocol, and never change their meaning.
 */
enum PintleError
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * The key certainly does not exist. Generate it.
     */
    PINTLE_ERROR_NOT_FOUND = -1,
    /**
     * A different key has this id. Choose another id.
     */
    PINTLE_ERROR_CONFLICT = -2,
    /**
     * A PIN is missing, refused or locked out. An operator must act; the same PIN is never tried again.
     */
    PINTLE_ERROR_LOCKED = -3,
    /**
     * The device is busy or does not answer. Try again later; nothing indicates that keys are lost.
     */
    PINTLE_ERROR_UNAVAILABLE = -4,
    /**
     * The device is present, but the key is permanently gone (cleared TPM, re-initialised token). Enrol again.
     */
    PINTLE_ERROR_KEY_LOST = -5,
    /**
     * The backend cannot do this. Choose another algorithm or backend.
     */
    PINTLE_ERROR_UNSUPPORTED = -6,
    /**
     * Stored data or the device's answer is invalid. An operator must inspect it.
     */
    PINTLE_ERROR_CORRUPT = -7,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum PintleError PintleError;
#else
typedef int32_t PintleError;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What kind of key is generated. The numbers are those of the C ABI.
 */
enum PintleKeyAlgorithm
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * ECDSA on NIST P-256 (secp256r1): what the kubelet uses, and the default.
     */
    PINTLE_KEY_ALGORITHM_ECDSA_P256 = 1,
    /**
     * ECDSA on NIST P-384 (secp384r1).
     */
    PINTLE_KEY_ALGORITHM_ECDSA_P384 = 2,
    /**
     * RSA with a modulus of 2048 bits.
     */
    PINTLE_KEY_ALGORITHM_RSA2048 = 3,
    /**
     * RSA with a modulus of 3072 bits.
     */
    PINTLE_KEY_ALGORITHM_RSA3072 = 4,
    /**
     * RSA with a modulus of 4096 bits.
     */
    PINTLE_KEY_ALGORITHM_RSA4096 = 5,
    /**
     * Ed25519 (RFC 8032).
     */
    PINTLE_KEY_ALGORITHM_ED25519 = 6,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum PintleKeyAlgorithm PintleKeyAlgorithm;
#else
typedef int32_t PintleKeyAlgorithm;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * How a message is hashed and signed. The numbers are those of the C ABI.
 */
enum PintleSignatureScheme
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * ECDSA on P-256 with SHA-256; the signature is DER.
     */
    PINTLE_SIGNATURE_SCHEME_ECDSA_P256_SHA256 = 1,
    /**
     * ECDSA on P-384 with SHA-384; the signature is DER.
     */
    PINTLE_SIGNATURE_SCHEME_ECDSA_P384_SHA384 = 2,
    /**
     * RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, section 8.2).
     */
    PINTLE_SIGNATURE_SCHEME_RSA_PKCS1_SHA256 = 3,
    /**
     * RSASSA-PKCS1-v1_5 with SHA-384.
     */
    PINTLE_SIGNATURE_SCHEME_RSA_PKCS1_SHA384 = 4,
    /**
     * RSASSA-PKCS1-v1_5 with SHA-512.
     */
    PINTLE_SIGNATURE_SCHEME_RSA_PKCS1_SHA512 = 5,
    /**
     * RSASSA-PSS with SHA-256, MGF1 with SHA-256 and a salt of 32 bytes, as TLS 1.3 demands (RFC 8446, section 4.2.3).
     */
    PINTLE_SIGNATURE_SCHEME_RSA_PSS_SHA256 = 6,
    /**
     * RSASSA-PSS with SHA-384 and a salt of 48 bytes.
     */
    PINTLE_SIGNATURE_SCHEME_RSA_PSS_SHA384 = 7,
    /**
     * RSASSA-PSS with SHA-512 and a salt of 64 bytes.
     */
    PINTLE_SIGNATURE_SCHEME_RSA_PSS_SHA512 = 8,
    /**
     * Ed25519 (RFC 8032); the message itself is signed, unhashed.
     */
    PINTLE_SIGNATURE_SCHEME_ED25519 = 9,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum PintleSignatureScheme PintleSignatureScheme;
#else
typedef int32_t PintleSignatureScheme;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * An open backend: the plugin's own state between calls. Opaque to the host.
 */
typedef struct PintleContext PintleContext;

/**
 * Bytes that the caller owns and the callee reads only during the call. Text is UTF-8 without a terminating NUL.
 */
typedef struct PintleBytes {
    /**
     * The first byte; may be NULL if `length` is 0.
     */
    const uint8_t *pointer;
    /**
     * The number of bytes.
     */
    size_t length;
} PintleBytes;

/**
 * A buffer that the caller owns and the callee fills during the call. The callee writes at most `capacity` bytes at
 * `pointer`, sets `length`, and changes nothing else. Text is UTF-8 and needs no terminating NUL.
 */
typedef struct PintleBuffer {
    /**
     * Where to write the result.
     */
    uint8_t *pointer;
    /**
     * The size of the buffer in bytes.
     */
    size_t capacity;
    /**
     * The number of bytes written, or, with `PINTLE_BUFFER_TOO_SMALL`, the required capacity.
     */
    size_t length;
} PintleBuffer;

/**
 * The functions of a plugin. The plugin owns this table, which must stay valid and unchanged until the process exits.
 *
 * No function before `usage` may be NULL. Key ids are 1 to 128 arbitrary bytes, not text.
 */
typedef struct PintleBackend {
    /**
     * `sizeof(PintleBackend)` when the plugin was built. Fields beyond it do not exist.
     */
    size_t struct_size;
    /**
     * The plugin's `PINTLE_ABI_MAJOR`.
     */
    uint32_t abi_major;
    /**
     * The plugin's `PINTLE_ABI_MINOR`.
     */
    uint32_t abi_minor;
    /**
     * Opens the backend described by `configuration`, a JSON object, and stores it at `context`.
     *
     * On failure it stores nothing at `context` and writes the reason to `error_text`, in the format of `last_error`;
     * the host does not call `close`.
     */
    int32_t (*open)(struct PintleBytes configuration, struct PintleContext **context, struct PintleBuffer *error_text);
    /**
     * Frees the context. Keys are kept. The host does not use the context again.
     */
    void (*close)(struct PintleContext *context);
    /**
     * Generates a key with this id, or finds the existing key with this id (repeating a call changes nothing), and
     * writes its public key: a DER SubjectPublicKeyInfo (RFC 5280, section 4.1). `algorithm` is a
     * `PintleKeyAlgorithm`.
     *
     * `PINTLE_ERROR_CONFLICT` if the key with this id has another algorithm, `PINTLE_ERROR_UNSUPPORTED` for an
     * algorithm that the device does not support.
     */
    int32_t (*generate)(struct PintleContext *context,
                        struct PintleBytes id,
                        int32_t algorithm,
                        struct PintleBuffer *public_key);
    /**
     * Writes the public key, a DER SubjectPublicKeyInfo. It is the same on every call.
     *
     * `PINTLE_ERROR_NOT_FOUND` only if the key certainly does not exist: not if the device is absent, busy or locked.
     */
    int32_t (*public_key)(struct PintleContext *context, struct PintleBytes id, struct PintleBuffer *public_key);
    /**
     * Signs `digest`. `scheme` is a `PintleSignatureScheme`. `digest` is the message's digest under the scheme's hash
     * function; for Ed25519 it is the message itself.
     *
     * ECDSA signatures are DER (`ECDSA-Sig-Value`, RFC 3279, section 2.2.3). RSA signatures are as long as the
     * modulus, with a PSS salt as long as the digest. Ed25519 signatures are 64 bytes. The host verifies each with the
     * public key.
     */
    int32_t (*sign)(struct PintleContext *context,
                    struct PintleBytes id,
                    int32_t scheme,
                    struct PintleBytes digest,
                    struct PintleBuffer *signature);
    /**
     * Destroys the key. Succeeds if there is no such key.
     */
    int32_t (*delete_key)(struct PintleContext *context, struct PintleBytes id);
    /**
     * Writes the ids of the keys that this backend made for pintle, and no others, in any order and without
     * separators: each is one byte with the id's length, followed by the id.
     */
    int32_t (*list)(struct PintleContext *context, struct PintleBuffer *ids);
    /**
     * Writes how programs outside pintle refer to the key, and stores the `PINTLE_REFERENCE_` kind at `kind`.
     */
    int32_t (*reference)(struct PintleContext *context, struct PintleBytes id, int32_t *kind, struct PintleBuffer *text);
    /**
     * Writes the error of the last failed call on this context: one line that names the object at fault and contains
     * no secret, and, if an operator can act, a second line that says what to do. Writes nothing if there is no error.
     * Must not change the stored error. If it fails, the host continues without the text.
     */
    int32_t (*last_error)(struct PintleContext *context, struct PintleBuffer *text);
    /**
     * Writes the usage of the device's limited resources, one line each: the amount in use, a space, the limit (`-` if
     * unknown), a space, the name, and a line feed, such as `1 16 sessions`. For resources that keys consist of, such
     * as objects, count only those made for pintle; for others, report the device's count.
     *
     * Since 1.1. May be NULL or lie beyond `struct_size`; usage is then not reported.
     */
    int32_t (*usage)(struct PintleContext *context, struct PintleBuffer *lines);
} PintleBackend;

/**
 * The host's version. Valid until the process exits.
 */
typedef struct PintleHost {
    /**
     * `sizeof(PintleHost)` when the host was built. Fields beyond it do not exist.
     */
    size_t struct_size;
    /**
     * The host's `PINTLE_ABI_MAJOR`.
     */
    uint32_t abi_major;
    /**
     * The host's `PINTLE_ABI_MINOR`.
     */
    uint32_t abi_minor;
} PintleHost;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The only symbol that a plugin exports. Returns the plugin's table, or NULL if it does not support this host.
 *
 * The host calls it once each time it loads the shared object, and never unloads the shared object.
 */
extern const struct PintleBackend *pintle_backend_v1(const struct PintleHost *host);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PINTLE_BACKEND_H */
