// The arguments of the kernels that take one step of the memory, slots of an example split over many blocks: for
// content_address, lrua_step and the step-by-step form of the sequences.
//
// A step forward is memory_write (a tile of slots to a block: erase, write, similarities, and the tile's part of the
// softmax and of the reads) and memory_use (the parts summed; usage, the next choice of slots, reads). A step backward
// is memory_backward (a tile to a block) and memory_sum, which sums what the tiles found for key, gate and the rest,
// once a step or once for many.
//
// Similarities are kept as logits; a weight is exp(logit - largest) * inverse, with the two numbers of each head in
// `totals`. What is kept of several steps stands in a ring: step t in place t % ring.
#pragma once

namespace mann::cuda {

constexpr int kMemoryThreads = 256, kMemoryWarps = kMemoryThreads / 32, kSumThreads = 512;
// Of sums over parts: columns of a block.
constexpr int kReadColumns = 8;

// Of tile after tile (or warp after warp, MANN_PARTS to a tile) memory_write finds a part, 2 R + R W numbers:
//     [largest logit: R][sum of exp: R][sum of exp * row: R, W]
// and memory_backward head + R: the gradients of the numbers of a head, in its order, then for each head what the key's
// norm takes off.

// What the heads say at step t of example b, row t * B + b of each. Either a row of numbers after their activations, in
// the order of mann_sequence: key [R, W], gate [R], strength [R] (with MANN_BETA), add [R, W] (with MANN_ADD) ...
template <typename S> struct MemoryHead {
    const Arith<S> *row; // [., head] or null: rows of [T, B, head] from the `first` on
    int64_t head, first;
    // ... or apart, the gate before its sigmoid; add null unless MANN_ADD, beta null unless MANN_BETA, which must
    // agree.
    const S *key, *gate, *beta, *add; // [T, B, R, W], [T, B, R] twice, [T, B, R, W]
};

// The memory and the read weights before step `start`, which those of the other steps are made from.
template <typename S> struct MemoryStart {
    int start;
    const S *memory, *weights;            // [B, N, W], [B, R, N], or null where ...
    const Arith<S> *memory_t, *weights_t; // ... they stand in arithmetic type
};

struct MemorySizes {
    int64_t B, N;
    int T, step, ring;            // step: the (first) step of this launch
    int tiles, tile_slots, parts; // of an example; parts: of memory_write, or of memory_backward
    const int64_t *lengths;       // [B] or null: steps from there on are padding
};

template <typename S> struct MemoryWrite {
    MemorySizes sizes;
    MemoryHead<S> head;
    MemoryStart<S> before;
    double eps, decay;
    int shared, erase_all;
    Arith<S> *memory;      // [B, N, W]: the memory, after `start` in, out; or null: not kept
    S *memory1;            // [B, N, W] out, instead; or null
    Arith<S> *memory_copy; // [B, N, W] out, once more; or null
    Arith<S> *logits;      // [ring, B, R, N] out, of this step; in, of the one before
    Arith<S> *totals;      // [ring, B, R, 2]: of the step before; made from its parts if sum_parts
    int sum_parts;
    Arith<S> *found;                 // [ring, B, parts, 2 R + R W] out
    const S *usage;                  // [B, N] before step 0 ...
    Arith<S> *usage1;                // ... and in, out after it: decayed, with what was written; or null
    const Arith<S> *candidate_usage; // [B, choosers, R], by memory_use; null: the slots are given
    const int32_t *candidate_slots;  // [B, choosers, R], -1 for none
    int choosers;
    int32_t *least_used;   // [T, B, R]: out, or in where they are given; may be null if not given
    Arith<S> *overwritten; // [ring, B, R, W] out: what stood in the least-used slots; or null
};

template <typename S> struct MemoryUse {
    MemorySizes sizes;
    double eps;
    int choosers, chooser_slots; // blocks of an example that go over its slots, and slots of each
    int readers;                 // further blocks, kReadColumns columns of the reads each; 0: no reads
    const Arith<S> *logits;      // [ring, B, R, N]; null: no weights, only the choice of slots
    const Arith<S> *found;       // [ring, B, parts, 2 R + R W]
    Arith<S> *totals;            // [ring, B, R, 2] out by a block of the readers, or null
    const S *usage;              // [B, N], where there is nothing to add to; or null
    Arith<S> *usage1;            // [B, N] in, out: what was read is added; or null
    S *usage_out;                // [B, N] out; or null
    Arith<S> *candidate_usage;   // [B, choosers, R] out: the least of each block; or null
    int32_t *candidate_slots;    // [B, choosers, R] out
    S *weights;                  // [B, R, N] out, of the last real step of each example; or null
    Arith<S> *weights_copy;      // [B, R, N] out, or null
    S *reads;                    // row t * B + b out, or null
    int64_t reads_row, reads_at; // numbers of a row, and where in it
    Arith<S> *reads_copy;        // [ring, B, R, W] out, or null
    const S *weights_in;         // [B, R, N]: the weights, where there are no logits; or null
    const S *dweights;           // [B, R, N], or null: no means
    Arith<S> *means;             // [B, choosers, R] out: sums of weight * dweight after the last real step
};

template <typename S> struct MemoryBackward {
    MemorySizes sizes;
    MemoryHead<S> head;
    MemoryStart<S> before;
    double eps;
    int shared, erase_all, undo;
    // The memory after the step in arithmetic type; with undo, the one before it out. Null: made from before.memory, or
    // without MANN_WRITE that.
    const Arith<S> *memory_after;
    Arith<S> *memory;       // [B, N, W]
    const S *dmemory1;      // [B, N, W], of the last real step; or null
    Arith<S> *dmemory;      // [B, N, W] in after the last real step, out; or null ...
    S *dmemory_out;         // ... and out here
    const Arith<S> *logits; // [ring, B, R, N]
    const Arith<S> *totals; // [ring, B, R, 2]
    const S *weights_in;    // [B, R, N]: the weights of the step, where there are no logits
    const S *dweights1;     // [B, R, N], of the last real step; or null
    Arith<S> *dweights;     // [B, R, N] in after the last real step, out; or null ...
    S *dweights_out;        // ... and out here
    const S *dreads;        // row t * B + b, of dreads_row numbers from dreads_at on
    int64_t dreads_row, dreads_at;
    const S *dreads1;        // [B, R, W] of the last real step, or null
    const Arith<S> *carried; // [carried_parts, B, carried_row] from carried_at on: of the step after; or null
    int64_t carried_row, carried_at;
    int carried_parts;
    const Arith<S> *reads;       // [ring, B, R, W] of memory_use
    const Arith<S> *first_means; // [B, choosers, R] of memory_use, of the last real step; null: zero
    int choosers;
    Arith<S> *means;             // [2, B, parts, R]: sums of weight * dweight of the step before, t % 2
    Arith<S> *found;             // [ring, B, parts, head + R] out
    const int32_t *least_used;   // [T, B, R]
    const Arith<S> *overwritten; // [ring, B, R, W], with undo
};

template <typename S> struct MemorySum {
    MemorySizes sizes;
    MemoryHead<S> head;
    const Arith<S> *found;          // [ring, B, parts, head + R]
    int squash;                     // key and add are tanh of what the gradient is wanted of
    S *dhead;                       // [T, B, head] out, before the activations; or ...
    S *dkey, *dgate, *dbeta, *dadd; // ... apart: [T, B, R, W], [T, B, R] twice, [T, B, R, W]; null where there is none
};

} // namespace mann::cuda
