// lrua_sequence and mann_sequence step by step, the slots of an example split over the device: memory and weights stand
// in global memory, and a step is a few launches. For any sizes.
#pragma once

#include "memory_launch.h"

#include "grid_controller.h"

namespace mann::cuda {

struct GridSizes {
    int64_t T, B, N, checkpoint_every;
    MemoryOptions memory;
    bool shared, erase_all;
    double decay, eps;
    const int64_t *lengths; // [B] or null

    int64_t copies() const { return T > 0 ? (T - 1) / checkpoint_every : 0; }
};

// The memory of a sequence. Of storage type, but for what is saved, which is of arithmetic type.
struct GridForward {
    const void *memory, *usage, *read_weights; // [B, N, W], [B, N], [B, R, N]
    void *memory1, *usage1, *read_weights1;    // the same after the last step, out
    MemoryHead<void> head;                     // of every step
    void *reads;                               // [T, B, R, W] out, in rows of reads_row numbers
    int64_t reads_row, reads_at;               //
    int32_t *saved_least_used;                 // [T, B, R] out, or null
    void *saved_memory, *saved_read_weights;   // [copies, B, N, W], [copies, B, R, N] out, or null
};
struct GridBackward {
    const void *memory, *read_weights;             // before the first step
    const void *dmemory1, *dread_weights1;         // of the state after the last step; or null
    void *dmemory, *dread_weights;                 // of the state before the first, out
    MemoryHead<void> head;                         //
    const void *dreads;                            // [T, B, R, W] in rows of dreads_row numbers
    int64_t dreads_row, dreads_at;                 //
    const int32_t *saved_least_used;               // as forward
    const void *saved_memory, *saved_read_weights; //
    void *dhead;                                   // [T, B, head] out, or ...
    void *dkey, *dgate, *dbeta, *dadd;             // ... apart; null where there is none
};

// The LSTM before the memory.
struct GridController {
    int64_t H;
    bool squash;
    const void *weight_hh, *weight_head, *bias_head; // [4H, H + R W], [head, H], [head]
    const void *c;                                   // [B, H] before the first step
    // Forward.
    const void *gates_x, *h, *reads; // [T, B, 4H], [B, H], [B, R W]
    void *output, *h1, *c1, *reads1; // [T, B, H + R W], [B, H] twice, [B, R W] out
    void *saved_gates, *saved_c;     // [T, B, 4H], [copies, B, H] of arithmetic type: out or null; in backward
    // Backward.
    const void *doutput, *dh1, *dc1, *dreads1; // [T, B, H + R W]; of the state after the last step, or null
    const void *output_in;                     // [T, B, H + R W]
    void *dgates, *dh, *dc, *dreads;           // [T, B, 4H]; of the state before the first step, out
};

// lrua_sequence's steps on clusters; false, and nothing is done, where the memory of an example is too large for one.
bool lrua_on_clusters(Call &call, const GridSizes &s, const GridForward &a);
bool lrua_on_clusters(Call &call, const GridSizes &s, const GridBackward &a);
void grid_lrua_forward(Call &call, const GridSizes &s, const GridForward &a);
void grid_lrua_backward(Call &call, const GridSizes &s, const GridBackward &a);
void grid_mann_forward(Call &call, const GridSizes &s, GridForward a, const GridController &c);
void grid_mann_backward(Call &call, const GridSizes &s, GridBackward a, const GridController &c);

} // namespace mann::cuda
