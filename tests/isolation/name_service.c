/* Preloaded: adds a user and a group that only the name service knows, like those of LDAP and SSSD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <grp.h>
#include <pwd.h>
#include <stddef.h>
#include <string.h>

typedef int (*passwd_lookup)(const char *, struct passwd *, char *, size_t, struct passwd **);
typedef int (*group_lookup)(const char *, struct group *, char *, size_t, struct group **);

int getpwnam_r(const char *name, struct passwd *entry, char *buffer, size_t length, struct passwd **result) {
    static char empty[] = "", known[] = "directory-user";
    if (strcmp(name, known) != 0)
        return ((passwd_lookup)dlsym(RTLD_NEXT, "getpwnam_r"))(name, entry, buffer, length, result);
    *entry = (struct passwd){known, empty, 47110, 47111, empty, empty, empty};
    *result = entry;
    return 0;
}

int getgrnam_r(const char *name, struct group *entry, char *buffer, size_t length, struct group **result) {
    static char empty[] = "", known[] = "directory-group", *members[] = {NULL};
    if (strcmp(name, known) != 0)
        return ((group_lookup)dlsym(RTLD_NEXT, "getgrnam_r"))(name, entry, buffer, length, result);
    *entry = (struct group){known, empty, 47112, members};
    *result = entry;
    return 0;
}
