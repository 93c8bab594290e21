/*
 * A PKCS#11 2.40 module that passes everything on to the module PINTLE_TEST_REAL_MODULE, until the file
 * PINTLE_TEST_FAULT says "<place> <deed>", such as "sign segfault". Logins are counted in PINTLE_TEST_LOGINS, one octet
 * each, and the process that has the module open is named in PINTLE_TEST_PROCESS.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long CK_ULONG;
typedef struct { unsigned char major, minor; void *functions[68]; } CK_FUNCTION_LIST;

/* Positions in CK_FUNCTION_LIST (PKCS #11 v2.40, section 5.1). */
enum { LOGIN = 18, SIGN = 43, GENERATE_KEY_PAIR = 59 };

static CK_FUNCTION_LIST real, treacherous;

static void betray(const char *place)
{
    const char *path = getenv("PINTLE_TEST_FAULT");
    char where[32] = "", deed[32] = "";
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return;
    int fields = fscanf(file, "%31s %31s", where, deed);
    fclose(file);
    if (fields != 2 || strcmp(where, place) != 0)
        return;
    if (strcmp(deed, "segfault") == 0) {
        fprintf(stderr, "treacherous module: about to fail\n");
        *(volatile int *)8 = 1;
    }
    if (strcmp(deed, "hang") == 0)
        for (;;)
            pause();
    if (strcmp(deed, "exit") == 0)
        _exit(3);
}

static CK_ULONG login(CK_ULONG session, CK_ULONG user, void *pin, CK_ULONG length)
{
    FILE *file = fopen(getenv("PINTLE_TEST_LOGINS"), "a");
    if (file) {
        fputc('.', file);
        fclose(file);
    }
    betray("login");
    return ((CK_ULONG(*)(CK_ULONG, CK_ULONG, void *, CK_ULONG))real.functions[LOGIN])(session, user, pin, length);
}

static CK_ULONG sign(CK_ULONG session, void *data, CK_ULONG length, unsigned char *signature, CK_ULONG *size)
{
    betray("sign");
    return ((CK_ULONG(*)(CK_ULONG, void *, CK_ULONG, unsigned char *, CK_ULONG *))real.functions[SIGN])(
        session, data, length, signature, size);
}

static CK_ULONG generate_key_pair(CK_ULONG session, void *mechanism, void *public_attributes, CK_ULONG public_count,
                                  void *private_attributes, CK_ULONG private_count, CK_ULONG *public_key,
                                  CK_ULONG *private_key)
{
    betray("before-generate");
    CK_ULONG answer =
        ((CK_ULONG(*)(CK_ULONG, void *, void *, CK_ULONG, void *, CK_ULONG, CK_ULONG *, CK_ULONG *))
             real.functions[GENERATE_KEY_PAIR])(session, mechanism, public_attributes, public_count, private_attributes,
                                                private_count, public_key, private_key);
    betray("after-generate");
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
    FILE *file = fopen(getenv("PINTLE_TEST_PROCESS"), "w");
    if (file) {
        fprintf(file, "%d", (int)getpid());
        fclose(file);
    }
    real = treacherous = *functions;
    treacherous.functions[LOGIN] = login;
    treacherous.functions[SIGN] = sign;
    treacherous.functions[GENERATE_KEY_PAIR] = generate_key_pair;
    *list = &treacherous;
    return 0;
}
