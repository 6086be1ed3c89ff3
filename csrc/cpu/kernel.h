// How a kernel meets the instruction sets and the storage types.
//
// A kernel is a template <typename S> void name(const Args &, int64_t begin, int64_t end, void *scratch) over the
// examples [begin, end), in the namespace MANN_ISA. Its source file is compiled once per instruction set; MANN_KERNEL
// makes of each a plain function. The file's entry points, compiled once (MANN_ENTRY), call the one that isa() names.
// In a library for one machine they may stand alone (MANN_ENTRY_ALONE), without the baseline's kernels.
#pragma once

#include <cstdint>

namespace mann {

enum class Storage { kFloat, kDouble, kBf16 };

using Kernel = void (*)(Storage, const void *args, int64_t begin, int64_t end, void *scratch);

// The step options that the arguments of the memory kernels carry.
struct StepOptions {
    int64_t N, W, R;
    bool shared, erase_all; // least-used slots: n-hot for every head, or one each; which of them are erased
    double decay, eps;
};

// Rows [G, S] that may lie apart; strides in numbers.
struct FastRows {
    const void *data;
    int64_t task_stride, row_stride;
};

// The last is AVX-512 with the dot products of bfloat16: the same kernels, which ask for it.
enum class Isa { kNone = -1, kBaseline, kAvx2, kAvx512, kAvx512Bf16 };
Isa isa(); // in isa.cpp; never one that this library was linked without

// A library for one machine may be linked without an instruction set: its kernels are null then.
#define MANN_MAY_BE_ABSENT __attribute__((weak))

} // namespace mann

#if defined(MANN_ENTRY_ALONE)
#define MANN_KERNEL(name, Args) MANN_PICK(name)
#define MANN_BASELINE(name) nullptr
#else
#define MANN_BASELINE(name) baseline::name##_kernel
#define MANN_KERNEL(name, Args)                                                                                        \
    namespace mann::MANN_ISA {                                                                                         \
    void name##_kernel(Storage storage, const void *args, int64_t begin, int64_t end, void *scratch) {                 \
        const Args &a = *static_cast<const Args *>(args);                                                              \
        if (storage == Storage::kFloat) name<float>(a, begin, end, scratch);                                           \
        if (storage == Storage::kDouble) name<double>(a, begin, end, scratch);                                         \
        if (storage == Storage::kBf16) name<Bf16>(a, begin, end, scratch);                                             \
    }                                                                                                                  \
    }                                                                                                                  \
    MANN_PICK(name)
#endif

#if !defined(MANN_ENTRY)
#define MANN_PICK(name)
#elif defined(__x86_64__)
#define MANN_PICK(name)                                                                                                \
    namespace mann::avx2 {                                                                                             \
    MANN_MAY_BE_ABSENT void name##_kernel(Storage, const void *, int64_t, int64_t, void *);                            \
    }                                                                                                                  \
    namespace mann::avx512 {                                                                                           \
    MANN_MAY_BE_ABSENT void name##_kernel(Storage, const void *, int64_t, int64_t, void *);                            \
    }                                                                                                                  \
    namespace mann {                                                                                                   \
    Kernel name##_pick() {                                                                                             \
        const Isa set = isa();                                                                                         \
        return set >= Isa::kAvx512 ? avx512::name##_kernel                                                             \
                                   : (set == Isa::kAvx2 ? avx2::name##_kernel : MANN_BASELINE(name));                  \
    }                                                                                                                  \
    }
#else
#define MANN_PICK(name)                                                                                                \
    namespace mann {                                                                                                   \
    Kernel name##_pick() { return MANN_BASELINE(name); }                                                               \
    }
#endif
