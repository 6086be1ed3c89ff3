// mann_sequence, backward: two barriers of the cluster a step.
//
// A segment of steps at a time, the last one first. An owner takes the memory's steps of the segment again, then the
// cluster undoes them. The owner of an example makes the gradient of its head and sends it to all blocks. Barrier. A
// block makes the gradient of its units' h and gates, and from these its part of the gradient of (h, reads) before the
// step, for all examples: h's to the block of the unit, the reads' to the owner. Barrier; then the parts are summed, in
// the order of the blocks.
#pragma once

#include "mann_sequence.h"

namespace mann::cuda {

// Undoing writes rounds, and small rows would drown in what was written to them later: while the steps of a segment are
// taken again, every so many of them the memory is set aside, to go on from there on the way back.
constexpr int kRestartEvery = 8;

// What stands where in shared memory, in bytes.
template <typename S> struct MannBackwardLayout {
    int weight_hh, weight_head;       // [4 units, leading_hh], [units, leading_head] of S
    int dhead, bias_head;             // [tile, leading_head] of S, [head]
    int memory, dmemory;              // of the example: [N, stride] twice
    int weights, dweights;            // [2, G, N, 4], [G, N, 4]
    int key, add, dreads;             // [G, W, 4] each
    int gate, beta, dgate, dbeta;     // [R] each
    int carried, overwritten;         // [words], the gradient of the reads before the step at hand; [R, W]
    int least_used, lengths;          // [R], [tile] of int32
    int state;                        // [2, tile, units], of the threads' units
    int step_scratch;                 // of the memory's phase
    int partial, dgates;              // of the gates' phase, in its place: [chunks, tile, leading_partial],
                                      // [tile, leading_gates] of S
    int parts_of_dh, parts_of_dreads; // and until they are summed: [tile, tile, units], [tile, words]
    int64_t bytes;
    int leading_hh, leading_head, leading_gates, leading_partial;
    int held, chunks; // rows of weight_hh in registers, chunks of the product with weight_head

    template <int tile> static MannBackwardLayout of(const MannSizes &s, const MemoryShape &memory_shape) {
        using T = Arith<S>;
        MannBackwardLayout l;
        const int units = s.units, rows = 4 * units;
        l.held = HeldColumns<tile, S>::rows(rows), l.chunks = chunks_of<S>(units, s.head);
        l.leading_hh = leading<S>(s.padded<S>()), l.leading_head = leading<S>(s.head);
        l.leading_gates = leading<S>(rows), l.leading_partial = partial_leading(units);
        Carver carve;
        l.weight_hh = carve.take<S>(int64_t(rows - l.held) * l.leading_hh);
        l.weight_head = carve.take<S>(int64_t(units) * l.leading_head);
        l.dhead = carve.take<S>(tile * l.leading_head), l.bias_head = carve.take<T>(s.head);
        l.memory = carve.take<T>(memory_shape.memory()), l.dmemory = carve.take<T>(memory_shape.memory());
        l.weights = carve.take<T>(2 * memory_shape.slots()), l.dweights = carve.take<T>(memory_shape.slots());
        l.key = carve.take<T>(memory_shape.words()), l.dreads = carve.take<T>(memory_shape.words());
        l.add = s.write_add ? carve.take<T>(memory_shape.words()) : l.key;
        l.gate = carve.take<T>(s.R), l.beta = carve.take<T>(s.R);
        l.dgate = carve.take<T>(s.R), l.dbeta = carve.take<T>(s.R);
        l.carried = carve.take<T>(s.words), l.overwritten = carve.take<T>(s.words);
        l.least_used = carve.take<int32_t>(s.R), l.lengths = carve.take<int>(tile);
        l.state = carve.take<T>(2 * tile * units);
        Carver gates(carve.bytes()), step(carve.bytes());
        l.partial = gates.take<T>(l.chunks * tile * l.leading_partial);
        l.dgates = gates.take<S>(tile * l.leading_gates);
        l.parts_of_dh = gates.take<T>(tile * tile * units), l.parts_of_dreads = gates.take<T>(tile * s.words);
        l.step_scratch = step.take<T>(
            std::max(step_forward_scratch(memory_shape, kThreads), step_backward_scratch(memory_shape, kThreads)));
        l.bytes = std::max(gates.bytes(), step.bytes());
        return l;
    }
};

template <typename S> struct MannBackwardArgs {
    using T = Arith<S>;
    MannSizes sizes;
    StepShape<T> step;
    MannBackwardLayout<S> layout;
    const S *doutput;                                         // [T, B, H + words]
    const S *dh1, *dc1, *dreads1, *dmemory1, *dread_weights1; // each may be null (zero)
    const S *weight_hh, *weight_head, *bias_head;             // as forward
    const T *heads;                     // [T, B, head], of every step, before bias and activations
    const S *c, *memory, *read_weights; // before the first step
    const int64_t *lengths;
    const T *saved_gates;
    const int32_t *saved_least_used;
    const T *saved_c, *saved_memory, *saved_read_weights;
    S *dgates, *dhead;                             // [T, B, 4H], [T, B, head] out, before the activations
    S *dh, *dc, *dreads, *dmemory, *dread_weights; // of the state before the first step, out
    // Of each step of a segment: c before it [segment, B, H], and records
    // [segment, B, record()] of the owner. Every kRestartEvery steps a memory, [segment / kRestartEvery, B, N, stride].
    T *cells, *records, *restarts;

    MANN_BOTH int64_t record() const { return step.slots() + (sizes.words + 3) / 4 * 4; }
};

template <typename S, int tile> struct MannBackward {
    using T = Arith<S>;
    const MannBackwardArgs<S> &a;
    const MannSizes &s;
    const MannBackwardLayout<S> &l;
    char *shared;
    const Share<S, tile> share;
    HeldColumns<tile, S> held;

    template <typename U> MANN_INLINE U *at(int offset) const { return reinterpret_cast<U *>(shared + offset); }
    // Of the thread's unit: the gradients of its h and c after the step at hand.
    MANN_INLINE T &dh() const { return at<T>(l.state)[thread_again()]; }
    MANN_INLINE T &dc() const { return at<T>(l.state)[tile * s.units + thread_again()]; }
    MANN_INLINE T *weights_of(int t) const { return at<T>(l.weights) + t % 2 * a.step.slots(); }
    MANN_INLINE Partial<T> partial() const { return {at<T>(l.partial), l.chunks, l.leading_partial}; }
    MANN_INLINE Head<T> head() const {
        return {at<T>(l.key), at<T>(l.add), at<T>(l.gate), s.key_strength ? at<T>(l.beta) : nullptr};
    }
    // At the j-th step of a segment: the read weights after it, and what stood in the least-used slots before it.
    MANN_INLINE T *record_weights(int j) const { return a.records + s.row(j, share.owned()) * a.record(); }
    MANN_INLINE T *record_overwritten(int j) const { return record_weights(j) + a.step.slots(); }
    MANN_INLINE T *restart_of(int j) const {
        return a.restarts + s.row(j / kRestartEvery, share.owned()) * a.step.memory();
    }
    // The owned example's of a batch that may be absent.
    template <typename U> MANN_INLINE U *of_owned(U *batch, int count) const {
        return batch ? batch + int64_t(share.owned()) * count : nullptr;
    }
    MANN_INLINE int length_of(const Unit &u) const { return u.exists ? at<int>(l.lengths)[u.example] : 0; }
    MANN_INLINE int owned_length() const { return at<int>(l.lengths)[share.rank()]; }

    MANN_INLINE MannBackward(const MannBackwardArgs<S> &args, char *memory)
        : a(args), s(a.sizes), l(a.layout), shared(memory), share{s} {}

    MANN_INLINE void begin() {
        take_lengths(s, a.lengths, share.first_example(), at<int>(l.lengths));
        const auto weight_hh = [&](int row, int column) { return share.weight_hh(a.weight_hh, row, column); };
        const int rows = 4 * s.units;
        held.take(s.padded<S>(), [&](int row, int column) { return row < rows ? weight_hh(row, column) : S(0.0f); });
        take_matrix(at<S>(l.weight_hh), rows - l.held, l.leading_hh,
                    [&](int row, int column) { return weight_hh(row + l.held, column); });
        take_matrix(at<S>(l.weight_head), s.units, l.leading_head,
                    [&](int row, int p) { return share.weight_head(a.weight_head, row, p); });
        for_each(s.head, [&](int p) { at<T>(l.bias_head)[p] = to_arith(a.bias_head[p]); });
        fill_zero(at<S>(l.dhead), tile * l.leading_head);
        const Unit u = share.unit_of_thread();
        if (u.exists) {
            dh() = a.dh1 ? to_arith(a.dh1[share.at(u, u.b)]) : T(0);
            dc() = a.dc1 ? to_arith(a.dc1[share.at(u, u.b)]) : T(0);
        }
        if (share.owned() >= s.B) return;
        for_each(s.words,
                 [&](int i) { at<T>(l.carried)[i] = a.dreads1 ? to_arith(of_owned(a.dreads1, s.words)[i]) : T(0); });
        if (a.dmemory1) take_rows(of_owned(a.dmemory1, s.N * s.W), s.N, s.W, a.step.stride, at<T>(l.dmemory));
        else fill_zero(at<T>(l.dmemory), int(a.step.memory()));
        take_heads(of_owned(a.dread_weights1, s.R * s.N), s.R, s.N, at<T>(l.dweights));
    }
    // Of the steps in which no example of the cluster takes part.
    MANN_INLINE void pad(int last) const {
        const Unit u = share.unit_of_thread();
        for (int t = last; t < s.T; ++t) {
            for (int g = 0; u.exists && g < 4; ++g) a.dgates[share.at(u, s.row(t, u.b) * 4 + g)] = S(0.0f);
            rest(t);
        }
    }
    MANN_INLINE void rest(int t) const {
        if (share.owned() < s.B)
            for_each(s.head, [&](int p) { a.dhead[s.row(t, share.owned()) * s.head + p] = S(0.0f); });
    }

    // The read weights before a segment.
    MANN_INLINE void take_weights(int start) const {
        if (start == 0) {
            take_heads(of_owned(a.read_weights, s.R * s.N), s.R, s.N, weights_of(start));
        } else {
            const int64_t copy = s.row(start / s.checkpoint_every - 1, share.owned());
            take_heads(a.saved_read_weights + copy * s.R * s.N, s.R, s.N, weights_of(start));
        }
    }
    MANN_INLINE void take_head(int t) const {
        const int64_t row = s.row(t, share.owned());
        make_head(s, head(), [&](int p) { return a.heads[row * s.head + p] + at<T>(l.bias_head)[p]; });
        // whoever calls, no slot is outside memory
        for_each(s.R, [&](int h) {
            at<int32_t>(l.least_used)[h] = max(0, min(a.saved_least_used[row * s.R + h], s.N - 1));
        });
    }
    // The cell state after a step: c of the LSTM.
    MANN_INLINE static T cell_after(T gate_in, T gate_forget, T cell, T c) { return gate_forget * c + gate_in * cell; }
    MANN_INLINE void take_cells_again(int start, int stop) const {
        const Unit u = share.unit_of_thread();
        if (!u.exists) return;
        T now = start == 0 ? to_arith(a.c[share.at(u, u.b)])
                           : a.saved_c[share.at(u, s.row(start / s.checkpoint_every - 1, u.b))];
        for (int t = start; t < min(stop, length_of(u)); ++t) {
            a.cells[share.at(u, s.row(t - start, u.b))] = now;
            const T *row = a.saved_gates + share.at(u, s.row(t, u.b) * 4);
            now = cell_after(row[0], row[s.H], row[2 * s.H], now);
        }
    }
    MANN_INLINE void take_steps_again(int start, int stop) const {
        if (start >= owned_length()) return;
        if (start == 0) {
            take_rows(of_owned(a.memory, s.N * s.W), s.N, s.W, a.step.stride, at<T>(l.memory));
        } else {
            const int64_t copy = s.row(start / s.checkpoint_every - 1, share.owned());
            take_rows(a.saved_memory + copy * s.N * s.W, s.N, s.W, a.step.stride, at<T>(l.memory));
        }
        take_weights(start);
        for (int t = start; t < min(stop, owned_length()); ++t) {
            const int j = t - start;
            take_head(t);
            __syncthreads();
            StepForward<T> step{};
            step.memory = at<T>(l.memory), step.previous = weights_of(t), step.weights = weights_of(t + 1);
            step.key = head().key, step.add = head().add, step.gate = head().gate, step.beta = head().beta;
            step.least_used = at<int32_t>(l.least_used), step.scratch = at<T>(l.step_scratch);
            step.overwritten = record_overwritten(j);
            write_and_address(a.step, step);
            __syncthreads();
            for_each(int(a.step.slots()), [&](int i) { record_weights(j)[i] = weights_of(t + 1)[i]; });
            if ((j + 1) % kRestartEvery == 0)
                for_each(int(a.step.memory()), [&](int i) { restart_of(j)[i] = at<T>(l.memory)[i]; });
        }
        __syncthreads();
    }

    // What undoing step t needs of the unit, before it is needed.
    struct UnitStep {
        T gates[4], previous_c, c, doutput;
    };
    MANN_INLINE UnitStep fetch_unit(int t, int start) const {
        const Unit u = share.unit_of_thread();
        UnitStep step{};
        if (t >= length_of(u)) return step;
        step.previous_c = a.cells[share.at(u, s.row(t - start, u.b))];
        step.doutput = to_arith(a.doutput[s.row(t, u.b) * s.recurrent + share.first_unit() + u.unit]);
#pragma unroll
        for (int g = 0; g < 4; ++g) step.gates[g] = a.saved_gates[share.at(u, s.row(t, u.b) * 4 + g)];
        step.c = cell_after(step.gates[0], step.gates[1], step.gates[2], step.previous_c);
        return step;
    }
    // And of the owned example.
    MANN_INLINE void fetch(int t, int start) const {
        const int j = t - start;
        if (t >= owned_length()) return;
        take_head(t);
        if (j == 0) take_weights(start);
        else for_each(int(a.step.slots()), [&](int i) { weights_of(t)[i] = record_weights(j - 1)[i]; });
        if ((j + 1) % kRestartEvery == 0)
            for_each(int(a.step.memory()), [&](int i) { at<T>(l.memory)[i] = restart_of(j)[i]; });
        for_each(s.words, [&](int i) { at<T>(l.overwritten)[i] = record_overwritten(j)[i]; });
        for_numbers(head_groups(s.R) * kHeadGroup, s.W, [&](int h, int w, int i) {
            const S *row = a.doutput + s.row(t, share.owned()) * s.recurrent + s.H;
            at<T>(l.dreads)[of_head(h, w, s.W)] = h < s.R ? to_arith(row[i]) : T(0);
        });
    }

    // The memory's step of the owned example, and the gradient of its head to every block.
    MANN_INLINE void forget(int t) const {
        for_numbers(s.R, s.W, [&](int h, int w, int i) { at<T>(l.dreads)[of_head(h, w, s.W)] += at<T>(l.carried)[i]; });
        __syncthreads();
        StepBackward<T> step{};
        step.memory = at<T>(l.memory), step.dmemory = at<T>(l.dmemory);
        step.weights = weights_of(t + 1), step.previous = weights_of(t), step.dweights = at<T>(l.dweights);
        step.dreads = at<T>(l.dreads), step.least_used = at<int32_t>(l.least_used);
        step.key = head().key, step.add = head().add, step.gate = head().gate, step.beta = head().beta;
        step.overwritten = at<T>(l.overwritten), step.scratch = at<T>(l.step_scratch);
        step.dgate = at<T>(l.dgate), step.dbeta = s.key_strength ? at<T>(l.dbeta) : nullptr;
        const int from = share.rank();
        const int64_t row = s.row(t, share.owned());
        const auto give = [&](int p, T value) {
            const S grad = to_storage<S>(value);
            for (int rank = 0; rank < tile; ++rank) of_rank(at<S>(l.dhead), rank)[from * l.leading_head + p] = grad;
            a.dhead[row * s.head + p] = grad;
        };
        step_backward<true>(a.step, step, [&](int h, int w, T dkey, T dadd) {
            const T key = step.key[of_head(h, w, s.W)], add = step.add[of_head(h, w, s.W)];
            const int word = h * s.W + w;
            if (s.write_add) give(s.add_at + word, s.squash ? dadd * (1 - add * add) : dadd);
            else dkey += dadd;
            give(word, s.squash ? dkey * (1 - key * key) : dkey);
        });
        for_each(s.R, [&](int h) { // complete since a barrier inside the step
            give(s.words + h, step.dgate[h]);
            if (s.key_strength) give(s.beta_at + h, step.dbeta[h] * -exponential_minus_one(-step.beta[h]));
        });
    }

    MANN_INLINE void lstm(int t, const UnitStep &step) {
        const Unit u = share.unit_of_thread();
        if (u.example >= tile) return;
        T grads[4] = {};
        if (t < length_of(u)) {
            const T whole_dh = dh() + step.doutput + total<tile>(partial(), u.example, u.unit);
            const auto grad = lstm_cell_backward(step.gates[0], step.gates[1], step.gates[2], step.gates[3],
                                                 step.previous_c, hyperbolic_tangent(step.c), whole_dh, dc());
            grads[0] = grad.gate_in, grads[1] = grad.gate_forget, grads[2] = grad.cell, grads[3] = grad.gate_out;
            dc() = grad.c;
        }
#pragma unroll
        for (int g = 0; g < 4; ++g) {
            at<S>(l.dgates)[u.example * l.leading_gates + g * s.units + u.unit] = to_storage<S>(grads[g]);
            if (u.exists) a.dgates[share.at(u, s.row(t, u.b) * 4 + g)] = to_storage<S>(grads[g]);
        }
    }
    // The part of the gradient of (h, reads) that goes through the block's gates, to whom it belongs.
    MANN_INLINE void parts() const {
        const Matrix<S> weights{at<S>(l.weight_hh), l.leading_hh, 4 * s.units, s.padded<S>(), l.held};
        const int from = share.rank();
        held.multiply(weights, {at<S>(l.dgates), l.leading_gates}, [&](int to, int column, T sum) {
            const int read = column - s.reads_at<S>();
            if (column < s.H)
                of_rank(at<T>(l.parts_of_dh), column / s.units)[(from * tile + to) * s.units + column % s.units] = sum;
            else if (read >= 0) of_rank(at<T>(l.parts_of_dreads), to)[from * s.words + read] = sum;
        });
    }
    MANN_INLINE void receive(int t) const {
        const Unit u = share.unit_of_thread();
        if (t < length_of(u)) {
            T sum = 0;
            for (int rank = 0; rank < tile; ++rank)
                sum += at<T>(l.parts_of_dh)[(rank * tile + u.example) * s.units + u.unit];
            dh() = sum;
        }
        if (t < owned_length())
            for_each(s.words, [&](int i) {
                T sum = 0;
                for (int rank = 0; rank < tile; ++rank) sum += at<T>(l.parts_of_dreads)[rank * s.words + i];
                at<T>(l.carried)[i] = sum;
            });
        __syncthreads(); // others use their place
    }

    MANN_INLINE void undo(int t, int start) {
        if (t < owned_length()) forget(t);
        else rest(t);
        cluster_arrive();
        const UnitStep step = fetch_unit(t, start);
        cluster_wait();
        fill_zero(at<S>(l.dgates), tile * l.leading_gates);
        const Matrix<S> weights{at<S>(l.weight_head), l.leading_head, s.units, s.head, 0};
        rows_times_vectors<tile>(weights, {at<S>(l.dhead), l.leading_head}, partial(), false);
        __syncthreads();
        lstm(t, step);
        __syncthreads();
        parts();
        cluster_arrive();
        if (t > start) fetch(t - 1, start);
        cluster_wait();
        receive(t);
    }

    MANN_INLINE void run() {
        begin();
        __syncthreads();
        int last = 0;
        for (int e = 0; e < tile; ++e) last = max(last, at<int>(l.lengths)[e]);
        pad(last);
        cluster_barrier(); // every block is there to be written to
        for (int stop = last; stop > 0;) {
            const int start = (stop - 1) / s.checkpoint_every * s.checkpoint_every;
            take_cells_again(start, stop);
            take_steps_again(start, stop);
            fetch(stop - 1, start);
            __syncthreads();
            for (int t = stop - 1; t >= start; --t) undo(t, start);
            stop = start;
        }
        __syncthreads();
        finish();
    }
    MANN_INLINE void finish() const {
        const Unit u = share.unit_of_thread();
        if (u.exists) a.dh[share.at(u, u.b)] = to_storage<S>(dh()), a.dc[share.at(u, u.b)] = to_storage<S>(dc());
        if (share.owned() >= s.B) return;
        for_each(s.words, [&](int i) { of_owned(a.dreads, s.words)[i] = to_storage<S>(at<T>(l.carried)[i]); });
        give_rows(at<T>(l.dmemory), s.N, s.W, a.step.stride, of_owned(a.dmemory, s.N * s.W));
        give_heads(at<T>(l.dweights), s.R, s.N, of_owned(a.dread_weights, s.R * s.N));
    }
};

template <typename S, int tile>
__global__ void __launch_bounds__(kThreads, 1)
    mann_sequence_bwd_kernel(const __grid_constant__ MannBackwardArgs<S> args) {
    MANN_DYNAMIC_SHARED(shared);
    MannBackward<S, tile>(args, shared).run();
}

} // namespace mann::cuda
