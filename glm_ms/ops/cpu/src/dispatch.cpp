#include "dispatch.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <cstring>

namespace glm {

namespace scalar { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace neon { extern const Kernels table; }
namespace neondot { extern const Kernels table; }

namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
#if defined(GLM_TRANSLATED)
    return has_avx2();
#else
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#endif
}
#endif

#if defined(__aarch64__)
bool has_dot() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;  // every Apple processor with this architecture
#endif
}
#endif

struct Candidate {
    const Kernels* table;
    bool (*usable)();
};

// The best first.
const Candidate CANDIDATES[] = {
#if defined(__x86_64__)
    {&avx512::table, has_avx512},
    {&avx2::table, has_avx2},
#elif defined(__aarch64__)
    {&neondot::table, has_dot},
    {&neon::table, always},
#endif
    {&scalar::table, always},
};

const Kernels* choose(const char* wanted) {
    for (const Candidate& candidate : CANDIDATES)
        if (candidate.usable() && (!wanted || std::strcmp(wanted, candidate.table->isa) == 0)) return candidate.table;
    return nullptr;
}

const char* requested() {
    const char* name = std::getenv("GLM_MS_ISA");
    return name && *name ? name : nullptr;
}

}  // namespace

const Kernels& kernels() {
    static const Kernels* const chosen = choose(requested()) ? choose(requested()) : choose(nullptr);
    return *chosen;
}

bool requested_isa_is_missing() { return requested() && !choose(requested()); }

}  // namespace glm
