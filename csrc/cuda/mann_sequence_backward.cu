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
#include "rows_backward.h"

namespace mann::cuda {

constexpr int kUnitWarps = least(kUnits, kWarps), kUnitsOfWarp = (kUnits + kUnitWarps - 1) / kUnitWarps;
constexpr int kColumnsOfThread = (kRecurrent + kThreads - 1) / kThreads;

struct BackwardShared {
    // By messages.
    alignas(16) T dhead_parts[kOwners][kSent];
    alignas(16) T dh_parts[2][kBlocks][kUnits][kExamples];
    alignas(16) T dread_parts[kBlocks][kWords];
    PartSums sums;
    Mailbox dhead_box, dh_box[2], dread_box;
    // Of the block.
    alignas(16) T weight_hh[MANN_HELD ? 1 : kUnits][MANN_HELD ? 1 : kRecurrent][4];
    alignas(16) T weight_head[kUnits][kHeadPadded];
    alignas(16) T dhead[kHeadPadded][kExamples];
    alignas(16) T dgates[4 * kUnits][kExamples];
    alignas(16) T own_dhead[kSent]; // of dhead_parts
    alignas(16) T dreads[W][kHeads];
    alignas(16) Step step;
    T raw_head[kHead], bias_head[kHead], doutput[kWords], output[kWords], overwritten[kWords], carried[kWords];
    WarpGradients warps;
    T means[kHeads], mean_parts[kHeads];
    T dh[kUnits][kExamples], dc[kUnits][kExamples]; // each written and read by the warp of the unit
};
constexpr int kDheadBytes = kOwners * kSent * sizeof(T);
constexpr int kDreadBytes = kBlocks * kWords * sizeof(T);

struct Backward {
    const MannBackward<S> &a;
    BackwardShared &s;
    const Share share;
    RowsBackward rows;
    T gate[kUnitsOfWarp], previous_c[kUnitsOfWarp], doutput[kUnitsOfWarp]; // of the step to be undone
    T held[MANN_HELD ? kColumnsOfThread : 1][MANN_HELD ? kUnits : 1][4];
    int length, owned_length, last; // real steps of the lane's example, of the block's, of the longest
    int exchanges = 0, undone = 0;  // of sums; steps so far

    MANN_INLINE Backward(const MannBackward<S> &args, BackwardShared &shared)
        : a(args), s(shared), share(args.batch), rows{} {
        rows.part = share.part();
        length = share.steps_of(a.lengths, GateLane::example(), a.steps);
        owned_length = share.owns() ? share.steps_of(a.lengths, share.owned(), a.steps) : 0;
        last = 0;
        for (int e = 0; e < kExamples; ++e) last = max(last, share.steps_of(a.lengths, e, a.steps));
    }
    MANN_INLINE int unit(int k) const { return warp_of_block() + k * kUnitWarps; }
    MANN_INLINE bool has_unit(int k) const { return warp_of_block() < kUnitWarps && unit(k) < share.units(); }
    MANN_INLINE T &dh(int k) const { return s.dh[least(unit(k), kUnits - 1)][GateLane::example()]; }
    MANN_INLINE T &dc(int k) const { return s.dc[least(unit(k), kUnits - 1)][GateLane::example()]; }
    MANN_INLINE int lane_example() const { return share.first_example + GateLane::example(); }
    MANN_INLINE int64_t row(int t, int b) const { return int64_t(t) * a.batch + b; }
    MANN_INLINE int64_t unit_at(int64_t row, int k) const { return row * H + share.first_unit() + unit(k); }
    MANN_INLINE T weight_hh(int unit, int k, int gate) const {
        return to_arith(a.weight_hh[(int64_t(gate) * H + share.first_unit() + unit) * kRecurrent + k]);
    }

    MANN_INLINE int dh_bytes() const { return kBlocks * share.units() * kExamples * int(sizeof(T)); }
    MANN_INLINE void begin() {
        if (threadIdx.x == 0) {
            mailbox_open(&s.dhead_box, kDheadBytes);
            mailbox_open(&s.dh_box[0], dh_bytes()), mailbox_open(&s.dh_box[1], dh_bytes());
            open_sums(s.sums);
            mailbox_open(&s.dread_box, kDreadBytes);
        }
        if constexpr (MANN_HELD) {
#pragma unroll
            for (int n = 0; n < kColumnsOfThread; ++n)
#pragma unroll
                for (int u = 0; u < kUnits; ++u)
#pragma unroll
                    for (int g = 0; g < 4; ++g) {
                        const int k = int(threadIdx.x) + n * kThreads;
                        held[n][u][g] = u < share.units() && k < kRecurrent ? weight_hh(u, k, g) : T(0);
                    }
        } else {
            for (int i = thread_again(); i < kUnits * 4 * kRecurrent; i += kThreads) {
                const int k = i % kRecurrent, g = i / kRecurrent % 4, u = i / kRecurrent / 4;
                s.weight_hh[u][k][g] = u < share.units() ? weight_hh(u, k, g) : T(0);
            }
        }
        for (int i = thread_again(); i < kUnits * kHeadPadded; i += kThreads) {
            const int u = i % kUnits, p = i / kUnits;
            const bool there = u < share.units() && p < kHead;
            s.weight_head[u][p] = there ? to_arith(a.weight_head[int64_t(p) * H + share.first_unit() + u]) : T(0);
        }
        for (int p = thread_again(); p < kHead; p += kThreads) s.bias_head[p] = to_arith(a.bias_head[p]);
        for (int i = thread_again(); i < 4 * kUnits * kExamples; i += kThreads) s.dgates[0][i] = 0;
        for (int i = thread_again(); i < (kHeadPadded - kHead) * kExamples; i += kThreads) s.dhead[kHead][i] = 0;
        for (int p = thread_again(); p < kSent; p += kThreads) s.own_dhead[p] = 0;
        for (int i = thread_again(); i < W * kHeads; i += kThreads) s.dreads[0][i] = 0;
        for (int h = thread_again(); h < kHeads; h += kThreads) s.mean_parts[h] = 0;
        const bool real = share.is_real();
        const int b = share.example();
        for (int k = thread_again(); k < kWords; k += kThreads)
            s.carried[k] = real && a.dreads1 ? to_arith(a.dreads1[int64_t(b) * kWords + k]) : T(0);
        rows.take_dmemory(real && a.dmemory1 ? a.dmemory1 + int64_t(b) * N * W : nullptr);
        rows.take_dweights(real && a.dread_weights1 ? a.dread_weights1 + int64_t(b) * R * N : nullptr);
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k) {
            gate[k] = previous_c[k] = doutput[k] = 0;
            if (!has_unit(k) || !GateLane::first() || GateLane::gate() != 0) continue;
            const int64_t at = unit_at(int64_t(lane_example()), k);
            dh(k) = lane_example() < a.batch && a.dh1 ? to_arith(a.dh1[at]) : T(0);
            dc(k) = lane_example() < a.batch && a.dc1 ? to_arith(a.dc1[at]) : T(0);
        }
    }
    // Of the steps in which no example of the cluster takes part.
    MANN_INLINE void pad() const {
        for (int t = last; t < a.steps; ++t) {
#pragma unroll
            for (int k = 0; k < kUnitsOfWarp; ++k)
                if (has_unit(k) && GateLane::first() && lane_example() < a.batch)
                    a.dgates[row(t, lane_example()) * 4 * H + GateLane::gate() * H + share.first_unit() + unit(k)] =
                        to_storage<S>(T(0));
            for (int p = thread_again(); p < kHead && share.is_real() && share.part() == 0; p += kThreads)
                a.dhead[row(t, share.example()) * kHead + p] = to_storage<S>(T(0));
        }
    }

    MANN_INLINE void recompute_cells(int start, int stop) const {
        if (lane_example() >= a.batch || GateLane::gate() != 0 || !GateLane::first()) return;
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k) {
            if (!has_unit(k)) continue;
            T c = start == 0 ? to_arith(a.c[unit_at(int64_t(lane_example()), k)])
                             : a.saved_c[unit_at(row(start / a.checkpoint_every - 1, lane_example()), k)];
            const int end = min(stop, length);
            constexpr int kAhead = 8;
            for (int t = start; t < end; t += kAhead) {
                T in[kAhead], forget[kAhead], cell[kAhead];
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    const T *gates =
                        a.saved_gates + row(min(t + i, end - 1), lane_example()) * 4 * H + share.first_unit() + unit(k);
                    in[i] = gates[0], forget[i] = gates[H], cell[i] = gates[2 * H];
                }
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    if (t + i < end) a.cells[unit_at(row(t + i - start, lane_example()), k)] = c;
                    c = forget[i] * c + in[i] * cell[i];
                }
            }
        }
    }
    // What stands in shared memory before a step is recomputed or undone: its head before the activations, its slots.
    MANN_INLINE void fetch_head(int t) {
        const int64_t at = row(t, share.example());
        for (int p = thread_again(); p < kHead; p += kThreads) s.raw_head[p] = a.heads[at * kHead + p] + s.bias_head[p];
        for (int h = thread_again(); h < R; h += kThreads) // whoever calls, no slot is outside memory
            s.step.slots[h] = max(0, min(a.saved_least_used[at * R + h], N - 1));
    }
    MANN_INLINE void make_step() {
        make_head(s.step, [&](int p) { return s.raw_head[p]; });
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
        for (int t = start; t < end; ++t) {
            const int j = t - start;
            const int64_t record = row(j, share.example());
            fetch_head(t);
            __syncthreads();
            make_step();
            __syncthreads();
            rows.give_overwritten(s.step, a.overwritten + record * kWords);
            rows.write_and_match(s.step, T(a.eps), s.sums.tops[0]);
            finish_recomputed(rows, s.sums, share.owned() * kParts, exchanges);
            rows.give_record(a.weights + record * N * kHeads);
            if ((j + 1) % kRestartEvery == 0)
                rows.give_memory(a.restarts + row(j / kRestartEvery, share.example()) * N * W);
        }
        if (owned_length <= stop && a.dread_weights1) { // the means of the step that is undone first
            if (warp_of_block() < kRowWarps) rows.sum_means(s.sums.sums[0]);
            exchange_sums(s.sums, share.owned() * kParts, share.part(), exchanges, false);
            if (int(threadIdx.x) < R) s.mean_parts[threadIdx.x] = s.sums.total[threadIdx.x];
        }
        __syncthreads();
    }

    // What undoing step t needs, before it is needed.
    MANN_INLINE void fetch_units(int t, int start) {
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k) {
            if (!has_unit(k) || t >= length) continue;
            const int64_t at = row(t, lane_example());
            gate[k] = a.saved_gates[at * 4 * H + GateLane::gate() * H + share.first_unit() + unit(k)];
            previous_c[k] = a.cells[unit_at(row(t - start, lane_example()), k)];
            doutput[k] = to_arith(a.doutput[at * kRecurrent + share.first_unit() + unit(k)]);
        }
    }
    MANN_INLINE void fetch(int t, int start) {
        if (t >= owned_length) return;
        const int j = t - start, b = share.example();
        fetch_head(t);
        for (int k = thread_again(); k < kWords; k += kThreads) {
            s.doutput[k] = to_arith(a.doutput[row(t, b) * kRecurrent + H + k]);
            s.output[k] = to_arith(a.output[row(t, b) * kRecurrent + H + k]);
            s.overwritten[k] = a.overwritten[row(j, b) * kWords + k]; // of slots of the part; no other is looked at
        }
        if (j > 0) rows.take_record(a.weights + row(j - 1, b) * N * kHeads);
        else if (start == 0) rows.take_next(a.read_weights + int64_t(b) * R * N);
        else rows.take_next(a.saved_read_weights + row(start / a.checkpoint_every - 1, b) * R * N);
        if ((j + 1) % kRestartEvery == 0) rows.take_memory(a.restarts + row(j / kRestartEvery, b) * N * W);
    }

    // The gradient of the reads of step t and the means, a head to a warp.
    MANN_INLINE void receive_dreads(int t) {
        if (undone > 0) mailbox_wait(&s.dread_box, undone - 1);
        if (undone > 0 && threadIdx.x == 0) mailbox_expect(&s.dread_box, kDreadBytes);
        if (t >= owned_length) return;
        for (int h = warp_of_block(); h < R; h += kWarps) {
            T mean = 0;
            for (int w = lane_of_warp(); w < W; w += kWarp) {
                const int k = h * W + w;
                T sum = t + 1 < owned_length ? T(0) : s.carried[k];
                if (t + 1 < owned_length) {
#pragma unroll
                    for (int from = 0; from < kBlocks; ++from) sum += s.dread_parts[from][k];
                }
                sum += s.doutput[k];
                s.dreads[w][h] = sum;
                mean += sum * s.output[k];
            }
            mean = sum_lanes(mean, 1, kWarp);
            if (lane_of_warp() == 0) s.means[h] = mean + s.mean_parts[h];
        }
        __syncthreads();
    }
    // The memory's step of the owned example, as far as the block's slots go; its share of the gradient of the head to
    // all blocks.
    MANN_INLINE void forget(int t) {
        if (t < owned_length) {
            if (warp_of_block() < kRowWarps) rows.undo(s.step, s.dreads, s.means, s.overwritten, T(a.eps), s.warps);
            __syncthreads();
            for (int p = thread_again(); p < kHead + R; p += kThreads)
                s.own_dhead[p] = head_gradient(s.warps, s.step, p);
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
        for (int i = thread_again(); i < kHead * kExamples; i += kThreads) {
            const int p = i % kHead, e = i / kHead;
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
        if (warp_of_block() >= kUnitWarps) return;
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k) {
            if (!has_unit(k) || t + 1 >= length) continue;
            T sum = 0;
#pragma unroll
            for (int from = 0; from < kBlocks; ++from) sum += s.dh_parts[buffer][from][unit(k)][GateLane::example()];
            if (GateLane::first() && GateLane::gate() == 0) dh(k) = sum;
        }
    }
    MANN_INLINE void lstm(int t) {
        if (warp_of_block() >= kUnitWarps) return;
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k) {
            T sums[kExamples] = {};
            for (int p = lane_of_warp(); p < kHeadPadded; p += kWarp) {
                const T weight = s.weight_head[least(unit(k), kUnits - 1)][p];
                const Each each = Each::load(s.dhead[p]);
#pragma unroll
                for (int e = 0; e < kExamples; ++e) sums[e] += weight * each.at[e];
            }
            scatter_sums(sums, 1);
            const T through_head = __shfl_sync(kWholeWarp, sums[0], GateLane::example() * (kWarp / kExamples));
            T gates[4];
#pragma unroll
            for (int g = 0; g < 4; ++g)
                gates[g] = __shfl_sync(kWholeWarp, gate[k], GateLane::of(g, GateLane::example()));
            T grad = 0, dc_before = 0;
            if (t < length && has_unit(k)) {
                const T c = gates[1] * previous_c[k] + gates[0] * gates[2];
                const auto cell = lstm_cell_backward(gates[0], gates[1], gates[2], gates[3], previous_c[k],
                                                     hyperbolic_tangent(c), dh(k) + doutput[k] + through_head, dc(k));
                const int g = GateLane::gate();
                grad = g == 0 ? cell.gate_in : g == 1 ? cell.gate_forget : g == 2 ? cell.cell : cell.gate_out;
                dc_before = cell.c;
            }
            __syncwarp(); // all have read dc
            if (t < length && has_unit(k) && GateLane::first() && GateLane::gate() == 0) dc(k) = dc_before;
            if (!has_unit(k) || !GateLane::first()) continue;
            s.dgates[unit(k) * 4 + GateLane::gate()][GateLane::example()] = rounded_to<S>(grad);
            gate[k] = grad; // for store_gates
        }
    }
    MANN_INLINE void store_gates(int t) const {
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k)
            if (has_unit(k) && GateLane::first() && lane_example() < a.batch)
                a.dgates[row(t, lane_example()) * 4 * H + GateLane::gate() * H + share.first_unit() + unit(k)] =
                    to_storage<S>(gate[k]);
    }
    // The part of the gradient of (h, reads) that goes through the block's gates, to whom it belongs.
    MANN_INLINE void send_parts() {
#pragma unroll
        for (int n = 0; n < kColumnsOfThread; ++n) {
            const int k = int(threadIdx.x) + n * kThreads;
            if (k >= kRecurrent) continue;
            Each sum{};
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                Four<T> weights;
                if constexpr (MANN_HELD) {
#pragma unroll
                    for (int g = 0; g < 4; ++g) weights[g] = held[n][u][g];
                } else {
                    weights = *reinterpret_cast<const Four<T> *>(s.weight_hh[u][k]);
                }
#pragma unroll
                for (int g = 0; g < 4; ++g) {
                    const Each each = Each::load(s.dgates[4 * u + g]);
#pragma unroll
                    for (int e = 0; e < kExamples; ++e) sum.at[e] += weights[g] * each.at[e];
                }
            }
            if (k < H) {
                sum.send_to(s.dh_parts[undone & 1][share.rank][k % kUnits], k / kUnits, &s.dh_box[undone & 1]);
            } else {
#pragma unroll
                for (int e = 0; e < kExamples; ++e)
#pragma unroll
                    for (int part = 0; part < kParts; ++part)
                        send(&s.dread_parts[share.rank][k - H], e * kParts + part, &s.dread_box, sum.at[e]);
            }
        }
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
        if (t > start) fetch_units(t - 1, start);
        if (share.owns() && t > start && t - 1 < owned_length) make_step();
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
            fetch_units(stop - 1, start);
            if (share.owns()) {
                fetch(stop - 1, start);
                __syncthreads();
                if (stop - 1 < owned_length) make_step();
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
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k) {
            if (!has_unit(k) || !GateLane::first() || GateLane::gate() != 0 || lane_example() >= a.batch) continue;
            const int64_t at = unit_at(int64_t(lane_example()), k);
            a.dh[at] = to_storage<S>(dh(k)), a.dc[at] = to_storage<S>(dc(k));
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
