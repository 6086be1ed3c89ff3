// What the two augmented layers share on the host and in their kernels: the layer of a call.
#pragma once

#if !defined(MANN_CONSTEXPR)
#define MANN_CONSTEXPR constexpr // of the host
#endif

namespace mann::cuda {

// The numbers of the operators' argument `activation`.
enum Activation : int { kRelu, kGelu, kTanh, kIdentity };

MANN_CONSTEXPR int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
MANN_CONSTEXPR int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
MANN_CONSTEXPR int64_t at_least(int64_t n, int64_t least) { return n < least ? least : n; }
MANN_CONSTEXPR int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// G tasks of L examples; the memory of a task has `rows` weights. Without a mixture every example has the one row.
template <typename S> struct AugmentedLayer {
    int64_t G, L, rows;
    const S *x;                      // [G, L, ...], an example in one piece
    const S *weight;                 // [O, ...]
    const S *mix;                    // [G, L, rows] or null
    const S *fast;                   // [G, rows] of [O, ...], these far apart:
    int64_t task_stride, row_stride; // in numbers
};

} // namespace mann::cuda
