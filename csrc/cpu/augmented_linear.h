// The arguments of augmented_linear and the plans of its scratch memory.
#pragma once

#include <algorithm>

#include "augmented.h"
#include "kernel.h"

namespace mann {

constexpr int64_t kLinearRows = 64;    // examples that are computed together
constexpr int64_t kLinearOutputs = 16; // and outputs, in the gradient of the weights
// With fewer examples in a task its weights are read once, as they stand: packing them would cost more.
constexpr int64_t kFewRows = 4;

// Numbers in a packed matrix [K, N] with any instruction set.
inline int64_t panels_bound(int64_t K, int64_t N) { return (N + 47) * K; }

struct AugmentedLinearArgs {
    int64_t G, L, S, I, O;
    int64_t activation;
    const void *x;      // [G, L, I]
    const void *weight; // [O, I]
    FastRows fast;      // [G, S] of [O, I]
    const void *mix;    // [G, L, S] or null (S = 1)
    const void *bias;   // [O] or null
    void *y;            // [G, L, O] out
    void *slopes;       // [2, G, L, O] of arithmetic type out, or null
};

struct AugmentedLinearPlan {
    int64_t x, slow_panels, stacked, fast_panels, slow, fast, mix, bias, size;

    explicit AugmentedLinearPlan(const AugmentedLinearArgs &a) {
        const int64_t rows = std::min(kLinearRows, a.L), packed = a.L < kFewRows ? 0 : 1;
        Plan plan;
        x = plan.take(rows * round_up(a.I, 16));
        slow_panels = plan.take(panels_bound(a.I, a.O));
        stacked = plan.take(packed * a.S * a.O * a.I);
        fast_panels = plan.take(packed * panels_bound(a.I, a.S * a.O));
        slow = plan.take(rows * a.O + 16); // whole vectors are read
        fast = plan.take(rows * a.S * a.O + 16);
        mix = plan.take(rows * a.S);
        bias = plan.take(a.O);
        size = plan.size;
    }
};

struct AugmentedLinearBackwardArgs {
    int64_t G, L, S, I, O;
    const void *dy;     // [G, L, O]
    const void *x;      // [G, L, I]
    const void *weight; // [O, I]
    FastRows fast;      // [G, S] of [O, I]
    const void *mix;    // [G, L, S] or null
    const void *slopes; // [2, G, L, O] of arithmetic type, or null
    void *dslow;        // [G, L, O] of arithmetic type out: before the activations
    void *dfast_y;      // [G, L, O] of arithmetic type out
    void *dx;           // [G, L, I] out
    void *dweight;      // [O, I] out
    void *dfast;        // [G, S, O, I] out
    void *dmix;         // [G, L, S] out
    void *dbias;        // [O] out
};

struct AugmentedLinearBackwardXPlan {
    int64_t dy, x, slow_panels, stacked, fast_panels, dx, products, mix, size;

    explicit AugmentedLinearBackwardXPlan(const AugmentedLinearBackwardArgs &a) {
        const int64_t rows = std::min(kLinearRows, a.L), packed = a.L < kFewRows ? 0 : 1;
        Plan plan;
        dy = plan.take(a.O);
        x = plan.take(round_up(a.I, 16));
        slow_panels = plan.take(panels_bound(a.O, a.I));
        stacked = plan.take(packed * a.S * a.O * a.I);
        fast_panels = plan.take(packed * panels_bound(a.O, a.S * a.I));
        dx = plan.take(rows * a.I + 16);
        products = plan.take(rows * a.S * a.I + 16);
        mix = plan.take(rows * a.S);
        size = plan.size;
    }
};

struct AugmentedLinearBackwardWPlan {
    int64_t panels, factors, slow, fast, mix, size;

    explicit AugmentedLinearBackwardWPlan(const AugmentedLinearBackwardArgs &a) {
        const int64_t rows = std::min(kLinearRows, a.L);
        Plan plan;
        panels = plan.take(panels_bound(rows, a.I));
        factors = plan.take((1 + a.S) * kLinearOutputs * kLinearRows);
        slow = plan.take(kLinearOutputs * a.I);
        fast = plan.take(a.S * kLinearOutputs * a.I);
        mix = plan.take(rows * a.S);
        size = plan.size;
    }
};

} // namespace mann
