/* Whether this CPU, and the operating system on it, can run an instruction set of
   native_build.py. */

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

int supports(const char *name) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int vnni = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(name, "avx2")) return avx2;
    if (!strcmp(name, "avx512vl")) return avx2 && vnni;
    if (!strcmp(name, "avx512"))
        return vnni && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
    unsigned a, b, c, d;
    if (!strcmp(name, "avxvnni")) /* not every compiler knows its name */
        return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    return 0;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

int supports(const char *name) {
    int dotprod = getauxval(AT_HWCAP) >> 20 & 1, i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
    if (!strcmp(name, "dotprod")) return dotprod;
    return !strcmp(name, "i8mm") && dotprod && i8mm;
}

#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static int has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(feature, &value, &size, NULL, 0) && value;
}
int supports(const char *name) {
    int dotprod = has("hw.optional.arm.FEAT_DotProd");
    if (!strcmp(name, "dotprod")) return dotprod;
    return !strcmp(name, "i8mm") && dotprod && has("hw.optional.arm.FEAT_I8MM");
}

#else

int supports(const char *name) {
    (void)name;
    return 0;
}

#endif
