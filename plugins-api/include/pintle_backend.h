/*
 * The C ABI of a pintle key backend: what a shared object exports so that pintle can keep a node's private key in it.
 *
 * Threads: every function blocks for as long as the device takes. The host never makes two calls on one context at
 * once, but successive calls may come from different threads, and calls on different contexts may overlap. There are
 * no callbacks. No exception and no longjmp may leave a function. The host makes its calls on a thread, or in a
 * process, of their own; a process that does not answer by its deadline is killed.
 *
 * Memory: the caller owns every argument. What a PintleBytes points to is valid during the call only; results go into
 * the caller's PintleBuffer. Nothing that one side allocates is freed by the other.
 *
 * Growth: both tables begin with their size and version and grow only at the end. Read a field only if it lies within
 * struct_size. Numbers never change their meaning.
 *
 * Answers: PINTLE_OK, a PintleError (what the caller does next decides which), or PINTLE_BUFFER_TOO_SMALL. The host
 * believes nothing else: it parses public keys, verifies signatures and checks lengths.
 *
 * Trust: a plugin runs with the host's privileges. pintle loads one only from a path that nobody but root can change.
 *
 * Generated from plugins-api/src by its tests; do not edit.
 */

#ifndef PINTLE_BACKEND_H
#define PINTLE_BACKEND_H

#include <stddef.h>
#include <stdint.h>

/**
 * The major version of this ABI. It is also in the name of the exported symbol: another major version is another
 * symbol, and one shared object may export several.
 */
#define PINTLE_ABI_MAJOR 1

/**
 * The minor version of this ABI: it grows by one when a table grows at its end.
 */
#define PINTLE_ABI_MINOR 1

/**
 * A function succeeded. Every other answer is a `PintleError` or `PINTLE_BUFFER_TOO_SMALL`.
 */
#define PINTLE_OK 0

/**
 * The result does not fit the caller's buffer. The buffer's `length` is the capacity that it needs; the host calls
 * again with a larger buffer, so a repeated call must be harmless.
 */
#define PINTLE_BUFFER_TOO_SMALL -64

/**
 * `PintleBackend::reference` answers the absolute path of a PEM file that holds the private key itself.
 */
#define PINTLE_REFERENCE_FILE 1

/**
 * `PintleBackend::reference` answers PEM text that names the key without holding it, such as `TSS2 PRIVATE KEY`.
 */
#define PINTLE_REFERENCE_PEM 2

/**
 * `PintleBackend::reference` answers a URI, such as `pkcs11:` (RFC 7512).
 */
#define PINTLE_REFERENCE_URI 3

/**
 * The longest id of a key, in octets.
 */
#define PINTLE_KEY_ID_MAXIMUM_LENGTH 128

/**
 * What the caller does about a [`BackendError`].
 *
 * The numbers are those of the C ABI and of the isolation protocol, and never change their meaning.
 */
enum PintleError
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * There certainly is no key with this id. Make one.
     */
    PINTLE_ERROR_NOT_FOUND = -1,
    /**
     * A different key has this id. Choose another id.
     */
    PINTLE_ERROR_CONFLICT = -2,
    /**
     * A PIN is missing, refused or locked out. A person must act; the same PIN is never tried again.
     */
    PINTLE_ERROR_LOCKED = -3,
    /**
     * The device does not answer, or is busy. Try again later; keys are intact as far as anybody knows.
     */
    PINTLE_ERROR_UNAVAILABLE = -4,
    /**
     * The device is there and the key is gone for good (cleared TPM, re-initialised token). Enrol again.
     */
    PINTLE_ERROR_KEY_LOST = -5,
    /**
     * The backend cannot do this. Choose another algorithm or backend.
     */
    PINTLE_ERROR_UNSUPPORTED = -6,
    /**
     * What was stored or answered makes no sense. A person must look.
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
 * An open backend: whatever a plugin keeps between calls. Only the plugin looks inside.
 */
typedef struct PintleContext PintleContext;

/**
 * Octets that the caller owns and the callee reads during the call only. Text is UTF-8 and has no terminating NUL.
 */
typedef struct PintleBytes {
    /**
     * The first octet; may be NULL if there are none.
     */
    const uint8_t *pointer;
    /**
     * How many there are.
     */
    size_t length;
} PintleBytes;

/**
 * A buffer that the caller owns and the callee fills during the call. The callee writes at most `capacity` octets at
 * `pointer`, sets `length`, and changes nothing else. Text is UTF-8 and needs no terminating NUL.
 */
typedef struct PintleBuffer {
    /**
     * Where the octets go.
     */
    uint8_t *pointer;
    /**
     * How many octets fit.
     */
    size_t capacity;
    /**
     * How many octets were written, or, with `PINTLE_BUFFER_TOO_SMALL`, how many must fit.
     */
    size_t length;
} PintleBuffer;

/**
 * What a plugin can do. The plugin owns the table, which is valid and unchanged as long as the process lives.
 *
 * No function before `usage` may be NULL. Key ids are 1 to 128 arbitrary octets, not text.
 */
typedef struct PintleBackend {
    /**
     * `sizeof(PintleBackend)` as the plugin was built. A field that lies beyond it does not exist.
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
     * Opens the backend that `configuration`, a JSON object, describes, and stores it at `context`.
     *
     * On failure nothing is stored, nothing needs closing, and `error_text` says why as `last_error` would.
     */
    int32_t (*open)(struct PintleBytes configuration, struct PintleContext **context, struct PintleBuffer *error_text);
    /**
     * Frees the context. Keys stay where they are. The context is not used again.
     */
    void (*close)(struct PintleContext *context);
    /**
     * Generates a key under `id`, or finds the key that already has this id (a repeat changes nothing), and writes
     * its public half: a DER SubjectPublicKeyInfo (RFC 5280, section 4.1). `algorithm` is a `PintleKeyAlgorithm`.
     *
     * `PINTLE_ERROR_CONFLICT` if the key with this id is of another algorithm, `PINTLE_ERROR_UNSUPPORTED` for an
     * algorithm that the device does not have.
     */
    int32_t (*generate)(struct PintleContext *context,
                        struct PintleBytes id,
                        int32_t algorithm,
                        struct PintleBuffer *public_key);
    /**
     * Writes the public half of the key, a DER SubjectPublicKeyInfo. It is the same every time.
     *
     * `PINTLE_ERROR_NOT_FOUND` only if there certainly is no such key: not when the device is absent, busy or locked.
     */
    int32_t (*public_key)(struct PintleContext *context, struct PintleBytes id, struct PintleBuffer *public_key);
    /**
     * Signs. `scheme` is a `PintleSignatureScheme`. `digest` is the message's digest by the scheme's hash function;
     * with Ed25519 it is the message itself.
     *
     * ECDSA signatures are DER (`ECDSA-Sig-Value`, RFC 3279, section 2.2.3), RSA ones as long as the modulus, with a
     * PSS salt as long as the digest; Ed25519 ones have 64 octets. The host verifies each under the public key.
     */
    int32_t (*sign)(struct PintleContext *context,
                    struct PintleBytes id,
                    int32_t scheme,
                    struct PintleBytes digest,
                    struct PintleBuffer *signature);
    /**
     * Destroys the key. If there is none that is a success too.
     */
    int32_t (*delete_key)(struct PintleContext *context, struct PintleBytes id);
    /**
     * Writes the ids of the keys that this backend made for pintle, and of no others, in any order and without
     * separators: each is one octet with the id's length, followed by the id.
     */
    int32_t (*list)(struct PintleContext *context, struct PintleBuffer *ids);
    /**
     * Writes how a program outside pintle names the key, and at `kind` which of the `PINTLE_REFERENCE_` kinds it is.
     */
    int32_t (*reference)(struct PintleContext *context, struct PintleBytes id, int32_t *kind, struct PintleBuffer *text);
    /**
     * Writes what went wrong in the latest call on this context that failed: one line that names the thing at fault
     * and holds no secret, and, where a person can do something about it, a second line that says what. Empty if
     * there is nothing to say. Must not change what it reports, and if it fails the host does without the text.
     */
    int32_t (*last_error)(struct PintleContext *context, struct PintleBuffer *text);
    /**
     * Writes how much is taken of what the device can run out of, one line each, ended by a line feed: how much is
     * taken, a space, how much there is (`-` if that is not known), a space, and what it is, such as
     * `1 16 sessions`. Of what keys consist of, such as objects, those made for pintle are counted; of everything
     * else, what the device counts.
     *
     * Since 1.1. May be NULL, or lie beyond `struct_size`: then nothing is said.
     */
    int32_t (*usage)(struct PintleContext *context, struct PintleBuffer *lines);
} PintleBackend;

/**
 * What the host tells a plugin about itself. Valid as long as the process lives.
 */
typedef struct PintleHost {
    /**
     * `sizeof(PintleHost)` as the host was built. A field that lies beyond it does not exist.
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
 * The one symbol that a plugin exports. Returns its table, or NULL if it cannot work with this host.
 *
 * The host calls it once for each time that it loads the shared object, and never unloads it.
 */
extern const struct PintleBackend *pintle_backend_v1(const struct PintleHost *host);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PINTLE_BACKEND_H */
