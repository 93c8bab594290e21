/*
 * A PKCS#11 2.40 module that passes everything on to the module PINTLE_TEST_REAL_MODULE, except what the file
 * PINTLE_TEST_FAULT says: "<where> <return value> <times>", such as "sign-init 0x30 1". It stands for the module that
 * nobody has tested with.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long CK_ULONG;
typedef struct { CK_ULONG type; void *value; CK_ULONG length; } CK_ATTRIBUTE;
typedef struct { unsigned char major, minor; void *functions[68]; } CK_FUNCTION_LIST;

/* Positions in CK_FUNCTION_LIST (PKCS #11 v2.40, section 5.1). */
enum { LOGIN = 18, GET_ATTRIBUTE_VALUE = 24, SIGN_INIT = 42, SIGN = 43, GENERATE_KEY_PAIR = 59 };
enum { CKA_EXTRACTABLE = 0x162 };

static CK_FUNCTION_LIST real, faulty;

/* Whether the fault is due here; then it is due one time less. */
static int due(const char *where, CK_ULONG *value)
{
    const char *path = getenv("PINTLE_TEST_FAULT");
    char place[32];
    unsigned times = 0;
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return 0;
    int fields = fscanf(file, "%31s %li %u", place, (long *)value, &times);
    fclose(file);
    if (fields != 3 || times == 0 || strcmp(place, where) != 0)
        return 0;
    if ((file = fopen(path, "w"))) {
        fprintf(file, "%s %#lx %u\n", place, *value, times - 1);
        fclose(file);
    }
    return 1;
}

static CK_ULONG login(CK_ULONG session, CK_ULONG user, void *pin, CK_ULONG length)
{
    CK_ULONG value;
    if (due("login", &value))
        return value;
    return ((CK_ULONG(*)(CK_ULONG, CK_ULONG, void *, CK_ULONG))real.functions[LOGIN])(session, user, pin, length);
}

static CK_ULONG get_attribute_value(CK_ULONG session, CK_ULONG object, CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    CK_ULONG value, answer;
    answer = ((CK_ULONG(*)(CK_ULONG, CK_ULONG, CK_ATTRIBUTE *, CK_ULONG))real.functions[GET_ATTRIBUTE_VALUE])(
        session, object, attributes, count);
    for (CK_ULONG i = 0; i < count; i++)
        if (attributes[i].type == CKA_EXTRACTABLE && attributes[i].value && due("extractable", &value))
            *(unsigned char *)attributes[i].value = 1;
    return answer;
}

static CK_ULONG sign_init(CK_ULONG session, void *mechanism, CK_ULONG key)
{
    CK_ULONG value;
    if (due("sign-init", &value))
        return value;
    return ((CK_ULONG(*)(CK_ULONG, void *, CK_ULONG))real.functions[SIGN_INIT])(session, mechanism, key);
}

static CK_ULONG sign(CK_ULONG session, void *data, CK_ULONG length, unsigned char *signature, CK_ULONG *size)
{
    CK_ULONG value, answer;
    answer = ((CK_ULONG(*)(CK_ULONG, void *, CK_ULONG, unsigned char *, CK_ULONG *))real.functions[SIGN])(
        session, data, length, signature, size);
    if (answer == 0 && signature && due("garbage", &value))
        signature[*size - 1] ^= 1;
    return answer;
}

static CK_ULONG generate_key_pair(CK_ULONG session, void *mechanism, void *public_attributes, CK_ULONG public_count,
                                  void *private_attributes, CK_ULONG private_count, CK_ULONG *public_key,
                                  CK_ULONG *private_key)
{
    CK_ULONG value, answer;
    answer = ((CK_ULONG(*)(CK_ULONG, void *, void *, CK_ULONG, void *, CK_ULONG, CK_ULONG *, CK_ULONG *))
                  real.functions[GENERATE_KEY_PAIR])(session, mechanism, public_attributes, public_count,
                                                     private_attributes, private_count, public_key, private_key);
    /* The key is made, and the answer is lost. */
    return answer == 0 && due("generated", &value) ? value : answer;
}

CK_ULONG C_GetFunctionList(CK_FUNCTION_LIST **list)
{
    const char *path = getenv("PINTLE_TEST_REAL_MODULE");
    void *module = path ? dlopen(path, RTLD_NOW) : NULL;
    CK_ULONG (*get)(CK_FUNCTION_LIST **) = module ? (CK_ULONG(*)(CK_FUNCTION_LIST **))dlsym(module, "C_GetFunctionList") : NULL;
    CK_FUNCTION_LIST *functions;
    if (!get || get(&functions) != 0)
        return 5; /* CKR_GENERAL_ERROR */
    real = faulty = *functions;
    faulty.functions[LOGIN] = login;
    faulty.functions[GET_ATTRIBUTE_VALUE] = get_attribute_value;
    faulty.functions[SIGN_INIT] = sign_init;
    faulty.functions[SIGN] = sign;
    faulty.functions[GENERATE_KEY_PAIR] = generate_key_pair;
    *list = &faulty;
    return 0;
}
