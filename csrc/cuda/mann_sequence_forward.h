// mann_sequence, forward: two barriers of the cluster a step.
//
// A block makes the gates and h of its units for all examples, and its units' part of every example's head; h goes to
// all blocks, the part of the head to the example's owner. Barrier. The owner sums the parts, takes the memory's step
// and sends the reads to all blocks. Barrier; while a block waits, it makes h's part of the next gates. So h has two
// buffers: a block that has not passed the barrier still reads the one while others fill the other.
#pragma once

#include "mann_sequence.h"

namespace mann::cuda {

// What stands where in shared memory, in bytes.
template <typename S> struct MannForwardLayout {
    int weight_hh, weight_head; // [4 units, leading_hh], [units, leading_head] of S
    int h, reads;               // [2, tile, leading_h], [tile, leading_reads] of S
    int head_parts, bias_head;  // [tile, head], [head]
    int memory, usage, weights; // of the example: [N, stride], [N], [2, G, N, 4]
    int least_used, lengths;    // [R], [tile] of int32
    // Of the gates' phase.
    int partial, own_h; // [chunks, tile, leading_partial], [tile, leading_units] of S
    // Of the memory's phase, in the place of the above.
    int key, add, gate, beta, step_scratch; // [G, W, 4] twice, [R] twice
    int64_t bytes;
    int leading_hh, leading_head, leading_h, leading_reads, leading_units, leading_partial;
    int held, chunks; // columns of weight_hh in registers, chunks of its product

    template <int tile> static MannForwardLayout of(const MannSizes &s, const MemoryShape &memory_shape) {
        using T = Arith<S>;
        MannForwardLayout l;
        const int units = s.units, rows = 4 * units, reads_at = s.reads_at<S>();
        l.held = HeldRows<tile, S>::columns(rows, reads_at), l.chunks = chunks_of<S>(rows, reads_at);
        l.leading_hh = leading<S>(s.padded<S>() - l.held), l.leading_head = leading<S>(s.head);
        l.leading_h = leading<S>(s.H), l.leading_reads = leading<S>(s.words), l.leading_units = leading<S>(units);
        l.leading_partial = partial_leading(rows);
        Carver carve;
        l.weight_hh = carve.take<S>(int64_t(rows) * l.leading_hh);
        l.weight_head = carve.take<S>(int64_t(units) * l.leading_head);
        l.h = carve.take<S>(2 * tile * l.leading_h), l.reads = carve.take<S>(tile * l.leading_reads);
        l.head_parts = carve.take<T>(tile * s.head), l.bias_head = carve.take<T>(s.head);
        l.memory = carve.take<T>(memory_shape.memory()), l.usage = carve.take<T>(s.N);
        l.weights = carve.take<T>(2 * memory_shape.slots()), l.least_used = carve.take<int32_t>(s.R);
        l.lengths = carve.take<int>(tile);
        Carver gates(carve.bytes()), step(carve.bytes());
        l.partial = gates.take<T>(l.chunks * tile * l.leading_partial);
        l.own_h = gates.take<S>(tile * l.leading_units);
        l.key = step.take<T>(memory_shape.words()), l.gate = step.take<T>(s.R), l.beta = step.take<T>(s.R);
        l.add = s.write_add ? step.take<T>(memory_shape.words()) : l.key;
        l.step_scratch = step.take<T>(step_forward_scratch(memory_shape, kThreads));
        l.bytes = std::max(gates.bytes(), step.bytes());
        return l;
    }
};

template <typename S> struct MannForwardArgs {
    using T = Arith<S>;
    MannSizes sizes;
    StepShape<T> step;
    MannForwardLayout<S> layout;
    const S *gates_x;                                       // [T, B, 4H], the input's part of the gates, bias included
    const S *weight_hh, *weight_head, *bias_head;           // [4H, H + words], [head, H], [head]
    const S *h, *c, *reads;                                 // [B, H] twice, [B, words]
    const S *memory, *usage, *read_weights;                 // [B, N, W], [B, N], [B, R, N]
    const int64_t *lengths;                                 // [B] or null
    S *output;                                              // [T, B, H + words] out
    S *h1, *c1, *reads1, *memory1, *usage1, *read_weights1; // as the state above, out
    // For backward, all out or all null. The copies of the state are taken after every checkpoint_every steps but the
    // last ones.
    T *saved_gates;                                 // [T, B, 4H], after their activations; real steps only
    int32_t *saved_least_used;                      // [T, B, R]
    T *saved_c, *saved_memory, *saved_read_weights; // [copies, B, H], [copies, B, N, W], [copies, B, R, N]
};

template <typename S, int tile> struct MannForward {
    using T = Arith<S>;
    const MannForwardArgs<S> &a;
    const MannSizes &s;
    const MannForwardLayout<S> &l;
    char *shared;
    const Share<S, tile> share;
    HeldRows<tile, S> held;
    T c = 0, gates_x[4] = {}; // of the thread's unit

    template <typename U> MANN_INLINE U *at(int offset) const { return reinterpret_cast<U *>(shared + offset); }
    MANN_INLINE S *h_of(int t) const { return at<S>(l.h) + t % 2 * (tile * l.leading_h); }
    MANN_INLINE T *weights_of(int t) const { return at<T>(l.weights) + t % 2 * a.step.slots(); }
    MANN_INLINE Partial<T> partial() const { return {at<T>(l.partial), l.chunks, l.leading_partial}; }
    // The owned example's of a batch that may be absent.
    template <typename U> MANN_INLINE U *of_owned(U *batch, int count) const {
        return batch ? batch + int64_t(share.owned()) * count : nullptr;
    }
    MANN_INLINE int length_of(const Unit &u) const { return u.exists ? at<int>(l.lengths)[u.example] : 0; }
    MANN_INLINE int owned_length() const { return at<int>(l.lengths)[share.rank()]; }

    MANN_INLINE MannForward(const MannForwardArgs<S> &args, char *memory)
        : a(args), s(a.sizes), l(a.layout), shared(memory), share{s} {}

    MANN_INLINE void begin() {
        take_lengths(s, a.lengths, share.first_example(), at<int>(l.lengths));
        const int rows = 4 * s.units;
        const auto weight_hh = [&](int row, int column) { return share.weight_hh(a.weight_hh, row, column); };
        held.take(rows, l.chunks, weight_hh);
        take_matrix(at<S>(l.weight_hh), rows, l.leading_hh,
                    [&](int row, int column) { return weight_hh(row, column + l.held); });
        take_matrix(at<S>(l.weight_head), s.units, l.leading_head,
                    [&](int row, int p) { return share.weight_head(a.weight_head, row, p); });
        for_each(s.head, [&](int p) { at<T>(l.bias_head)[p] = to_arith(a.bias_head[p]); });
        take_vectors(a.h, s.H, l.leading_h, h_of(0));
        fill_zero(h_of(1), tile * l.leading_h);
        take_vectors(a.reads, s.words, l.leading_reads, at<S>(l.reads));
        const Unit u = share.unit_of_thread();
        if (u.exists) c = to_arith(a.c[share.at(u, u.b)]);
        if (share.owned() < s.B) {
            take_rows(of_owned(a.memory, s.N * s.W), s.N, s.W, a.step.stride, at<T>(l.memory));
            for_each(s.N, [&](int n) { at<T>(l.usage)[n] = to_arith(of_owned(a.usage, s.N)[n]); });
            take_heads(of_owned(a.read_weights, s.R * s.N), s.R, s.N, weights_of(0));
        }
    }
    // Vectors [B, count] of the cluster's examples, padded with zeros.
    MANN_INLINE void take_vectors(const S *source, int count, int leading, S *target) const {
        for_numbers(tile, leading, [&](int e, int k, int i) {
            const int from = share.first_example() + e;
            target[i] = from < s.B && k < count ? source[int64_t(from) * count + k] : S(0.0f);
        });
    }

    // Of step t, long before they are used.
    MANN_INLINE void fetch(int t) {
        const Unit u = share.unit_of_thread();
        if (t < length_of(u))
#pragma unroll
            for (int g = 0; g < 4; ++g) gates_x[g] = to_arith(a.gates_x[share.at(u, s.row(t, u.b) * 4 + g)]);
    }
    MANN_INLINE void gates_of_h(int t) const {
        const Matrix<S> weights{at<S>(l.weight_hh), l.leading_hh, 4 * s.units, s.reads_at<S>(), l.held};
        held.multiply(weights, {h_of(t), l.leading_h}, partial());
    }
    MANN_INLINE void gates_of_reads() const {
        const Matrix<S> weights{at<S>(l.weight_hh) + s.reads_at<S>() - l.held, l.leading_hh, 4 * s.units, s.words, 0};
        rows_times_vectors<tile>(weights, {at<S>(l.reads), l.leading_reads}, partial(), true);
    }

    // Eq. 9 to 16, and h to every block.
    MANN_INLINE void lstm(int t) {
        const Unit u = share.unit_of_thread();
        if (u.example >= tile) return;
        const int at_h = u.example * l.leading_h + share.first_unit() + u.unit;
        S h = S(0.0f);
        if (t < length_of(u)) {
            T gates[4];
#pragma unroll
            for (int g = 0; g < 4; ++g) gates[g] = gates_x[g] + total<tile>(partial(), u.example, g * s.units + u.unit);
            const auto cell = lstm_cell(gates[0], gates[1], gates[2], gates[3], c);
            c = cell.c, h = to_storage<S>(cell.h);
#pragma unroll
            for (int g = 0; a.saved_gates && g < 4; ++g) a.saved_gates[share.at(u, s.row(t, u.b) * 4 + g)] = gates[g];
        } else if (u.exists) {
            h = h_of(t)[at_h]; // nothing changes
        }
        at<S>(l.own_h)[u.example * l.leading_units + u.unit] = h;
        if (!u.exists) return;
        for (int rank = 0; rank < tile; ++rank) of_rank(h_of(t + 1), rank)[at_h] = h;
        a.output[s.row(t, u.b) * s.recurrent + share.first_unit() + u.unit] = t < length_of(u) ? h : S(0.0f);
    }
    // The units' part of every head, to its owner.
    MANN_INLINE void head_parts() const {
        const Matrix<S> weights{at<S>(l.weight_head), l.leading_head, s.units, s.head, 0};
        const int from = share.rank();
        vectors_times_columns<tile>(weights, {at<S>(l.own_h), l.leading_units}, [&](int owner, int p, T sum) {
            of_rank(at<T>(l.head_parts), owner)[from * s.head + p] = sum;
        });
    }

    // The memory's step of the owned example, and the reads to every block.
    MANN_INLINE void remember(int t) const {
        const Head<T> head{at<T>(l.key), at<T>(l.add), at<T>(l.gate), s.key_strength ? at<T>(l.beta) : nullptr};
        make_head(s, head, [&](int p) {
            T sum = at<T>(l.bias_head)[p];
            for (int rank = 0; rank < tile; ++rank) sum += at<T>(l.head_parts)[rank * s.head + p];
            return sum;
        });
        const int64_t row = s.row(t, share.owned());
        if (warp_of_block() == kWarps - 1) choose_slots(at<T>(l.usage), s.N, s.R, at<int32_t>(l.least_used));
        __syncthreads();
        for_each(a.saved_least_used ? s.R : 0,
                 [&](int h) { a.saved_least_used[row * s.R + h] = at<int32_t>(l.least_used)[h]; });
        StepForward<T> step{};
        step.memory = at<T>(l.memory), step.usage = at<T>(l.usage);
        step.previous = weights_of(t), step.weights = weights_of(t + 1);
        step.key = head.key, step.add = head.add, step.gate = head.gate, step.beta = head.beta;
        step.least_used = at<int32_t>(l.least_used), step.scratch = at<T>(l.step_scratch);
        const int from = share.rank();
        step_forward(a.step, step, [&](int h, int w, T value) {
            const S read = to_storage<S>(value);
            const int word = h * s.W + w;
            for (int rank = 0; rank < tile; ++rank) of_rank(at<S>(l.reads), rank)[from * l.leading_reads + word] = read;
            a.output[row * s.recurrent + s.H + word] = read;
        });
    }
    // A padded step.
    MANN_INLINE void rest(int t) const {
        const int64_t row = s.row(t, share.owned());
        for_each(s.words, [&](int i) { a.output[row * s.recurrent + s.H + i] = S(0.0f); });
        for_each(a.saved_least_used ? s.R : 0, [&](int h) { a.saved_least_used[row * s.R + h] = 0; });
    }
    MANN_INLINE void copy_state(int t) const {
        const int64_t copy = s.row(t / s.checkpoint_every, 0);
        const Unit u = share.unit_of_thread();
        if (u.exists) a.saved_c[share.at(u, copy + u.b)] = c;
        if (share.owned() >= s.B) return;
        give_rows(at<T>(l.memory), s.N, s.W, a.step.stride, a.saved_memory + (copy + share.owned()) * s.N * s.W);
        give_heads(weights_of(min(t + 1, owned_length())), s.R, s.N,
                   a.saved_read_weights + (copy + share.owned()) * s.R * s.N);
    }

    MANN_INLINE void run() {
        begin();
        __syncthreads();
        fetch(0);
        fill_zero(at<S>(l.own_h), tile * l.leading_units);
        cluster_barrier(); // every block is there to be written to
        gates_of_h(0);
        for (int t = 0; t < s.T; ++t) {
            gates_of_reads();
            __syncthreads();
            lstm(t);
            __syncthreads();
            head_parts();
            cluster_barrier();
            if (t < owned_length()) remember(t);
            else if (share.owned() < s.B) rest(t);
            __syncthreads();
            if (a.saved_c && (t + 1) % s.checkpoint_every == 0 && t + 1 < s.T) copy_state(t);
            cluster_arrive();
            if (t + 1 < s.T) {
                fetch(t + 1);
                fill_zero(at<S>(l.own_h), tile * l.leading_units);
                gates_of_h(t + 1);
            }
            cluster_wait();
        }
        finish();
    }
    MANN_INLINE void finish() const {
        const Unit u = share.unit_of_thread();
        if (u.exists) {
            a.h1[share.at(u, u.b)] = h_of(s.T)[u.example * l.leading_h + share.first_unit() + u.unit];
            a.c1[share.at(u, u.b)] = to_storage<S>(c);
        }
        if (share.owned() >= s.B) return;
        for_each(s.words,
                 [&](int i) { of_owned(a.reads1, s.words)[i] = at<S>(l.reads)[share.rank() * l.leading_reads + i]; });
        give_rows(at<T>(l.memory), s.N, s.W, a.step.stride, of_owned(a.memory1, s.N * s.W));
        for_each(s.N, [&](int n) { of_owned(a.usage1, s.N)[n] = to_storage<S>(at<T>(l.usage)[n]); });
        give_heads(weights_of(owned_length()), s.R, s.N, of_owned(a.read_weights1, s.R * s.N));
    }
};

template <typename S, int tile>
__global__ void __launch_bounds__(kThreads, 1)
    mann_sequence_fwd_kernel(const __grid_constant__ MannForwardArgs<S> args) {
    MANN_DYNAMIC_SHARED(shared);
    MannForward<S, tile>(args, shared).run();
}

} // namespace mann::cuda
