// mann_sequence, backward, on clusters: two exchanges a step, no barrier of the cluster between them.
//
// A segment of steps at a time, the last one first: the blocks that have a memory recompute its steps, then the
// cluster undoes them. Who has slots of an example makes its share of the gradient of the head and sends it to all
// blocks. A block makes the gradient of its units' h and gates, and from these its part of the gradient of (h, reads)
// before the step, for all examples: h's to the block of the unit, the reads' to the blocks that have the example's
// memory. While a block waits for heads, it fetches what the step before needs; while it waits for the rest, it makes
// that step's head.
//
// Why nothing is overwritten too early: heads of step t - 1 are sent by a block that has the parts of step t from all,
// and each of these has used the heads of step t by then. Parts of the reads' gradient are used before the next heads
// are sent; those of h's may still be in use when the next arrive: they have two buffers, and as many mailboxes.
#include "controller.h"
#include "mann_sequence.h"
#include "parts.h"
#include "recurrent_backward.h"
#include "rows_backward.h"

namespace mann::cuda {

struct BackwardShared {
    // By messages.
    alignas(16) T dhead_parts[kOwners][kSent];
    alignas(16) T dh_parts[2][kBlocks][kUnits][kExamples];
    alignas(16) T dread_parts[kBlocks][kWords];
    PartSums sums;
    Mailbox dhead_box, dh_box[2], dread_box;
    // Of the block.
    RecurrentWeights weight_hh;
    alignas(16) T weight_head[kUnits][kHeadPadded];
    alignas(16) T dhead[kHeadPadded][kExamples];
    GateGradients dgates;
    alignas(16) T own_dhead[kSent]; // of dhead_parts
    alignas(16) T dreads[W][kHeads];
    alignas(16) Step step;
    T products[W][kHeads]; // of dreads and reads
    T bias_head[kHead], overwritten[kWords], carried[kWords], mean_parts[kHeads];
    WarpGradients warps;
};
constexpr int kDheadBytes = kOwners * kSent * sizeof(T);
constexpr int kDreadBytes = kBlocks * kWords * sizeof(T);

struct Backward {
    const MannBackward<S> &a;
    BackwardShared &s;
    const Share share;
    RowsBackward rows;
    // Of the lane's cell.
    const bool exists;                                            // whether there is such a unit
    const int example, length;                                    // in the batch; its real steps
    T dh = 0, dc = 0, gates[4] = {}, previous_c = 0, doutput = 0; // gates and what follows: of the step to be undone
    T dgates[Cell::kGates];                                       // the lane's, of the step that is undone
    // Of the step to come, for the owned example.
    int fetched_slot;
    T fetched_head[kHeadShare], fetched_doutput[share_of(kWords)], fetched_reads[share_of(kWords)];
    T fetched_overwritten[share_of(kWords)];
    Columns columns;
    const int owned_length;        // real steps of the block's example
    int last = 0;                  // of the longest of the cluster
    int exchanges = 0, undone = 0; // of sums; steps so far

    MANN_INLINE Backward(const MannBackward<S> &args, BackwardShared &shared)
        : a(args), s(shared), share(args.batch), rows{}, exists(Cell::unit() < share.units()),
          example(share.first_example + Cell::example()),
          length(share.steps_of(args.lengths, Cell::example(), args.steps)),
          columns(args.weight_hh, share, shared.weight_hh),
          owned_length(share.owns() ? share.steps_of(args.lengths, share.owned(), args.steps) : 0) {
        rows.part = share.part();
        for (int e = 0; e < kExamples; ++e) last = max(last, share.steps_of(a.lengths, e, a.steps));
    }
    MANN_INLINE bool is_real() const { return exists && example < a.batch; }
    MANN_INLINE int unit() const { return share.first_unit() + Cell::unit(); } // of all
    MANN_INLINE int64_t row(int t, int b) const { return int64_t(t) * a.batch + b; }
    MANN_INLINE int64_t unit_at(int64_t row) const { return row * H + unit(); }
    MANN_INLINE int64_t gates_at(int t, int gate) const { return (row(t, example) * 4 + gate) * H + unit(); }
    MANN_INLINE int dh_bytes() const { return kBlocks * share.units() * kExamples * int(sizeof(T)); }
    MANN_INLINE void begin() {
        if (threadIdx.x == 0) {
            mailbox_open(&s.dhead_box, kDheadBytes);
            mailbox_open(&s.dh_box[0], dh_bytes()), mailbox_open(&s.dh_box[1], dh_bytes());
            open_sums(s.sums);
            mailbox_open(&s.dread_box, kDreadBytes);
        }
        columns.take_weights();
        s.dgates.clear();
        copy_head(s.weight_head, a.weight_head, share);
        copy_numbers<kHead>([&](int p) { return &s.bias_head[p]; }, [&](int p) { return a.bias_head + p; });
        open_step(s.step);
        for (int i = thread_again(); i < 4 * kUnits * kExamples; i += kThreads)
            s.dgates.at(i / kExamples, i % kExamples) = 0;
        for (int i = thread_again(); i < (kHeadPadded - kHead) * kExamples; i += kThreads)
            s.dhead[kHead + i / kExamples][i % kExamples] = 0;
        for (int p = thread_again(); p < kSent; p += kThreads) s.own_dhead[p] = 0;
        for (int i = thread_again(); i < W * kHeads; i += kThreads) s.dreads[i / kHeads][i % kHeads] = 0;
        for (int h = thread_again(); h < kHeads; h += kThreads) s.mean_parts[h] = 0;
        const bool real = share.is_real();
        const int b = share.example();
        copy_numbers<kWords>([&](int k) { return &s.carried[k]; },
                             [&](int k) { return real && a.dreads1 ? a.dreads1 + int64_t(b) * kWords + k : nullptr; });
        rows.take_dmemory(real && a.dmemory1 ? a.dmemory1 + int64_t(b) * N * W : nullptr);
        rows.take_dweights(real && a.dread_weights1 ? a.dread_weights1 + int64_t(b) * R * N : nullptr);
        if (is_real()) {
            const int64_t at = unit_at(example);
            dh = a.dh1 ? to_arith(a.dh1[at]) : T(0), dc = a.dc1 ? to_arith(a.dc1[at]) : T(0);
        }
        copy_async_commit();
        copy_async_wait<0>(); // seen by all after the cluster's barrier
    }
    // Of the steps in which no example of the cluster takes part.
    MANN_INLINE void pad() const {
        for (int t = last; t < a.steps; ++t) {
            if (is_real() && Cell::first()) {
#pragma unroll
                for (int g = 0; g < 4; ++g) a.dgates[gates_at(t, g)] = to_storage<S>(T(0));
            }
            for (int p = thread_again(); p < kHead && share.is_real() && share.part() == 0; p += kThreads)
                a.dhead[row(t, share.example()) * kHead + p] = to_storage<S>(T(0));
        }
    }

    MANN_INLINE void recompute_cells(int start, int stop) const {
        if (!is_real() || !Cell::first()) return;
        T c = start == 0 ? to_arith(a.c[unit_at(example)])
                         : a.saved_c[unit_at(row(start / a.checkpoint_every - 1, example))];
        const int end = min(stop, length);
        constexpr int kAhead = 8;
        for (int t = start; t < end; t += kAhead) {
            T in[kAhead], forget[kAhead], cell[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const T *from = a.saved_gates + gates_at(min(t + i, end - 1), 0);
                in[i] = from[0], forget[i] = from[H], cell[i] = from[2 * H];
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (t + i < end) a.cells[unit_at(row(t + i - start, example))] = c;
                c = forget[i] * c + in[i] * cell[i];
            }
        }
    }
    // What makes a step of the owned example, before it is made.
    MANN_INLINE void fetch_head(int t) {
        const int64_t at = row(t, share.example());
#pragma unroll
        for (int i = 0; i < kHeadShare; ++i) {
            const int p = thread_again() + i * kThreads;
            if (p < kHead) fetched_head[i] = a.heads[at * kHead + p];
        }
        if (int(threadIdx.x) < R) fetched_slot = a.saved_least_used[at * R + threadIdx.x];
    }
    // Barrier before and after.
    MANN_INLINE void make_step() {
        make_head(s.step, [&](int p, int i) { return fetched_head[i] + s.bias_head[p]; });
        if (int(threadIdx.x) < R) // whoever calls, no slot is outside memory
            s.step.slots[threadIdx.x] = max(0, min(fetched_slot, N - 1));
    }
    MANN_INLINE void recompute_steps(int start, int stop) {
        if (start >= owned_length) return;
        const int64_t copy = row(start / a.checkpoint_every - 1, share.example());
        if (start == 0) {
            rows.take_memory(a.memory + int64_t(share.example()) * N * W);
            rows.take_weights(a.read_weights + int64_t(share.example()) * R * N);
        } else {
            rows.take_memory(a.saved_memory + copy * N * W);
            rows.take_weights(a.saved_read_weights + copy * R * N);
        }
        const int end = min(stop, owned_length);
        fetch_head(start);
        for (int t = start; t < end; ++t) {
            const int j = t - start;
            const int64_t record = row(j, share.example());
            __syncthreads();
            make_step();
            if (t + 1 < end) fetch_head(t + 1);
            __syncthreads();
            rows.give_overwritten(s.step, a.overwritten + record * kWords);
            if (warp_of_block() < kRowWarps) rows.write_and_match(s.step, T(a.eps), s.sums.tops[warp_of_block()]);
            finish_recomputed(rows, s.sums, share.owned() * kParts, exchanges);
            rows.give_record(a.weights + record * N * kHeads);
            if ((j + 1) % kRestartEvery == 0)
                rows.give_memory(a.restarts + row(j / kRestartEvery, share.example()) * N * W);
        }
        if (owned_length <= stop && a.dread_weights1) { // the means of the step that is undone first
            if (warp_of_block() < kRowWarps) rows.sum_means(s.sums.sums[warp_of_block()]);
            exchange_sums(s.sums, share.owned() * kParts, share.part(), exchanges, false);
            if (int(threadIdx.x) < R) s.mean_parts[threadIdx.x] = s.sums.total[threadIdx.x];
        }
        __syncthreads();
    }

    // What undoing step t needs, before it is needed.
    MANN_INLINE void fetch_cell(int t, int start) {
        if (!exists || t >= length) return;
#pragma unroll
        for (int g = 0; g < 4; ++g) gates[g] = a.saved_gates[gates_at(t, g)];
        previous_c = a.cells[unit_at(row(t - start, example))];
        doutput = to_arith(a.doutput[row(t, example) * kRecurrent + unit()]);
    }
    MANN_INLINE void fetch(int t, int start) {
        if (t >= owned_length) return;
        const int j = t - start, b = share.example();
        fetch_head(t);
#pragma unroll
        for (int i = 0; i < share_of(kWords); ++i) {
            const int k = thread_again() + i * kThreads;
            if (k >= kWords) break;
            fetched_doutput[i] = to_arith(a.doutput[row(t, b) * kRecurrent + H + k]);
            fetched_reads[i] = to_arith(a.output[row(t, b) * kRecurrent + H + k]);
            fetched_overwritten[i] =
                a.overwritten[row(j, b) * kWords + k]; // of slots of the part; no other is looked at
        }
        if (j > 0) rows.take_record(a.weights + row(j - 1, b) * N * kHeads);
        else if (start == 0) rows.take_next(a.read_weights + int64_t(b) * R * N);
        else rows.take_next(a.saved_read_weights + row(start / a.checkpoint_every - 1, b) * R * N);
        if ((j + 1) % kRestartEvery == 0) rows.take_memory(a.restarts + row(j / kRestartEvery, b) * N * W);
    }

    // What was fetched of the step of the owned example that is undone next. Barrier before and after.
    MANN_INLINE void make_fetched() {
        make_step();
#pragma unroll
        for (int i = 0; i < share_of(kWords); ++i)
            if (thread_again() + i * kThreads < kWords)
                s.overwritten[thread_again() + i * kThreads] = fetched_overwritten[i];
    }

    // The gradient of the reads of step t.
    MANN_INLINE void receive_dreads(int t) {
        if (undone > 0) mailbox_wait(&s.dread_box, undone - 1);
        if (undone > 0 && threadIdx.x == 0) mailbox_expect(&s.dread_box, kDreadBytes);
        if (t >= owned_length) return;
#pragma unroll
        for (int i = 0; i < share_of(kWords); ++i) {
            const int k = thread_again() + i * kThreads;
            if (k >= kWords) break;
            T sum = t + 1 < owned_length ? T(0) : s.carried[k];
            if (t + 1 < owned_length) {
#pragma unroll
                for (int from = 0; from < kBlocks; ++from) sum += s.dread_parts[from][k];
            }
            sum += fetched_doutput[i];
            s.dreads[k % W][k / W] = sum, s.products[k % W][k / W] = sum * fetched_reads[i];
        }
        __syncthreads();
    }
    // The memory's step of the owned example, as far as the block's slots go; its share of the gradient of the head to
    // all blocks.
    MANN_INLINE void forget(int t) {
        if (t < owned_length) {
            if (warp_of_block() < kRowWarps) {
                T means[R]; // the sum over all slots of read weight times its gradient
                sum_heads([&](int w, int h) { return s.products[w][h]; }, means);
#pragma unroll
                for (int h = 0; h < R; ++h) means[h] += s.mean_parts[h];
                rows.undo(s.step, s.dreads, means, s.overwritten, T(a.eps), s.warps);
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < share_of(kHead + R); ++i) {
                const int p = thread_again() + i * kThreads;
                if (p < kHead + R) s.own_dhead[p] = head_gradient(s.warps, s.step, p);
            }
        }
        __syncthreads();
        for (int i = thread_again(); i < kSent / 4 * kBlocks; i += kThreads) {
            const int p = i % (kSent / 4), to = i / (kSent / 4);
            send(&s.dhead_parts[share.rank][4 * p], to, &s.dhead_box,
                 reinterpret_cast<const Four<T> *>(s.own_dhead)[p]);
        }
    }
    MANN_INLINE void receive_heads(int t) {
        mailbox_wait(&s.dhead_box, undone);
        if (threadIdx.x == 0 && t > 0) mailbox_expect(&s.dhead_box, kDheadBytes);
#pragma unroll
        for (int n = 0; n < share_of(kHead * kExamples); ++n) {
            const int i = thread_again() + n * kThreads, p = i % kHead, e = i / kHead;
            if (i >= kHead * kExamples) break;
            T sum = 0;
#pragma unroll
            for (int part = 0; part < kParts; ++part) sum += s.dhead_parts[e * kParts + part][p];
            s.dhead[p][e] = rounded_to<S>(sum);
            const int b = share.first_example + e;
            if (share.rank == e * kParts && b < a.batch) a.dhead[row(t, b) * kHead + p] = to_storage<S>(sum);
        }
        if (share.owns() && t < owned_length && int(threadIdx.x) < R) {
            T sum = 0;
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                sum += s.dhead_parts[share.owned() * kParts + part][kMeanAt + threadIdx.x];
            s.mean_parts[threadIdx.x] = sum;
        }
    }
    // The gradient of h of the units from the step after, before it is used.
    MANN_INLINE void receive_dh(int t) {
        if (undone == 0 || share.units() == 0) return;
        const int buffer = (undone - 1) & 1;
        mailbox_wait(&s.dh_box[buffer], (undone - 1) / 2);
        if (threadIdx.x == 0 && t > 0) mailbox_expect(&s.dh_box[buffer], dh_bytes());
        if (!exists || t + 1 >= length) return;
        T sum = 0;
#pragma unroll
        for (int from = 0; from < kBlocks; ++from) sum += s.dh_parts[buffer][from][Cell::unit()][Cell::example()];
        dh = sum;
    }
    MANN_INLINE void lstm(int t) {
        if (warp_of_block() >= kUnitWarps) return;
        T sums[kCells] = {}; // of what comes through the head
        const int first = warp_of_block() * kUnitsOfWarp;
#pragma unroll
        for (int i = 0; i < (kHeadPadded + kWarp - 1) / kWarp; ++i) {
            const int p = i * kWarp + lane_of_warp();
            if (p >= kHeadPadded) continue;
            const Each each = Each::load(s.dhead[p]);
#pragma unroll
            for (int n = 0; n < kUnitsOfWarp; ++n) {
                const T weight = s.weight_head[least(first + n, kUnits - 1)][p];
#pragma unroll
                for (int e = 0; e < kExamples; ++e) sums[n * kExamples + e] += weight * each.at[e];
            }
        }
        scatter_sums<1>(sums);
        LstmCellGrad<T> cell{};
        if (exists && t < length) {
            const T c = gates[1] * previous_c + gates[0] * gates[2];
            cell = lstm_cell_backward(gates[0], gates[1], gates[2], gates[3], previous_c, hyperbolic_tangent(c),
                                      dh + doutput + sums[0], dc);
            dc = cell.c;
        }
#pragma unroll
        for (int i = 0; i < Cell::kGates; ++i) {
            const int g = Cell::gate(i);
            dgates[i] = g == 0 ? cell.gate_in : g == 1 ? cell.gate_forget : g == 2 ? cell.cell : cell.gate_out;
            if (exists && Cell::first_of_gates())
                s.dgates.at(Cell::unit() * 4 + Cell::gate(i), Cell::example()) = rounded_to<S>(dgates[i]);
        }
    }
    MANN_INLINE void store_gates(int t) const {
        if (!is_real() || !Cell::first_of_gates()) return;
        S *to = a.dgates + gates_at(t, Cell::gate(0));
#pragma unroll
        for (int i = 0; i < Cell::kGates; ++i) to[i * H] = to_storage<S>(dgates[i]);
    }
    // The part of the gradient of (h, reads) that goes through the block's gates, to whom it belongs.
    MANN_INLINE void send_parts() {
        constexpr int kTogether = Columns::kTogether;
        columns.multiply(s.dgates, [&](int k, int first, const T *x) {
            if (k < H) {
                send_several<kTogether>(&s.dh_parts[undone & 1][share.rank][k % kUnits][first], k / kUnits,
                                        &s.dh_box[undone & 1], x);
            } else if (k < kRecurrent) {
#pragma unroll
                for (int e = 0; e < kTogether; ++e)
#pragma unroll
                    for (int part = 0; part < kParts; ++part)
                        send(&s.dread_parts[share.rank][k - H], (first + e) * kParts + part, &s.dread_box, x[e]);
            }
        });
    }

    MANN_INLINE void undo(int t, int start) {
        if (share.owns()) {
            receive_dreads(t);
            forget(t);
        }
        receive_dh(t);
        if (share.owns() && t > start) fetch(t - 1, start);
        receive_heads(t);
        __syncthreads();
        lstm(t);
        __syncthreads();
        send_parts();
        store_gates(t);
        if (t > start) fetch_cell(t - 1, start);
        if (share.owns() && t > start && t - 1 < owned_length) make_fetched();
        ++undone;
        __syncthreads();
    }
    MANN_INLINE void run() {
        begin();
        pad();
        cluster_barrier(); // every block is there to be written to
        for (int stop = last; stop > 0;) {
            const int start = (stop - 1) / a.checkpoint_every * a.checkpoint_every;
            recompute_cells(start, stop);
            __syncthreads();
            recompute_steps(start, stop);
            fetch_cell(stop - 1, start);
            if (share.owns()) {
                fetch(stop - 1, start);
                __syncthreads();
                if (stop - 1 < owned_length) make_fetched();
            }
            __syncthreads();
            for (int t = stop - 1; t >= start; --t) undo(t, start);
            stop = start;
        }
        finish();
        cluster_barrier(); // nobody writes to a block that has ended
    }
    MANN_INLINE void finish() {
        receive_dh(-1);
        if (share.owns() && undone > 0) mailbox_wait(&s.dread_box, undone - 1);
        if (is_real() && Cell::first()) {
            const int64_t at = unit_at(example);
            a.dh[at] = to_storage<S>(dh), a.dc[at] = to_storage<S>(dc);
        }
        if (!share.is_real()) return;
        const int b = share.example();
        for (int k = thread_again(); k < kWords && share.part() == 0; k += kThreads) {
            T sum = owned_length > 0 ? T(0) : s.carried[k];
            for (int from = 0; owned_length > 0 && from < kBlocks; ++from) sum += s.dread_parts[from][k];
            a.dreads[int64_t(b) * kWords + k] = to_storage<S>(sum);
        }
        rows.give_dmemory(a.dmemory + int64_t(b) * N * W);
        rows.give_dweights(a.dread_weights + int64_t(b) * R * N);
    }
};

MANN_KERNEL(mann_sequence_backward, MANN_BOUNDS(kThreads, 1), MannBackward<S>) {
    MANN_DYNAMIC_SHARED(memory);
    static_assert(sizeof(BackwardShared) <= MANN_SHARED_BYTES);
    Backward(args, *reinterpret_cast<BackwardShared *>(memory)).run();
}

} // namespace mann::cuda
