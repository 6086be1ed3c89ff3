// In which form mann_sequence runs: a pure function of sizes, batch and device.
#pragma once

#include <cstdint>

namespace mann::cuda {

struct MannSizes {
    int64_t T, B, N, W, R, H;
    bool write_add, key_strength;
    int64_t number_bytes; // of arithmetic
    int64_t fragment = 0; // numbers of a lane's share of weights for tensor cores (tensor.h); 0: not on those

    int64_t words() const { return R * W; }
    int64_t head() const { return words() + R + (key_strength ? R : 0) + (write_add ? words() : 0); }
    int64_t recurrent() const { return H + words(); }
};

constexpr int kRowThreads = 256; // of a block that has rows of a memory in its registers

// Clusters of `blocks` blocks with `examples` examples, the slots of each in `parts` of the blocks; 0 blocks: not on
// clusters. `held`: weight_hh in registers (forward), else in shared memory.
struct MannPlan {
    int blocks = 0, examples = 1, parts = 1;
    bool held_forward = false, held_backward = false, tensor = false;
    int64_t forward_bytes = 0, backward_bytes = 0; // of shared memory of a block
};

MannPlan mann_plan(const MannSizes &sizes, int64_t shared_limit, int multiprocessors);
// The same for lrua_sequence, whose clusters take an example each: as many blocks as parts, and no H.
MannPlan lrua_plan(const MannSizes &sizes, int64_t shared_limit, int multiprocessors);

} // namespace mann::cuda
