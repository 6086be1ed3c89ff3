// The memory over time for keys that are known beforehand.
#pragma once

#include "memory_backward.h"
#include "plan.h"

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
    // For backward, each out or null. The copies of the state, of arithmetic type, are taken after every
    // checkpoint_every steps but the last ones.
    int32_t *saved_least_used; // [T, B, R], real steps only (others are zero)
    void *saved_memory;        // [copies(), B, N, W]
    void *saved_read_weights;  // [copies(), B, R, N]
};

struct LruaSequenceBackwardArgs {
    StepOptions options;
    int64_t T, B, checkpoint_every;
    const void *dreads;            // [T, B, R, W]
    const void *dnew_memory;       // [B, N, W] or null (zero)
    const void *dnew_read_weights; // [B, R, N] or null (zero)
    const void *memory;            // as forward
    const void *read_weights;
    const void *key;
    const void *gate;
    const void *beta;
    const void *add;
    const int64_t *lengths;
    const int32_t *saved_least_used;
    const void *saved_memory;
    const void *saved_read_weights;
    void *dmemory;       // [B, N, W] out
    void *dread_weights; // [B, R, N] out
    void *dkey;          // [T, B, R, W] out
    void *dgate;         // [T, B, R] out
    void *dbeta;         // [T, B, R] out; not touched where beta is null
    void *dadd;          // [T, B, R, W] out; not touched where add is null
};

// Copies of the state in an episode: the first segment starts from the inputs.
inline int64_t copies(int64_t T, int64_t checkpoint_every) { return T > 0 ? (T - 1) / checkpoint_every : 0; }

namespace MANN_ISA {

// The scratch of one thread, which takes one example after the other.
struct LruaForwardPlan : Plan {
    int64_t memory, usage, row_squares; // [W, P], [P] twice
    int64_t weights, write_weights;     // [2, R, P], before and after a step, in turn; [R, P]
    int64_t reads, input, slots;        // [R, W], a StepInput, [R] of int32_t
    LruaForwardPlan(const StepOptions &o, int64_t P) {
        memory = take(o.W * P), usage = take(P), row_squares = take(P);
        weights = take(2 * o.R * P), write_weights = take(o.R * P);
        reads = take(o.R * o.W), input = take(2 * o.R * (o.W + 1)), slots = take(o.R);
    }
};
struct LruaBackwardPlan : Plan {
    int64_t memory, dmemory, dweights, weights0, write_weights; // [W, P] twice, [R, P] three times
    int64_t records, restarts, step_scratch;                    // of a segment; step_backward_scratch
    int64_t dreads, dkey, dadd, dgate, dbeta, input;            // [R, W] three times, [R] twice, a StepInput
    LruaBackwardPlan(const StepOptions &o, int64_t P, int64_t T, int64_t checkpoint_every) {
        const int64_t segment = std::min(T, checkpoint_every);
        memory = take(o.W * P), dmemory = take(o.W * P);
        dweights = take(o.R * P), weights0 = take(o.R * P), write_weights = take(o.R * P);
        records = take(segment * step_record_size(o, P)), restarts = take(restarts_size(o, P, segment));
        step_scratch = take(step_backward_scratch(o, P));
        dreads = take(o.R * o.W), dkey = take(o.R * o.W), dadd = take(o.R * o.W);
        dgate = take(o.R), dbeta = take(o.R), input = take(2 * o.R * (o.W + 1));
    }
};

} // namespace MANN_ISA
} // namespace mann
