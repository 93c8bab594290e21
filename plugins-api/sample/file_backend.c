/*
 * A complete pintle plugin in C: private keys in PEM files, using OpenSSL's libcrypto.
 *
 * It is a sample to copy. For a device, replace the middle part, which reads and writes files, by calls to the device.
 * To keep keys in files, use pintle's own file backend.
 *
 * Configuration: {"directory": "/absolute/path/of/an/existing/directory"}
 */
#define _GNU_SOURCE
#include "pintle_backend.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>
#include <openssl/x509.h>

/* State between calls. The host never makes two calls on one context at once, so no lock is needed. */
struct PintleContext {
    char directory[PATH_MAX];
    char error[512];
};

/* Stores the error text for last_error and returns the code. */
static int32_t fail(PintleContext *context, int32_t code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(context->error, sizeof context->error, format, arguments);
    va_end(arguments);
    return code;
}

/* Writes a result into the host's buffer. If the buffer is too small, the host calls again with a larger one. */
static int32_t answer(PintleBuffer *buffer, const void *content, size_t length) {
    buffer->length = length;
    if (length > buffer->capacity) {
        return PINTLE_BUFFER_TOO_SMALL;
    }
    if (length > 0) {
        memcpy(buffer->pointer, content, length);
    }
    return PINTLE_OK;
}

/* --- Files ------------------------------------------------------------------------------------------------------- */

/* Ids are arbitrary bytes, so the file name is the id in hexadecimal. */
static int32_t path_of(PintleContext *context, PintleBytes id, char path[PATH_MAX]) {
    char name[2 * PINTLE_KEY_ID_MAXIMUM_LENGTH + 1];
    if (id.length == 0 || id.length > PINTLE_KEY_ID_MAXIMUM_LENGTH) {
        return fail(context, PINTLE_ERROR_CORRUPT, "a key id of %zu bytes", id.length);
    }
    for (size_t i = 0; i < id.length; i++) {
        snprintf(name + 2 * i, 3, "%02x", id.pointer[i]);
    }
    if (2 * id.length + strlen(".pem") > NAME_MAX) {
        return fail(context, PINTLE_ERROR_UNSUPPORTED, "the key id is too long for a file name");
    }
    if (snprintf(path, PATH_MAX, "%s/%s.pem", context->directory, name) >= PATH_MAX) {
        return fail(context, PINTLE_ERROR_UNSUPPORTED, "the path of a key would be too long");
    }
    return PINTLE_OK;
}

static int32_t read_key(PintleContext *context, PintleBytes id, EVP_PKEY **key) {
    char path[PATH_MAX];
    int32_t code = path_of(context, id, path);
    if (code != PINTLE_OK) {
        return code;
    }
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        /* NOT_FOUND makes the agent generate a key, so return it only if the key certainly does not exist: not if
         * access
         * is denied, and not if the directory is missing, because it may not be mounted yet. */
        int reason = errno;
        if (reason == ENOENT && access(context->directory, F_OK) == 0) {
            return fail(context, PINTLE_ERROR_NOT_FOUND, "key %s does not exist", path);
        }
        return fail(context, PINTLE_ERROR_UNAVAILABLE, "cannot read %s: %s", path, strerror(reason));
    }
    *key = PEM_read_PrivateKey(file, NULL, NULL, NULL);
    fclose(file);
    if (*key == NULL) {
        /* The second line says what the operator can do. */
        return fail(context, PINTLE_ERROR_CORRUPT, "%s contains no private key\nrestore it from a backup, or remove it",
                    path);
    }
    return PINTLE_OK;
}

/* Atomic: writes the key to a temporary file, syncs it, and only then gives it its name. */
static int32_t write_key(PintleContext *context, PintleBytes id, EVP_PKEY *key) {
    char path[PATH_MAX], unfinished[PATH_MAX + 16];
    int32_t code = path_of(context, id, path);
    if (code != PINTLE_OK) {
        return code;
    }
    snprintf(unfinished, sizeof unfinished, "%s/.new-XXXXXX", context->directory);
    int descriptor = mkostemp(unfinished, O_CLOEXEC); /* mode 0600 */
    FILE *file = descriptor < 0 ? NULL : fdopen(descriptor, "w");
    if (file == NULL) {
        return fail(context, PINTLE_ERROR_UNAVAILABLE, "cannot write to %s: %s", context->directory, strerror(errno));
    }
    int written = PEM_write_PKCS8PrivateKey(file, key, NULL, NULL, 0, NULL, NULL) == 1 && fflush(file) == 0 &&
                  fsync(descriptor) == 0;
    written = fclose(file) == 0 && written;
    /* link() does not replace a file: if another process has made this key in the meantime, that key is kept. */
    if (!written || (link(unfinished, path) != 0 && errno != EEXIST)) {
        code = fail(context, PINTLE_ERROR_UNAVAILABLE, "cannot write %s: %s", path, strerror(errno));
    }
    unlink(unfinished);
    return code;
}

/* A new file name is durable once the directory is synced. */
static int32_t synchronize(PintleContext *context) {
    int directory = open(context->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int done = directory >= 0 && fsync(directory) == 0;
    if (directory >= 0) {
        close(directory);
    }
    return done ? PINTLE_OK : fail(context, PINTLE_ERROR_UNAVAILABLE, "cannot synchronize %s", context->directory);
}

/* --- Keys -------------------------------------------------------------------------------------------------------- */

static EVP_PKEY *make_key(int32_t algorithm) {
    switch (algorithm) {
    case PINTLE_KEY_ALGORITHM_ECDSA_P256:
        return EVP_PKEY_Q_keygen(NULL, NULL, "EC", "P-256");
    case PINTLE_KEY_ALGORITHM_ECDSA_P384:
        return EVP_PKEY_Q_keygen(NULL, NULL, "EC", "P-384");
    case PINTLE_KEY_ALGORITHM_RSA2048:
        return EVP_PKEY_Q_keygen(NULL, NULL, "RSA", (size_t)2048);
    case PINTLE_KEY_ALGORITHM_ED25519:
        return EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
    default:
        return NULL;
    }
}

/* The PintleKeyAlgorithm of a key, or 0. */
static int32_t algorithm_of(EVP_PKEY *key) {
    int bits = EVP_PKEY_get_bits(key);
    if (EVP_PKEY_is_a(key, "EC")) {
        return bits == 256 ? PINTLE_KEY_ALGORITHM_ECDSA_P256 : bits == 384 ? PINTLE_KEY_ALGORITHM_ECDSA_P384 : 0;
    }
    if (EVP_PKEY_is_a(key, "RSA")) {
        return bits == 2048 ? PINTLE_KEY_ALGORITHM_RSA2048 : 0;
    }
    return EVP_PKEY_is_a(key, "ED25519") ? PINTLE_KEY_ALGORITHM_ED25519 : 0;
}

static int32_t answer_public_key(PintleContext *context, EVP_PKEY *key, PintleBuffer *buffer) {
    unsigned char *der = NULL;
    int length = i2d_PUBKEY(key, &der);
    if (length <= 0) {
        return fail(context, PINTLE_ERROR_CORRUPT, "cannot encode the public key");
    }
    int32_t code = answer(buffer, der, (size_t)length);
    OPENSSL_free(der);
    return code;
}

/* The algorithm, hash function and padding of a signature scheme. */
struct Scheme {
    int32_t algorithm;
    const EVP_MD *hash;
    int padding;
};

static int scheme_of(int32_t number, struct Scheme *scheme) {
    switch (number) {
    case PINTLE_SIGNATURE_SCHEME_ECDSA_P256_SHA256:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_ECDSA_P256, EVP_sha256(), 0};
        return 1;
    case PINTLE_SIGNATURE_SCHEME_ECDSA_P384_SHA384:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_ECDSA_P384, EVP_sha384(), 0};
        return 1;
    case PINTLE_SIGNATURE_SCHEME_RSA_PKCS1_SHA256:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_RSA2048, EVP_sha256(), RSA_PKCS1_PADDING};
        return 1;
    case PINTLE_SIGNATURE_SCHEME_RSA_PKCS1_SHA384:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_RSA2048, EVP_sha384(), RSA_PKCS1_PADDING};
        return 1;
    case PINTLE_SIGNATURE_SCHEME_RSA_PKCS1_SHA512:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_RSA2048, EVP_sha512(), RSA_PKCS1_PADDING};
        return 1;
    case PINTLE_SIGNATURE_SCHEME_RSA_PSS_SHA256:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_RSA2048, EVP_sha256(), RSA_PKCS1_PSS_PADDING};
        return 1;
    case PINTLE_SIGNATURE_SCHEME_RSA_PSS_SHA384:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_RSA2048, EVP_sha384(), RSA_PKCS1_PSS_PADDING};
        return 1;
    case PINTLE_SIGNATURE_SCHEME_RSA_PSS_SHA512:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_RSA2048, EVP_sha512(), RSA_PKCS1_PSS_PADDING};
        return 1;
    case PINTLE_SIGNATURE_SCHEME_ED25519:
        *scheme = (struct Scheme){PINTLE_KEY_ALGORITHM_ED25519, NULL, 0};
        return 1;
    default:
        return 0;
    }
}

/* Signs a digest, or for Ed25519 the message itself. Returns 1 on success. */
static int make_signature(EVP_PKEY *key, struct Scheme scheme, PintleBytes digest, unsigned char *out, size_t *length) {
    int done = 0;
    if (scheme.hash == NULL) {
        EVP_MD_CTX *signing = EVP_MD_CTX_new();
        done = signing != NULL && EVP_DigestSignInit(signing, NULL, NULL, NULL, key) == 1 &&
               EVP_DigestSign(signing, out, length, digest.pointer, digest.length) == 1;
        EVP_MD_CTX_free(signing);
        return done;
    }
    EVP_PKEY_CTX *signing = EVP_PKEY_CTX_new(key, NULL);
    done = signing != NULL && EVP_PKEY_sign_init(signing) == 1 &&
           (scheme.padding == 0 || EVP_PKEY_CTX_set_rsa_padding(signing, scheme.padding) == 1) &&
           EVP_PKEY_CTX_set_signature_md(signing, scheme.hash) == 1 &&
           (scheme.padding != RSA_PKCS1_PSS_PADDING ||
            EVP_PKEY_CTX_set_rsa_pss_saltlen(signing, RSA_PSS_SALTLEN_DIGEST) == 1) &&
           EVP_PKEY_sign(signing, out, length, digest.pointer, digest.length) == 1;
    EVP_PKEY_CTX_free(signing);
    return done;
}

/* --- The functions of the table ---------------------------------------------------------------------------------- */

/* A single field needs no JSON library: {"directory": "..."}, without escapes. */
static int32_t open_backend(PintleBytes configuration, PintleContext **context, PintleBuffer *error_text) {
    static const char advice[] = "the configuration must be {\"directory\": \"/path/of/an/existing/directory\"}";
    char text[PATH_MAX + 64];
    char directory[PATH_MAX];
    char after = 0;
    int end = 0;
    struct stat status;
    if (configuration.length >= sizeof text) {
        answer(error_text, advice, sizeof advice - 1);
        return PINTLE_ERROR_UNSUPPORTED;
    }
    memcpy(text, configuration.pointer, configuration.length);
    text[configuration.length] = '\0';
    if (sscanf(text, " { \"directory\" : \"%4095[^\"\\]\" %c %n", directory, &after, &end) != 2 || after != '}' ||
        text[end] != '\0' || directory[0] != '/') {
        answer(error_text, advice, sizeof advice - 1);
        return PINTLE_ERROR_UNSUPPORTED;
    }
    if (stat(directory, &status) != 0 || !S_ISDIR(status.st_mode)) {
        static const char absent[] = "the key directory does not exist\ncreate or mount it";
        answer(error_text, absent, sizeof absent - 1);
        return PINTLE_ERROR_UNAVAILABLE;
    }
    PintleContext *opened = calloc(1, sizeof *opened);
    if (opened == NULL) {
        return PINTLE_ERROR_UNAVAILABLE;
    }
    strcpy(opened->directory, directory);
    *context = opened;
    return PINTLE_OK;
}

static void close_backend(PintleContext *context) {
    free(context);
}

static int32_t generate(PintleContext *context, PintleBytes id, int32_t algorithm, PintleBuffer *public_key) {
    EVP_PKEY *key = NULL;
    /* The agent repeats a call whose result it did not receive: return an existing key. */
    int32_t code = read_key(context, id, &key);
    if (code == PINTLE_ERROR_NOT_FOUND) {
        EVP_PKEY *made = make_key(algorithm);
        if (made == NULL) {
            return fail(context, PINTLE_ERROR_UNSUPPORTED, "key algorithm %d is not supported", (int)algorithm);
        }
        code = write_key(context, id, made);
        EVP_PKEY_free(made);
        if (code == PINTLE_OK) {
            code = read_key(context, id, &key);
        }
    }
    if (code == PINTLE_OK) {
        code = synchronize(context);
    }
    if (code == PINTLE_OK && algorithm_of(key) != algorithm) {
        code = fail(context, PINTLE_ERROR_CONFLICT, "the key with this id has another algorithm");
    }
    if (code == PINTLE_OK) {
        code = answer_public_key(context, key, public_key);
    }
    EVP_PKEY_free(key);
    return code;
}

static int32_t public_key_of(PintleContext *context, PintleBytes id, PintleBuffer *public_key) {
    EVP_PKEY *key = NULL;
    int32_t code = read_key(context, id, &key);
    if (code == PINTLE_OK) {
        code = answer_public_key(context, key, public_key);
    }
    EVP_PKEY_free(key);
    return code;
}

static int32_t sign(PintleContext *context, PintleBytes id, int32_t number, PintleBytes digest,
                    PintleBuffer *signature) {
    unsigned char bytes[1024];
    size_t length = sizeof bytes;
    struct Scheme scheme;
    EVP_PKEY *key = NULL;
    int32_t code = read_key(context, id, &key);
    if (code != PINTLE_OK) {
        return code;
    }
    if (!scheme_of(number, &scheme) || scheme.algorithm != algorithm_of(key)) {
        code = fail(context, PINTLE_ERROR_UNSUPPORTED, "the key cannot use signature scheme %d", (int)number);
    } else if (!make_signature(key, scheme, digest, bytes, &length)) {
        code = fail(context, PINTLE_ERROR_UNAVAILABLE, "signing failed");
    } else {
        code = answer(signature, bytes, length);
    }
    EVP_PKEY_free(key);
    return code;
}

static int32_t delete_key(PintleContext *context, PintleBytes id) {
    char path[PATH_MAX];
    int32_t code = path_of(context, id, path);
    if (code != PINTLE_OK) {
        return code;
    }
    if (unlink(path) != 0 && errno != ENOENT) {
        return fail(context, PINTLE_ERROR_UNAVAILABLE, "cannot remove %s: %s", path, strerror(errno));
    }
    return synchronize(context);
}

/* The inverse of path_of: decodes a file name to an id. Returns the id's length, or 0 if it is not a key file. */
static size_t id_of(const char *name, uint8_t id[PINTLE_KEY_ID_MAXIMUM_LENGTH]) {
    size_t digits = strspn(name, "0123456789abcdef");
    if (digits == 0 || digits % 2 != 0 || digits / 2 > PINTLE_KEY_ID_MAXIMUM_LENGTH ||
        strcmp(name + digits, ".pem") != 0) {
        return 0;
    }
    for (size_t i = 0; i < digits / 2; i++) {
        char pair[3] = {name[2 * i], name[2 * i + 1], '\0'};
        id[i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return digits / 2;
}

static int32_t list(PintleContext *context, PintleBuffer *ids) {
    DIR *directory = opendir(context->directory);
    if (directory == NULL) {
        return fail(context, PINTLE_ERROR_UNAVAILABLE, "cannot read %s: %s", context->directory, strerror(errno));
    }
    ids->length = 0;
    for (struct dirent *entry = readdir(directory); entry != NULL; entry = readdir(directory)) {
        uint8_t id[PINTLE_KEY_ID_MAXIMUM_LENGTH];
        size_t length = id_of(entry->d_name, id);
        if (length == 0) {
            continue;
        }
        /* One byte with the length, then the id. Ids that do not fit still count towards the length. */
        if (ids->length + 1 + length <= ids->capacity) {
            ids->pointer[ids->length] = (uint8_t)length;
            memcpy(ids->pointer + ids->length + 1, id, length);
        }
        ids->length += 1 + length;
    }
    closedir(directory);
    return ids->length > ids->capacity ? PINTLE_BUFFER_TOO_SMALL : PINTLE_OK;
}

static int32_t reference(PintleContext *context, PintleBytes id, int32_t *kind, PintleBuffer *text) {
    char path[PATH_MAX];
    EVP_PKEY *key = NULL;
    int32_t code = read_key(context, id, &key);
    EVP_PKEY_free(key);
    if (code == PINTLE_OK) {
        code = path_of(context, id, path);
    }
    if (code != PINTLE_OK) {
        return code;
    }
    *kind = PINTLE_REFERENCE_FILE;
    return answer(text, path, strlen(path));
}

static int32_t last_error(PintleContext *context, PintleBuffer *text) {
    return answer(text, context->error, strlen(context->error));
}

static const PintleBackend table = {
    .struct_size = sizeof(PintleBackend),
    .abi_major = PINTLE_ABI_MAJOR,
    .abi_minor = PINTLE_ABI_MINOR,
    .open = open_backend,
    .close = close_backend,
    .generate = generate,
    .public_key = public_key_of,
    .sign = sign,
    .delete_key = delete_key,
    .list = list,
    .reference = reference,
    .last_error = last_error,
};

__attribute__((visibility("default"))) const PintleBackend *pintle_backend_v1(const PintleHost *host) {
    return host->abi_major == PINTLE_ABI_MAJOR ? &table : NULL;
}
