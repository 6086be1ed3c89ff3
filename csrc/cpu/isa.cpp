// Which instruction set the kernels use.
#include "kernel.h"

#if defined(MANN_ENTRY)

#include <atomic>

namespace mann {

static Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return Isa::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
    return Isa::kBaseline;
}

static std::atomic<int> in_use{static_cast<int>(best_isa())};

Isa isa() { return static_cast<Isa>(in_use.load(std::memory_order_relaxed)); }

} // namespace mann

// Uses `limit` (0 baseline, 1 AVX2, 2 AVX-512), or the best this machine has if that is less; a negative limit changes
// nothing. Returns what is in use from now on.
extern "C" __attribute__((visibility("default"))) int mann_cpu_isa(int limit) {
    const int best = static_cast<int>(mann::best_isa());
    if (limit >= 0) mann::in_use = limit < best ? limit : best;
    return mann::in_use;
}

#endif
