// The memory over time for keys that are known beforehand; one step is a sequence of length 1.
#pragma once

#include "kernel.h"

namespace mann {

struct LruaSequenceArgs {
    StepOptions options;
    int64_t T, B, checkpoint_every;
    const void *memory;       // [B, N, W]
    const void *usage;        // [B, N]
    const void *read_weights; // [B, R, N]
    const void *key;          // [T, B, R, W]
    const void *gate;         // [T, B, R], before the sigmoid
    const void *beta;         // [T, B, R] or null
    const void *add;          // [T, B, R, W] or null: the key is written
    const int64_t *lengths;   // [B] or null
    void *reads;              // [T, B, R, W] out
    void *new_memory;         // [B, N, W] out
    void *new_usage;          // [B, N] out
    void *new_read_weights;   // [B, R, N] out
    // For backward, each out or null. Those over slots are padded and of arithmetic type, and hold real steps only.
    void *saved_read_weights;  // [T, B, R, P]
    int32_t *saved_least_used; // [T, B, R]
    void *saved_erased;        // [T, B, erased, W]
    void *saved_memory;        // [ceil(T / checkpoint_every), B, W, P]: after every so many steps, and after the last
};

struct LruaSequenceBackwardArgs {
    StepOptions options;
    int64_t T, B, checkpoint_every;
    const void *dreads;            // [T, B, R, W]
    const void *dnew_memory;       // [B, N, W] or null (zero)
    const void *dnew_read_weights; // [B, R, N] or null (zero)
    const void *read_weights;      // [B, R, N], before the first step
    const void *key;               // as forward
    const void *gate;
    const void *beta;
    const void *add;
    const int64_t *lengths;
    const void *saved_read_weights; // as forward, or null for one step: new_read_weights instead
    const int32_t *saved_least_used;
    const void *saved_erased; // or null for one step: the memory before it is not wanted
    const void *saved_memory; // or null for one step: new_memory instead
    const void *new_memory, *new_read_weights;
    void *dmemory;       // [B, N, W] out
    void *dread_weights; // [B, R, N] out
    void *dkey;          // [T, B, R, W] out
    void *dgate;         // [T, B, R] out
    void *dbeta;         // [T, B, R] out; not touched where beta is null
    void *dadd;          // [T, B, R, W] out; not touched where add is null
};

// Numbers of scratch for one thread.
inline int64_t lrua_sequence_scratch(int64_t P, int64_t W, int64_t R) {
    return W * P + 2 * P + 3 * R * P + 3 * R * W + 3 * R;
}
inline int64_t lrua_sequence_backward_scratch(int64_t P, int64_t W, int64_t R) {
    return 2 * W * P + 2 * P + 7 * R * P + 7 * R * W + 4 * R;
}

Kernel lrua_sequence_pick();
Kernel lrua_sequence_backward_pick();

} // namespace mann
