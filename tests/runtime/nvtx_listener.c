/* A tool that listens to NVTX, as Nsight Systems does, for tests: NVTX loads it where NVTX_INJECTION64_PATH points.
   It writes a line per call to the file NVTX_LISTENER_LOG names: domains made, ranges pushed and popped. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* From nvtxTypes.h and nvToolsExt.h of NVTX 3. */
typedef void (*function)(void);
struct callbacks { size_t size; int (*table)(int module, function ***table, unsigned *size); };
struct attributes {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const char *message;
};
enum { CALLBACKS = 1, CORE2 = 5, PUSH = 4, POP = 5, REGISTER_STRING = 10, CREATE_DOMAIN = 12, REGISTERED = 3 };

static FILE *log_file;

static void *create(const char *name) {
    fprintf(log_file, "domain %s\n", name);
    fflush(log_file);
    return strdup(name);
}
static void *register_string(void *domain, const char *text) { return strdup(text); }
static int push(void *domain, const struct attributes *given) {
    fprintf(log_file, "push %s %s\n", (char *)domain, given->message_type == REGISTERED ? given->message : "?");
    fflush(log_file);
    return 0;
}
static int pop(void *domain) {
    fprintf(log_file, "pop %s\n", (char *)domain);
    fflush(log_file);
    return 0;
}

int InitializeInjectionNvtx2(const void *(*exports)(uint32_t)) {
    const struct callbacks *callbacks = exports(CALLBACKS);
    function **table;
    unsigned size;
    if (!callbacks || !callbacks->table(CORE2, &table, &size) || !(log_file = fopen(getenv("NVTX_LISTENER_LOG"), "a")))
        return 0;
    *table[PUSH] = (function)push;
    *table[POP] = (function)pop;
    *table[REGISTER_STRING] = (function)register_string;
    *table[CREATE_DOMAIN] = (function)create;
    return 1;
}
