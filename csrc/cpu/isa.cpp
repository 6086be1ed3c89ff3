// Which instruction set the kernels use.
#include "kernel.h"

#if !defined(MANN_ENTRY_ALONE)
namespace mann::MANN_ISA {
void linked() {} // there where this instruction set's kernels are
} // namespace mann::MANN_ISA
#endif

#if defined(MANN_ENTRY)

#include <atomic>

namespace mann {

#if defined(__x86_64__)
namespace avx2 {
MANN_MAY_BE_ABSENT void linked();
}
namespace avx512 {
MANN_MAY_BE_ABSENT void linked();
}
#endif

static Isa best_isa([[maybe_unused]] Isa limit) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("fma");
    if (limit >= Isa::kAvx512 && avx512::linked && fma && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return limit >= Isa::kAvx512Bf16 && __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
    if (limit >= Isa::kAvx2 && avx2::linked && fma && __builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
#if defined(MANN_ENTRY_ALONE)
    return limit < Isa::kAvx512Bf16 ? best_isa(Isa::kAvx512Bf16) : Isa::kNone; // nothing is as low as the limit
#else
    return Isa::kBaseline;
#endif
}

static std::atomic<int> in_use{static_cast<int>(best_isa(Isa::kAvx512Bf16))};

Isa isa() { return static_cast<Isa>(in_use.load(std::memory_order_relaxed)); }

} // namespace mann

// Uses `limit` (0 baseline, 1 AVX2, 2 AVX-512, 3 with its bfloat16), or the best below it that this machine and this
// library have, or if they have none as low the best of all; a negative limit changes nothing. Returns what is in use
// from now on: -1 where a library for another machine has nothing that runs here.
extern "C" __attribute__((visibility("default"))) int mann_cpu_isa(int limit) {
    if (limit >= 0) mann::in_use = static_cast<int>(mann::best_isa(static_cast<mann::Isa>(limit)));
    return mann::in_use;
}

#endif
