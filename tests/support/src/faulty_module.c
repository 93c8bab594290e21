/*
 * A PKCS#11 2.40 module that forwards every call to the module PINTLE_TEST_REAL_MODULE, and injects the fault that is in
 * the file PINTLE_TEST_FAULT: "<place> <action>", or "<place> <action> <times>", which counts down.
 *
 * Actions: segfault, exit, hang, or a return value such as 0x30.
 *
 * Places, in the order of their functions below:
 *   initialize        C_Initialize
 *   token-info        C_GetTokenInfo
 *   limits            C_GetTokenInfo, which then counts sessions and public memory, whatever the action
 *   login             C_Login
 *   destroy           C_DestroyObject
 *   extractable       C_GetAttributeValue, which then reports the key as extractable, whatever the action
 *   sign-init         C_SignInit
 *   pss               C_SignInit with one of the mechanisms of RSASSA-PSS
 *   sign              C_Sign, including calls that only ask for the signature's size
 *   sign-in-use       C_Sign, except for the first signature after a generation: the backend tests each new key at once
 *   garbage           C_Sign, which then returns a wrong signature, whatever the action
 *   before-generate   C_GenerateKeyPair, before the key is generated
 *   after-generate    C_GenerateKeyPair, after the key has been generated, so that the result is lost
 *
 * If these variables are set, each login appends one byte to the file PINTLE_TEST_LOGINS, and the id of the process
 * that has opened the module is written to the file PINTLE_TEST_PROCESS.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long CK_ULONG;
typedef struct { CK_ULONG type; void *value; CK_ULONG length; } CK_ATTRIBUTE;
typedef struct { unsigned char major, minor; void *functions[68]; } CK_FUNCTION_LIST;

/* Positions in CK_FUNCTION_LIST (PKCS #11 v2.40, section 5.1). */
enum {
    INITIALIZE = 0,
    GET_TOKEN_INFO = 6,
    LOGIN = 18,
    DESTROY_OBJECT = 22,
    GET_ATTRIBUTE_VALUE = 24,
    SIGN_INIT = 42,
    SIGN = 43,
    GENERATE_KEY_PAIR = 59
};
enum { CKA_EXTRACTABLE = 0x162 };
enum { CKM_RSA_PKCS_PSS = 0x0D, CKM_SHA256_RSA_PKCS_PSS = 0x43, CKM_SHA512_RSA_PKCS_PSS = 0x45 };

static CK_FUNCTION_LIST real, faulty;
static int is_tried = 1;

/* The real function at this position, cast to these parameter types. */
#define REAL(position, ...) ((CK_ULONG(*)(__VA_ARGS__))real.functions[position])

/* Whether the fault file names this place. If so, stores the action, and decrements its count. */
static int is_due(const char *place, char action[32])
{
    const char *path = getenv("PINTLE_TEST_FAULT");
    char where[32];
    unsigned times;
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return 0;
    int fields = fscanf(file, "%31s %31s %u", where, action, &times);
    fclose(file);
    if (fields < 2 || strcmp(where, place) != 0 || (fields == 3 && times == 0))
        return 0;
    if (fields == 3 && (file = fopen(path, "w"))) {
        fprintf(file, "%s %s %u\n", where, action, times - 1);
        fclose(file);
    }
    return 1;
}

/* Injects the fault at this place, if any. Whether the call should return, and with which value. */
static int fails(const char *place, CK_ULONG *answer)
{
    char action[32];
    if (!is_due(place, action))
        return 0;
    if (strcmp(action, "segfault") == 0) {
        /* Not raise(): Rust's handler ignores a signal that no instruction has caused. */
        int *volatile nowhere = (int *)8;
        fprintf(stderr, "faulty module: about to fail\n");
        *nowhere = 1;
    }
    if (strcmp(action, "exit") == 0)
        _exit(3);
    while (strcmp(action, "hang") == 0)
        pause();
    *answer = strtoul(action, NULL, 0);
    return 1;
}

static CK_ULONG initialize(void *arguments)
{
    CK_ULONG answer;
    if (fails("initialize", &answer))
        return answer;
    return REAL(INITIALIZE, void *)(arguments);
}

static CK_ULONG get_token_info(CK_ULONG slot, void *info)
{
    char action[32];
    CK_ULONG answer;
    if (fails("token-info", &answer))
        return answer;
    answer = REAL(GET_TOKEN_INFO, CK_ULONG, void *)(slot, info);
    if (answer == 0 && is_due("limits", action)) {
        /* CK_TOKEN_INFO: after 96 bytes of text, flags, sessions (most, open; most and open that write), lengths of
           PINs, public memory (total, free). */
        CK_ULONG *numbers = (CK_ULONG *)((char *)info + 96);
        numbers[1] = 16, numbers[2] = 3, numbers[3] = 4, numbers[4] = 2, numbers[7] = 1000, numbers[8] = 600;
    }
    return answer;
}

static CK_ULONG login(CK_ULONG session, CK_ULONG user, void *pin, CK_ULONG length)
{
    const char *path = getenv("PINTLE_TEST_LOGINS");
    CK_ULONG answer;
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) {
        fputc('.', file);
        fclose(file);
    }
    if (fails("login", &answer))
        return answer;
    return REAL(LOGIN, CK_ULONG, CK_ULONG, void *, CK_ULONG)(session, user, pin, length);
}

static CK_ULONG destroy_object(CK_ULONG session, CK_ULONG object)
{
    CK_ULONG answer;
    if (fails("destroy", &answer))
        return answer;
    return REAL(DESTROY_OBJECT, CK_ULONG, CK_ULONG)(session, object);
}

static CK_ULONG get_attribute_value(CK_ULONG session, CK_ULONG object, CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    char action[32];
    CK_ULONG answer =
        REAL(GET_ATTRIBUTE_VALUE, CK_ULONG, CK_ULONG, CK_ATTRIBUTE *, CK_ULONG)(session, object, attributes, count);
    for (CK_ULONG i = 0; i < count; i++)
        if (attributes[i].type == CKA_EXTRACTABLE && attributes[i].value && is_due("extractable", action))
            *(unsigned char *)attributes[i].value = 1;
    return answer;
}

static CK_ULONG sign_init(CK_ULONG session, void *mechanism, CK_ULONG key)
{
    CK_ULONG answer, type = *(CK_ULONG *)mechanism;
    int is_pss = type == CKM_RSA_PKCS_PSS || (type >= CKM_SHA256_RSA_PKCS_PSS && type <= CKM_SHA512_RSA_PKCS_PSS);
    if (fails("sign-init", &answer) || (is_pss && fails("pss", &answer)))
        return answer;
    return REAL(SIGN_INIT, CK_ULONG, void *, CK_ULONG)(session, mechanism, key);
}

static CK_ULONG sign(CK_ULONG session, void *data, CK_ULONG length, unsigned char *signature, CK_ULONG *size)
{
    char action[32];
    CK_ULONG answer;
    /* Without an output buffer, the call only asks for the signature's size. */
    int is_in_use = signature && is_tried;
    if (signature)
        is_tried = 1;
    if (fails("sign", &answer) || (is_in_use && fails("sign-in-use", &answer)))
        return answer;
    answer = REAL(SIGN, CK_ULONG, void *, CK_ULONG, unsigned char *, CK_ULONG *)(session, data, length, signature, size);
    if (answer == 0 && signature && is_due("garbage", action))
        signature[*size - 1] ^= 1;
    return answer;
}

static CK_ULONG generate_key_pair(CK_ULONG session, void *mechanism, void *public_attributes, CK_ULONG public_count,
                                  void *private_attributes, CK_ULONG private_count, CK_ULONG *public_key,
                                  CK_ULONG *private_key)
{
    CK_ULONG answer, other;
    if (fails("before-generate", &answer))
        return answer;
    answer = REAL(GENERATE_KEY_PAIR, CK_ULONG, void *, void *, CK_ULONG, void *, CK_ULONG, CK_ULONG *, CK_ULONG *)(
        session, mechanism, public_attributes, public_count, private_attributes, private_count, public_key, private_key);
    if (answer == 0 && fails("after-generate", &other))
        return other;
    is_tried = 0;
    return answer;
}

CK_ULONG C_GetFunctionList(CK_FUNCTION_LIST **list)
{
    const char *path = getenv("PINTLE_TEST_REAL_MODULE"), *process = getenv("PINTLE_TEST_PROCESS");
    void *module = path ? dlopen(path, RTLD_NOW) : NULL;
    CK_ULONG (*get)(CK_FUNCTION_LIST **) =
        module ? (CK_ULONG(*)(CK_FUNCTION_LIST **))dlsym(module, "C_GetFunctionList") : NULL;
    CK_FUNCTION_LIST *functions;
    if (!get || get(&functions) != 0)
        return 5; /* CKR_GENERAL_ERROR */
    FILE *file = process ? fopen(process, "w") : NULL;
    if (file) {
        fprintf(file, "%d", (int)getpid());
        fclose(file);
    }
    real = faulty = *functions;
    faulty.functions[INITIALIZE] = initialize;
    faulty.functions[GET_TOKEN_INFO] = get_token_info;
    faulty.functions[LOGIN] = login;
    faulty.functions[DESTROY_OBJECT] = destroy_object;
    faulty.functions[GET_ATTRIBUTE_VALUE] = get_attribute_value;
    faulty.functions[SIGN_INIT] = sign_init;
    faulty.functions[SIGN] = sign;
    faulty.functions[GENERATE_KEY_PAIR] = generate_key_pair;
    *list = &faulty;
    return 0;
}
