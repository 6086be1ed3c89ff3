// What the parts of mann_sequence share: its sizes and buffers, and the controller's work on one example.
#pragma once

#include <cmath>

#include "gemm.h"
#include "lrua_sequence.h"

namespace mann {

struct MannOptions {
    StepOptions step;
    int64_t T, B, H, checkpoint_every;
    bool write_add, key_strength, squash;

    int64_t words() const { return step.R * step.W; }
    int64_t recurrent() const { return H + words(); } // width of (h, reads)
    int64_t head() const { return words() + step.R + (key_strength ? step.R : 0) + (write_add ? words() : 0); }
};

struct PackArgs {
    const void *source; // [K, N], or [N, K] if transposed
    bool transposed;
    int64_t K, N;
    void *panels; // packed_bound(K, N) numbers out
};

// packed_size of any instruction set: the widest panel has 48 columns.
inline int64_t packed_bound(int64_t K, int64_t N) { return (N + 47) * K; }

struct MannSequenceArgs {
    MannOptions options;
    const void *gates_x;      // [T, B, 4H], the input's part of the gates, bias included
    const void *weight_hh;    // packed, [H + R*W, 4H]
    const void *weight_head;  // packed, [H, P]
    const void *bias_head;    // [P]
    const void *h, *c;        // [B, H]
    const void *reads;        // [B, R, W]
    const void *memory;       // [B, N, W]
    const void *usage;        // [B, N]
    const void *read_weights; // [B, R, N]
    const int64_t *lengths;   // [B] or null
    void *output;             // [T, B, H + R*W] out
    void *h1, *c1, *reads1, *memory1, *usage1, *read_weights1; // as the state above, out
    // For backward, all out or all null; of arithmetic type. The copies of the state are taken after every
    // checkpoint_every steps but the last ones.
    void *saved_gates;         // [T, B, 4H], after their activations; real steps only
    int32_t *saved_least_used; // [T, B, R]
    void *saved_c;             // [copies(), B, H]
    void *saved_memory;        // [copies(), B, N, W]
    void *saved_read_weights;  // [copies(), B, R, N]
};

struct MannSequenceBackwardArgs {
    MannOptions options;
    const void *doutput;                                         // [T, B, H + R*W]
    const void *dh1, *dc1, *dreads1, *dmemory1, *dread_weights1; // each may be null (zero)
    const void *weight_hh;                                       // packed, [4H, H + R*W]
    const void *weight_head;                                     // packed, [P, H]
    const void *weight_head_forward, *bias_head;                 // as forward
    const void *c, *memory, *read_weights;                       // before the first step
    const int64_t *lengths;
    const void *output; // as forward
    const void *saved_gates;
    const int32_t *saved_least_used;
    const void *saved_c, *saved_memory, *saved_read_weights;
    void *dgates;                                     // [T, B, 4H] out, before the activations
    void *dhead;                                      // [T, B, P] out, before the activations
    void *dh, *dc, *dreads, *dmemory, *dread_weights; // of the state before the first step, out
};

namespace MANN_ISA {

// Examples that go through time together, so many at most: enough to fill a block of the matrix products, few enough
// that what they work on stays in cache. Calls f(first, last) for each group of nearly equal size.
constexpr int64_t kTogether = 8;
template <typename F> inline void together(int64_t begin, int64_t end, F &&f) {
    const int64_t count = end - begin, groups = (count + kTogether - 1) / kTogether;
    for (int64_t g = 0; g < groups; ++g) f(begin + count * g / groups, begin + count * (g + 1) / groups);
}

// The scratch of one thread, for `count` examples that go through time together.
struct MannForwardPlan : Plan {
    int64_t memory, usage, weights;     // [count, W, P], [count, P], [2, count, R, P]
    int64_t write_weights, row_squares; // [R, P], [P]
    int64_t recurrent, c, gates, head;  // [count, K], [count, H], [count, 4H], [count, head]
    int64_t bias, slots;                // [head], [R] of int32_t
    MannForwardPlan(const MannOptions &o, int64_t P, int64_t count) {
        const int64_t W = o.step.W, R = o.step.R;
        memory = take(count * W * P), usage = take(count * P), weights = take(2 * count * R * P);
        write_weights = take(R * P), row_squares = take(P);
        recurrent = take(count * o.recurrent()), c = take(count * o.H), gates = take(count * 4 * o.H);
        head = take(count * o.head()), bias = take(o.head()), slots = take(R);
    }
};
struct MannBackwardPlan : Plan {
    int64_t memory, dmemory, dweights, weights0; // [count, W, P] twice, [count, R, P] twice
    int64_t records, restarts;                   // [segment, count] records, [., count, W, P]
    int64_t write_weights, step_scratch;         // [R, P], step_backward_scratch
    int64_t heads, c;                            // [segment, count, head], [segment + 1, count, H]
    int64_t drecurrent, next_drecurrent;         // [count, K]
    int64_t dc, dgates, dhead, h;                // [count, H], [count, 4H], [count, head], [count, H]
    int64_t dreads, bias;                        // [R, W], [head]
    MannBackwardPlan(const MannOptions &o, int64_t P, int64_t count) {
        const int64_t W = o.step.W, R = o.step.R, segment = std::min(o.T, o.checkpoint_every);
        memory = take(count * W * P), dmemory = take(count * W * P);
        dweights = take(count * R * P), weights0 = take(count * R * P);
        records = take(segment * count * step_record_size(o.step, P));
        restarts = take(count * restarts_size(o.step, P, segment));
        write_weights = take(R * P), step_scratch = take(step_backward_scratch(o.step, P));
        heads = take(segment * count * o.head()), c = take((segment + 1) * count * o.H);
        drecurrent = take(count * o.recurrent()), next_drecurrent = take(count * o.recurrent());
        dc = take(count * o.H), dgates = take(count * 4 * o.H), dhead = take(count * o.head());
        h = take(count * o.H), dreads = take(o.words()), bias = take(o.head());
    }
};

// A weight [K, N] that pack_weights has packed.
template <typename S> inline Packed<Arith<S>> packed_weight(const void *panels, int64_t K, int64_t N) {
    return {static_cast<const Arith<S> *>(panels), K, N, packs_pairs<S>()};
}

// Where the parts of one example's head row stand.
template <typename T> struct HeadRow {
    T *key, *gate, *beta, *add; // beta null if the strength is 1; add is key if the key is written
    HeadRow(const MannOptions &o, T *row)
        : key(row), gate(row + o.words()), beta(o.key_strength ? gate + o.step.R : nullptr),
          add(o.write_add ? gate + o.step.R * (o.key_strength ? 2 : 1) : row) {}
};

template <typename T> inline void squash_vector(T *vector, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<T>)
        store_some(vector + i, hyperbolic_tangent(load_some(vector + i, n - i)), n - i);
}
template <typename T> inline void activate_head(const MannOptions &o, const HeadRow<T> &head) {
    if (o.squash) squash_vector(head.key, o.words());
    sigmoid_of(head.gate, head.gate, o.step.R);
    for (int64_t h = 0; head.beta && h < o.step.R; ++h) // softplus
        head.beta[h] = head.beta[h] > 20 ? head.beta[h] : std::log1p(std::exp(head.beta[h]));
    if (o.squash && o.write_add) squash_vector(head.add, o.words());
}
// Turns gradients after the activations of key, beta and add into gradients before them; that of the gate is already.
template <typename T>
inline void activate_head_backward(const MannOptions &o, const HeadRow<const T> &head, const HeadRow<T> &dhead) {
    for (int64_t i = 0; o.squash && i < o.words(); ++i) {
        dhead.key[i] *= 1 - head.key[i] * head.key[i];
        if (o.write_add) dhead.add[i] *= 1 - head.add[i] * head.add[i];
    }
    for (int64_t h = 0; head.beta && h < o.step.R; ++h) dhead.beta[h] *= -std::expm1(-head.beta[h]);
}

// What is kept in storage type counts as that from there on: a step can be recomputed from what was kept.
template <typename S> inline void keep(Arith<S> *row, S *kept, int64_t n) {
    convert(row, kept, n);
    if constexpr (!std::is_same_v<S, Arith<S>>) convert(kept, row, n);
}

template <typename T> inline void lstm_row(int64_t H, T *gates, T *c, T *h) {
    for (int64_t i = 0; i < H; i += kLanes<T>) {
        Vec<T> gate[4];
        for (int g = 0; g < 4; ++g) gate[g] = load_some(gates + g * H + i, H - i);
        const auto cell = lstm_cell(gate[0], gate[1], gate[2], gate[3], load_some(c + i, H - i));
        for (int g = 0; g < 4; ++g) store_some(gates + g * H + i, gate[g], H - i);
        store_some(c + i, cell.c, H - i);
        store_some(h + i, cell.h, H - i);
    }
}
// The cell state alone, from gates after their activations.
template <typename T> inline void cell_row(int64_t H, const T *gates, const T *c, T *new_c) {
    for (int64_t i = 0; i < H; ++i) new_c[i] = gates[H + i] * c[i] + gates[i] * gates[2 * H + i];
}
// dc [H] is of c after the step on entry, of c before it on return.
template <typename T>
inline void lstm_row_backward(int64_t H, const T *gates, const T *c, const T *new_c, const T *dh, T *dc, T *dgates) {
    for (int64_t i = 0; i < H; i += kLanes<T>) {
        const auto at = [=](const T *row) { return load_some(row + i, H - i); };
        const auto grad = lstm_cell_backward(at(gates), at(gates + H), at(gates + 2 * H), at(gates + 3 * H), at(c),
                                             hyperbolic_tangent(at(new_c)), at(dh), at(dc));
        store_some(dgates + i, grad.gate_in, H - i);
        store_some(dgates + H + i, grad.gate_forget, H - i);
        store_some(dgates + 2 * H + i, grad.cell, H - i);
        store_some(dgates + 3 * H + i, grad.gate_out, H - i);
        store_some(dc + i, grad.c, H - i);
    }
}

} // namespace MANN_ISA
} // namespace mann
