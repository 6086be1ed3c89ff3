// Which form of mann_sequence runs at which sizes: a pure function.
#pragma once

#include "mann_sequence_backward.h"
#include "mann_sequence_forward.h"

namespace mann::cuda {

struct MannPlan {
    int tile = 0;                                  // blocks of a cluster, and examples; 0: the sizes do not fit
    int64_t forward_bytes = 0, backward_bytes = 0; // of shared memory; of the last form tried if none fits
};

template <typename S, int tile> MannPlan mann_plan_of(const MannSizes &sizes) {
    const MannSizes s = sizes.with_tile(tile);
    const MemoryShape memory = MemoryShape::of(s.N, s.W, s.R, kThreads, true);
    const bool shares = tile * s.units <= kThreads && HeldRows<tile, S>::fits(4 * s.units) &&
                        s.padded<S>() <= kMostColumns && s.head <= kMostColumns;
    return {shares ? tile : 0, MannForwardLayout<S>::template of<tile>(s, memory).bytes,
            MannBackwardLayout<S>::template of<tile>(s, memory).bytes};
}
// The smallest cluster that has room for the weights: the more clusters there are at once. shared_limit: bytes of
// shared memory that a block may have.
template <typename S> MannPlan mann_plan(const MannSizes &s, int64_t shared_limit) {
    for (const auto plan : {mann_plan_of<S, 4>(s), mann_plan_of<S, 8>(s)}) {
        if (plan.tile > 0 && std::max(plan.forward_bytes, plan.backward_bytes) <= shared_limit) return plan;
    }
    MannPlan none = mann_plan_of<S, 8>(s);
    none.tile = 0;
    return none;
}

} // namespace mann::cuda
