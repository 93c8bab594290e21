/*
 * A PKCS#11 2.40 module that passes everything on to the module PINTLE_TEST_REAL_MODULE, and crashes or hangs where the
 * file PINTLE_TEST_FAULT says, for as long as it is there: "segfault-in-sign", "hang-in-sign", or "hang-in-generate",
 * which hangs after the key is made and before anybody is told.
 */
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long CK_ULONG;
typedef struct { unsigned char major, minor; void *functions[68]; } CK_FUNCTION_LIST;

/* Positions in CK_FUNCTION_LIST (PKCS #11 v2.40, section 5.1). */
enum { SIGN = 43, GENERATE_KEY_PAIR = 59 };

static CK_FUNCTION_LIST real, faulty;
static int is_tried;

static int is_due(const char *fault)
{
    const char *path = getenv("PINTLE_TEST_FAULT");
    char words[64] = "";
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return 0;
    int fields = fscanf(file, "%63s", words);
    fclose(file);
    return fields == 1 && strcmp(words, fault) == 0;
}

static void hang(void)
{
    for (;;)
        pause();
}

static CK_ULONG sign(CK_ULONG session, void *data, CK_ULONG length, unsigned char *signature, CK_ULONG *size)
{
    /* The backend tries each new key at once. That one goes well: what is to fail is a signature that somebody needs. */
    if (is_tried || !signature) {
        /* Without a place for it, only the signature's size is asked for. */
        is_tried = is_tried && !signature;
    } else if (is_due("segfault-in-sign")) {
        raise(SIGSEGV);
    } else if (is_due("hang-in-sign")) {
        hang();
    }
    return ((CK_ULONG(*)(CK_ULONG, void *, CK_ULONG, unsigned char *, CK_ULONG *))real.functions[SIGN])(
        session, data, length, signature, size);
}

static CK_ULONG generate_key_pair(CK_ULONG session, void *mechanism, void *public_attributes, CK_ULONG public_count,
                                  void *private_attributes, CK_ULONG private_count, CK_ULONG *public_key,
                                  CK_ULONG *private_key)
{
    CK_ULONG answer = ((CK_ULONG(*)(CK_ULONG, void *, void *, CK_ULONG, void *, CK_ULONG, CK_ULONG *, CK_ULONG *))
                           real.functions[GENERATE_KEY_PAIR])(session, mechanism, public_attributes, public_count,
                                                              private_attributes, private_count, public_key, private_key);
    if (is_due("hang-in-generate"))
        hang();
    is_tried = 1;
    return answer;
}

CK_ULONG C_GetFunctionList(CK_FUNCTION_LIST **list)
{
    const char *path = getenv("PINTLE_TEST_REAL_MODULE");
    void *module = path ? dlopen(path, RTLD_NOW) : NULL;
    CK_ULONG (*get)(CK_FUNCTION_LIST **) =
        module ? (CK_ULONG(*)(CK_FUNCTION_LIST **))dlsym(module, "C_GetFunctionList") : NULL;
    CK_FUNCTION_LIST *functions;
    if (!get || get(&functions) != 0)
        return 5; /* CKR_GENERAL_ERROR */
    real = faulty = *functions;
    faulty.functions[SIGN] = sign;
    faulty.functions[GENERATE_KEY_PAIR] = generate_key_pair;
    *list = &faulty;
    return 0;
}
