/*
 * Plugins that break their promises, for the tests. A macro FAULT_… chooses what is wrong with the table; what is wrong
 * with the answers is the configuration.
 */
#include "pintle_backend.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct PintleContext {
    char fault[64];
    int calls;
};

/* SubjectPublicKeyInfo of P-256 with the base point, and with its double. */
#define PREFIX                                                                                                         \
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,   \
        0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04
static const uint8_t key_one[] = {
    PREFIX, 0x6b, 0x17, 0xd1, 0xf2, 0xe1, 0x2c, 0x42, 0x47, 0xf8, 0xbc, 0xe6, 0xe5, 0x63, 0xa4, 0x40, 0xf2,
    0x77,   0x03, 0x7d, 0x81, 0x2d, 0xeb, 0x33, 0xa0, 0xf4, 0xa1, 0x39, 0x45, 0xd8, 0x98, 0xc2, 0x96, 0x4f,
    0xe3,   0x42, 0xe2, 0xfe, 0x1a, 0x7f, 0x9b, 0x8e, 0xe7, 0xeb, 0x4a, 0x7c, 0x0f, 0x9e, 0x16, 0x2b, 0xce,
    0x33,   0x57, 0x6b, 0x31, 0x5e, 0xce, 0xcb, 0xb6, 0x40, 0x68, 0x37, 0xbf, 0x51, 0xf5};
static const uint8_t key_two[] = {
    PREFIX, 0x7c, 0xf2, 0x7b, 0x18, 0x8d, 0x03, 0x4f, 0x7e, 0x8a, 0x52, 0x38, 0x03, 0x04, 0xb5, 0x1a, 0xc3,
    0xc0,   0x89, 0x69, 0xe2, 0x77, 0xf2, 0x1b, 0x35, 0xa6, 0x0b, 0x48, 0xfc, 0x47, 0x66, 0x99, 0x78, 0x07,
    0x77,   0x55, 0x10, 0xdb, 0x8e, 0xd0, 0x40, 0x29, 0x3d, 0x9a, 0xc6, 0x9f, 0x74, 0x30, 0xdb, 0xba, 0x7d,
    0xad,   0xe6, 0x3c, 0xe9, 0x82, 0x29, 0x9e, 0x04, 0xb7, 0x9d, 0x22, 0x78, 0x73, 0xd1};

static int is(PintleContext *context, const char *fault) {
    return strcmp(context->fault, fault) == 0;
}

static int32_t answer(PintleBuffer *buffer, const void *content, size_t length) {
    buffer->length = length;
    if (length > buffer->capacity) {
        return PINTLE_BUFFER_TOO_SMALL;
    }
    memcpy(buffer->pointer, content, length);
    return PINTLE_OK;
}

/* The faults that any function can have. */
static int32_t lie(PintleContext *context, PintleBuffer *buffer, const void *truth, size_t length) {
    if (is(context, "oversized length")) {
        buffer->length = SIZE_MAX;
        return PINTLE_OK;
    }
    if (is(context, "one byte too long")) {
        buffer->length = buffer->capacity + 1;
        return PINTLE_OK;
    }
    if (is(context, "greedy")) {
        buffer->length = SIZE_MAX;
        return PINTLE_BUFFER_TOO_SMALL;
    }
    if (is(context, "never enough")) {
        buffer->length = buffer->capacity + 1;
        return PINTLE_BUFFER_TOO_SMALL;
    }
    if (is(context, "too small for less")) {
        buffer->length = buffer->capacity - 1;
        return PINTLE_BUFFER_TOO_SMALL;
    }
    if (is(context, "other buffer")) {
        buffer->pointer = NULL;
        buffer->capacity = SIZE_MAX;
        buffer->length = SIZE_MAX / 2;
        return PINTLE_OK;
    }
    if (is(context, "writes nothing")) {
        buffer->length = buffer->capacity;
        return PINTLE_OK;
    }
    if (is(context, "unknown code")) {
        return -99;
    }
    if (is(context, "positive code")) {
        return 1;
    }
    if (is(context, "error without text") || is(context, "lying error text") || is(context, "nasty error text")) {
        return PINTLE_ERROR_UNAVAILABLE;
    }
    return answer(buffer, truth, length);
}

static int32_t open_backend(PintleBytes configuration, PintleContext **context, PintleBuffer *error_text) {
    PintleContext *opened = calloc(1, sizeof *opened);
    memcpy(opened->fault, configuration.pointer,
           configuration.length < sizeof opened->fault ? configuration.length : sizeof opened->fault - 1);
    if (is(opened, "no context")) {
        free(opened);
        return PINTLE_OK;
    }
    if (is(opened, "open fails")) {
        free(opened);
        answer(error_text, "the device\n is\x1b[31m gone", 22);
        return PINTLE_ERROR_UNAVAILABLE;
    }
    if (is(opened, "open fails with a lie")) {
        free(opened);
        error_text->length = SIZE_MAX;
        return PINTLE_ERROR_LOCKED;
    }
    *context = opened;
    return PINTLE_OK;
}

static void close_backend(PintleContext *context) {
    free(context);
}

static int32_t public_key_of(PintleContext *context, PintleBytes id, PintleBuffer *public_key) {
    (void)id;
    context->calls++;
    if (is(context, "garbage public key")) {
        return answer(public_key, "garbage", 7);
    }
    if (is(context, "another public key") && context->calls > 1) {
        return answer(public_key, key_two, sizeof key_two);
    }
    return lie(context, public_key, key_one, sizeof key_one);
}

static int32_t generate(PintleContext *context, PintleBytes id, int32_t algorithm, PintleBuffer *public_key) {
    (void)algorithm;
    return public_key_of(context, id, public_key);
}

static int32_t sign(PintleContext *context, PintleBytes id, int32_t scheme, PintleBytes digest, PintleBuffer *signature) {
    (void)id;
    (void)scheme;
    (void)digest;
    /* Well-formed, and of another key: r = s = 1. */
    static const uint8_t forged[] = {0x30, 0x06, 0x02, 0x01, 0x01, 0x02, 0x01, 0x01};
    if (is(context, "empty signature")) {
        return answer(signature, "", 0);
    }
    return lie(context, signature, forged, sizeof forged);
}

static int32_t delete_key(PintleContext *context, PintleBytes id) {
    (void)id;
    return is(context, "unknown code") ? -99 : is(context, "positive code") ? 1 : PINTLE_OK;
}

static int32_t list(PintleContext *context, PintleBuffer *ids) {
    if (is(context, "list of an empty id")) {
        return answer(ids, "\0\1a", 3);
    }
    if (is(context, "list that ends early")) {
        return answer(ids, "\1a\5b", 4);
    }
    if (is(context, "list of a long id")) {
        static const uint8_t bytes[201] = {200};
        return answer(ids, bytes, sizeof bytes);
    }
    return lie(context, ids, "\1a\2bc", 5);
}

static int32_t reference(PintleContext *context, PintleBytes id, int32_t *kind, PintleBuffer *text) {
    (void)id;
    *kind = PINTLE_REFERENCE_URI;
    if (is(context, "unknown reference")) {
        *kind = 17;
    }
    if (is(context, "relative file")) {
        *kind = PINTLE_REFERENCE_FILE;
        return answer(text, "key.pem", 7);
    }
    if (is(context, "reference of no text")) {
        return answer(text, "a:\xff", 3);
    }
    return lie(context, text, "faulty:key", 10);
}

static int32_t last_error(PintleContext *context, PintleBuffer *text) {
    if (is(context, "lying error text")) {
        text->length = SIZE_MAX;
        return PINTLE_OK;
    }
    if (is(context, "nasty error text")) {
        return answer(text, "\x1b[2Jlevel=info\xff\xfe done\r\nhint\x07 of it\nmore", 38);
    }
    return answer(text, "", 0);
}

static int32_t usage(PintleContext *context, PintleBuffer *lines) {
#if defined(FAULT_VERSION_1_0)
    abort(); /* What lies beyond struct_size is not called. */
#endif
    if (is(context, "resource of no name")) {
        return answer(lines, "1 - sessions\n1 - \n", 18);
    }
    if (is(context, "resource of no number")) {
        return answer(lines, "-1 - sessions\n", 14);
    }
    if (is(context, "resource with a nasty name")) {
        return answer(lines, "1 - \x1b[2Jsessions\n", 17);
    }
    return lie(context, lines, "1 16 sessions\n2 - key slots\n", 28);
}

#if defined(FAULT_SHORT_TABLE)
/* Nothing lies behind these fields. */
static const struct {
    size_t struct_size;
    uint32_t abi_major, abi_minor;
} table = {sizeof table, PINTLE_ABI_MAJOR, PINTLE_ABI_MINOR};
#else
static const PintleBackend table = {
#if defined(FAULT_VERSION_1_0)
    .struct_size = offsetof(PintleBackend, usage),
#else
    .struct_size = sizeof(PintleBackend),
#endif
#if defined(FAULT_MAJOR)
    .abi_major = PINTLE_ABI_MAJOR + 1,
#else
    .abi_major = PINTLE_ABI_MAJOR,
#endif
    .abi_minor = PINTLE_ABI_MINOR,
    .open = open_backend,
    .close = close_backend,
    .generate = generate,
    .public_key = public_key_of,
#if !defined(FAULT_MISSING)
    .sign = sign,
#endif
    .delete_key = delete_key,
    .list = list,
    .reference = reference,
    .last_error = last_error,
    .usage = usage,
};
#endif

#if defined(FAULT_SYMBOL)
#define pintle_backend_v1 pintle_backend_v2
const PintleBackend *pintle_backend_v2(const PintleHost *host);
#endif

const PintleBackend *pintle_backend_v1(const PintleHost *host) {
    (void)host;
    /* Not every fault uses every function. */
    (void)open_backend, (void)close_backend, (void)generate, (void)sign, (void)delete_key, (void)list;
    (void)reference, (void)last_error, (void)usage, (void)&table;
#if defined(FAULT_NULL)
    return NULL;
#elif defined(FAULT_MISALIGNED)
    return (const PintleBackend *)((const char *)&table + 1);
#else
    return (const PintleBackend *)&table;
#endif
}
