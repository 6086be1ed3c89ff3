// The arguments of the kernels that take one step of the LSTM controller of mann_sequence, spread over the device: the
// weights are read once a step for every four examples.
#pragma once

namespace mann::cuda {

constexpr int kControllerThreads = 256, kControllerWarps = kControllerThreads / 32;
// Examples of a block, and hidden units of a block of lstm_step.
constexpr int kExamples = 4, kUnits = 2;

struct ControllerSizes {
    int64_t B;
    int T, step;
    const int64_t *lengths; // [B] or null
};

// Eq. 9 to 16: a warp for each gate of a unit.
template <typename S> struct LstmStep {
    ControllerSizes sizes;
    const S *gates_x;        // [T, B, 4H], the input's part, bias included
    const S *weight_hh;      // [4H, H + R W]
    const S *h, *reads, *c0; // [B, H], [B, R W], [B, H] before step 0
    S *output;               // [T, B, H + R W]: in of the step before, its h of this one out
    Arith<S> *c;             // [B, H] in (after step 0), out
    Arith<S> *saved_gates;   // [T, B, 4H] out, after their activations; or null
    Arith<S> *saved_c;       // [B, H] out, or null
};

// Heads from h, after their activations, as MemoryHead has them: rows [first, first + count) of [T, B]; a warp for each
// number of a head.
template <typename S> struct HeadRows {
    int64_t first, count;
    const S *output, *weight_head, *bias_head; // [T, B, H + R W], [head, H], [head]
    Arith<S> *row;                             // [count, head] out
};

// The cell states before the steps [start, stop), from the saved gates.
template <typename S> struct CellsToRecompute {
    ControllerSizes sizes;
    int start, stop;
    const S *c0;             // [B, H] before `start`, or ...
    const Arith<S> *saved_c; // ... in arithmetic type
    const Arith<S> *saved_gates;
    Arith<S> *cells; // [stop - start, B, H] out
};

// From the gradient of a head to that of the gates: 32 units to a block.
template <typename S> struct LstmBackward {
    ControllerSizes sizes;
    int start;
    const S *doutput, *dhead, *weight_head; // [T, B, H + R W], [T, B, head], [head, H]
    const S *dh1, *dc1;                     // [B, H], of the last real step, or null
    const Arith<S> *carried;                // [parts, B, H + R W] of the step after
    int parts;
    const Arith<S> *saved_gates, *cells; // [T, B, 4H], [stop - start, B, H]
    Arith<S> *dc;                        // [B, H] in after the last real step, out
    S *dgates;                           // [T, B, 4H] out
};

// From the gradient of the gates to that of (h, reads) before the step: parts, each of some rows of weight_hh.
template <typename S> struct StateBackward {
    ControllerSizes sizes;
    const S *dgates, *weight_hh;
    Arith<S> *carried; // [parts, B, H + R W] out
    int parts;
};

// What an example has at the end, where it is not there yet: of an example without steps, what it began with; of the
// others a sum of parts in arithmetic type, or a piece of the row of its last step.
constexpr int kFinishItems = 6;
template <typename S> struct FinishItem {
    S *target; // [B, numbers] out
    int64_t numbers;
    const S *initial;      // [B, numbers], or null: zero
    const Arith<S> *parts; // [count, B, row] from `at` on, or null
    int64_t count;
    const S *rows; // [T, B, row] from `at` on, or null
    int64_t row, at;
};
template <typename S> struct Finish {
    ControllerSizes sizes;
    int blocks; // of an example
    FinishItem<S> items[kFinishItems];
};

} // namespace mann::cuda
