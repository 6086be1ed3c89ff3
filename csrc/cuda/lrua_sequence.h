// What lrua_sequence's kernels on clusters are given. B examples, T steps, N slots of W numbers, R heads.
#pragma once

#include "restart.h"

namespace mann::cuda {

template <typename S> struct LruaForward {
    int steps, batch, checkpoint_every;
    double decay, eps;
    const S *key, *gate, *beta, *add;       // [T, B, R, W], [T, B, R] a logit, [T, B, R] or null, [T, B, R, W] or null
    const S *memory, *usage, *read_weights; // [B, N, W], [B, N], [B, R, N]
    const int64_t *lengths;                 // [B] or null
    S *reads;                               // [T, B, R, W] out
    S *memory1, *usage1, *read_weights1;    // as the state above, out
    // For backward, all out or all null. The copies of the state are taken after every checkpoint_every steps but the
    // last ones.
    int32_t *saved_least_used;                   // [T, B, R]
    Arith<S> *saved_memory, *saved_read_weights; // [copies, B, N, W], [copies, B, R, N]
};

template <typename S> struct LruaBackward {
    int steps, batch, checkpoint_every;
    double eps;
    const S *dreads, *dmemory1, *dread_weights1;       // [T, B, R, W]; of the state after the last step, each or null
    const S *key, *gate, *beta, *add;                  // as forward
    const S *memory, *read_weights;                    // as forward
    const int64_t *lengths;                            // as forward
    const int32_t *saved_least_used;                   // as forward
    const Arith<S> *saved_memory, *saved_read_weights; // as forward
    // Of a segment of checkpoint_every steps: what taking its steps again leaves.
    Arith<S> *weights;              // [segment, B, N, R4]: read weights after each step, R4 = R to a multiple of 4
    Arith<S> *overwritten;          // [segment, B, R, W]: what stood in the least-used slots before each step
    Arith<S> *restarts;             // [segment / kRestartEvery, B, N, W]: memory after every so many steps
    Arith<S> *means;                // [segment, B, parts, R]: reads times their gradient, summed over a slot's numbers
    S *dkey, *dgate, *dbeta, *dadd; // as key, gate, beta and add, out
    S *dmemory, *dread_weights;     // of the state before the first step, out
};

} // namespace mann::cuda
