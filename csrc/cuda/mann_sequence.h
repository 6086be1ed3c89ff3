// What mann_sequence's kernels on clusters are given. B examples, T steps, N slots of W numbers, R heads, H hidden
// units; words = R * W; a head is key, gate, strength and add, as far as there are these.
#pragma once

#include "restart.h"

namespace mann::cuda {

template <typename S> struct MannForward {
    int steps, batch, checkpoint_every;
    double decay, eps;
    const S *gates_x;                                       // [T, B, 4H], the input's part of the gates, bias included
    const S *weight_hh, *weight_head, *bias_head;           // [4H, H + words], [head, H], [head]
    const S *h, *c, *reads;                                 // [B, H] twice, [B, words]
    const S *memory, *usage, *read_weights;                 // [B, N, W], [B, N], [B, R, N]
    const int64_t *lengths;                                 // [B] or null
    S *output;                                              // [T, B, H + words] out
    S *h1, *c1, *reads1, *memory1, *usage1, *read_weights1; // as the state above, out
    // For backward, all out or all null. The copies of the state are taken after every checkpoint_every steps but the
    // last ones.
    Arith<S> *saved_gates;                                 // [T, B, 4H], after their activations; real steps only
    int32_t *saved_least_used;                             // [T, B, R]
    Arith<S> *saved_c, *saved_memory, *saved_read_weights; // [copies, B, H], [copies, B, N, W], [copies, B, R, N]
};

template <typename S> struct MannBackward {
    int steps, batch, checkpoint_every;
    double eps;
    const S *doutput;                                            // [T, B, H + words]
    const S *dh1, *dc1, *dreads1, *dmemory1, *dread_weights1;    // of the state after the last step, each or null
    const S *weight_hh, *weight_head, *bias_head;                // as forward
    const S *c, *memory, *read_weights, *output;                 // as forward
    const int64_t *lengths;                                      // as forward
    const Arith<S> *heads;                                       // [T, B, head], before bias and activations
    const Arith<S> *saved_gates;                                 // as forward
    const int32_t *saved_least_used;                             // as forward
    const Arith<S> *saved_c, *saved_memory, *saved_read_weights; // as forward
    // Of a segment of checkpoint_every steps: what taking its steps again leaves.
    Arith<S> *cells;       // [segment, B, H]: c before each step
    Arith<S> *weights;     // [segment, B, N, R4]: read weights after each step, R4 = R to a multiple of 4
    Arith<S> *overwritten; // [segment, B, R, W]: what stood in the least-used slots before each step
    Arith<S> *restarts;    // [segment / kRestartEvery, B, N, W]: memory after every so many steps
    S *dgates, *dhead;     // [T, B, 4H], [T, B, head], out
    S *dh, *dc, *dreads, *dmemory, *dread_weights; // of the state before the first step, out
};

} // namespace mann::cuda
