// mann_sequence, forward, on clusters: two exchanges a step, no barrier of the cluster between them.
//
// A block makes the gates and h of its units for all examples. It sends h to all blocks, and its units' part of every
// example's head to the blocks that have the example's memory. These sum the parts, write, match, and send their share
// of the reads to all blocks. While a block waits for heads, it chooses the slots of the step; while it waits for
// reads, it makes h's part of the next gates.
//
// Why nothing is overwritten too early: reads of step t are sent by a block that has the head of step t from every
// block, and each of these has used the reads of step t - 1 by then. A head of step t + 1 is sent after the reads of
// step t came from everyone who took the head of step t. But h of step t may still be in use when h of step t + 1
// arrives: it has two buffers, and as many mailboxes.
#include "controller.h"
#include "mann_sequence.h"
#include "parts.h"

namespace mann::cuda {

constexpr int kUnitWarps = least(kUnits, kWarps), kUnitsOfWarp = (kUnits + kUnitWarps - 1) / kUnitWarps;
constexpr int kLanesOfH = (H + kWarp - 1) / kWarp, kLanesOfReads = (kWords + kWarp - 1) / kWarp;

struct ForwardShared {
    // By messages.
    alignas(16) T h[2][H][kExamples];
    alignas(16) T head_parts[kBlocks][kHeadPadded];
    alignas(16) T read_parts[kOwners][kPart];
    Candidate candidates[kParts][R];
    Mailbox h_box[2], head_box, reads_box, candidate_box;
    // Of the block.
    alignas(16) T weight_hh[MANN_HELD ? 1 : kUnits][MANN_HELD ? 1 : kRecurrent][4];
    alignas(16) T weight_head[kUnits][kHeadPadded];
    alignas(16) T reads[kWords][kExamples];
    alignas(16) T own_h[kUnits][kExamples];
    alignas(16) T own_part[kPart]; // of read_parts
    alignas(16) T bias_head[kHeadPadded];
    alignas(16) Step step;
    WarpSums warps;
    Order usage[kSlots];
    Candidate chosen[R];
};
static_assert(sizeof(Candidate) == sizeof(Four<T>));

constexpr int kHBytes = H * kExamples * sizeof(T), kHeadBytes = kBlocks * kHeadPadded * sizeof(T);
constexpr int kReadsBytes = kOwners * kPart * sizeof(T), kCandidateBytes = kParts * R * sizeof(Candidate);

struct Forward {
    const MannForward<S> &a;
    ForwardShared &s;
    const Share share;
    Rows rows;
    T c[kUnitsOfWarp], h[kUnitsOfWarp], gates_x[kUnitsOfWarp]; // of the lane's example (and gate)
    T sums[kUnitsOfWarp][4 * kExamples];                       // of the gates of the next step so far
    T held[kUnitsOfWarp][MANN_HELD ? kLanesOfH + kLanesOfReads : 1][4];
    int length, owned_length; // real steps of the lane's example and of the block's

    MANN_INLINE Forward(const MannForward<S> &args, ForwardShared &shared)
        : a(args), s(shared), share(args.batch), rows{} {
        rows.part = share.part();
        length = share.steps_of(a.lengths, GateLane::example(), a.steps);
        owned_length = share.owns() ? share.steps_of(a.lengths, share.owned(), a.steps) : 0;
    }
    MANN_INLINE int unit(int k) const { return warp_of_block() + k * kUnitWarps; }
    MANN_INLINE bool has_unit(int k) const { return warp_of_block() < kUnitWarps && unit(k) < share.units(); }
    MANN_INLINE int lane_example() const { return share.first_example + GateLane::example(); }
    MANN_INLINE int64_t row(int t, int b) const { return int64_t(t) * a.batch + b; }

    // weight_hh [4H, H + words] of a unit of the block.
    MANN_INLINE T weight_hh(int unit, int k, int gate) const {
        return to_arith(a.weight_hh[(int64_t(gate) * H + share.first_unit() + unit) * kRecurrent + k]);
    }
    MANN_INLINE void take_weights() {
        if constexpr (MANN_HELD) {
#pragma unroll
            for (int k = 0; k < kUnitsOfWarp; ++k)
#pragma unroll
                for (int i = 0; i < kLanesOfH + kLanesOfReads; ++i)
#pragma unroll
                    for (int g = 0; g < 4; ++g) {
                        const int at =
                            i < kLanesOfH ? i * kWarp + lane_of_warp() : H + (i - kLanesOfH) * kWarp + lane_of_warp();
                        const bool there = has_unit(k) && at < (i < kLanesOfH ? H : kRecurrent);
                        held[k][i][g] = there ? weight_hh(unit(k), at, g) : T(0);
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
        for (int p = thread_again(); p < kHeadPadded; p += kThreads)
            s.bias_head[p] = p < kHead ? to_arith(a.bias_head[p]) : T(0);
    }
    MANN_INLINE void begin() {
        if (threadIdx.x == 0) {
            mailbox_open(&s.h_box[0], kHBytes);
            mailbox_open(&s.h_box[1], kHBytes);
            mailbox_open(&s.reads_box, kReadsBytes);
            if (share.owns()) {
                mailbox_open(&s.head_box, kHeadBytes);
                mailbox_open(&s.candidate_box, kCandidateBytes);
            }
        }
        take_weights();
        for (int i = thread_again(); i < H * kExamples; i += kThreads) {
            const int b = share.first_example + i % kExamples;
            s.h[1][i / kExamples][i % kExamples] = b < a.batch ? to_arith(a.h[int64_t(b) * H + i / kExamples]) : T(0);
        }
        for (int i = thread_again(); i < kWords * kExamples; i += kThreads) {
            const int b = share.first_example + i % kExamples;
            s.reads[i / kExamples][i % kExamples] =
                b < a.batch ? to_arith(a.reads[int64_t(b) * kWords + i / kExamples]) : T(0);
        }
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k) {
            const bool there = has_unit(k) && lane_example() < a.batch;
            const int64_t at = there ? int64_t(lane_example()) * H + share.first_unit() + unit(k) : 0;
            h[k] = there ? to_arith(a.h[at]) : T(0), c[k] = there ? to_arith(a.c[at]) : T(0), gates_x[k] = 0;
        }
        const bool real = share.is_real();
        const int b = share.example();
        rows.take_memory(real ? a.memory + int64_t(b) * N * W : nullptr);
        rows.take_weights(real ? a.read_weights + int64_t(b) * R * N : nullptr);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            rows.usage[i] = real && rows.exists(i) ? to_arith(a.usage[int64_t(b) * N + rows.slot(i)]) : T(0);
        // What is sent again as long as the example has no real step.
        for (int p = thread_again(); p < kPart; p += kThreads) {
            const bool first = real && share.part() == 0;
            s.own_part[p] = p < kWords ? (first ? to_arith(a.reads[int64_t(b) * kWords + p]) : T(0))
                                       : T(p < kTopAt && share.part() == 0);
        }
        if (share.owns()) rows.give_usage(s.usage);
    }

    // Of step t, long before they are used.
    MANN_INLINE void fetch(int t) {
#pragma unroll
        for (int k = 0; k < kUnitsOfWarp; ++k)
            if (has_unit(k) && t < length)
                gates_x[k] = to_arith(
                    a.gates_x[row(t, lane_example()) * 4 * H + GateLane::gate() * H + share.first_unit() + unit(k)]);
    }
    // sums += weight_hh's columns from `start` on times x [count, kExamples].
    template <int count, int start, int held_at> MANN_INLINE void multiply(const T (*x)[kExamples]) {
        constexpr int iterations = (count + kWarp - 1) / kWarp;
#pragma unroll
        for (int i = 0; i < iterations; ++i) {
            const int k = i * kWarp + lane_of_warp();
            if (count % kWarp != 0 && i == iterations - 1 && k >= count) continue;
            const Each each = Each::load(x[k]);
#pragma unroll
            for (int n = 0; n < kUnitsOfWarp; ++n) {
                T weights[4];
                if constexpr (MANN_HELD) {
#pragma unroll
                    for (int g = 0; g < 4; ++g) weights[g] = held[n][held_at + i][g];
                } else {
                    const Four<T> four =
                        *reinterpret_cast<const Four<T> *>(s.weight_hh[least(unit(n), kUnits - 1)][start + k]);
#pragma unroll
                    for (int g = 0; g < 4; ++g) weights[g] = four[g];
                }
#pragma unroll
                for (int g = 0; g < 4; ++g)
#pragma unroll
                    for (int e = 0; e < kExamples; ++e) sums[n][g * kExamples + e] += weights[g] * each.at[e];
            }
        }
    }
    MANN_INLINE void gates_of_h(int t) { // the h before step t
#pragma unroll
        for (int n = 0; n < kUnitsOfWarp; ++n)
#pragma unroll
            for (int i = 0; i < 4 * kExamples; ++i) sums[n][i] = 0;
        if (warp_of_block() < kUnitWarps) multiply<H, 0, 0>(s.h[(t + 1) & 1]);
    }

    // Eq. 9 to 16 for the units of the warp; h goes to every block.
    MANN_INLINE void lstm(int t) {
        if (warp_of_block() >= kUnitWarps) return;
        multiply<kWords, H, kLanesOfH>(s.reads);
#pragma unroll
        for (int n = 0; n < kUnitsOfWarp; ++n) {
            scatter_sums(sums[n], 1);
            T gate = sums[n][0] + gates_x[n];
            gate = GateLane::gate() == 2 ? hyperbolic_tangent(gate) : sigmoid(gate);
            T gates[4];
#pragma unroll
            for (int g = 0; g < 4; ++g) gates[g] = __shfl_sync(kWholeWarp, gate, GateLane::of(g, GateLane::example()));
            if (t < length) {
                c[n] = gates[1] * c[n] + gates[0] * gates[2];
                h[n] = rounded_to<S>(gates[3] * hyperbolic_tangent(c[n]));
            }
            Each all;
#pragma unroll
            for (int e = 0; e < kExamples; ++e) all.at[e] = __shfl_sync(kWholeWarp, h[n], GateLane::of(0, e));
            if (has_unit(n)) {
                if (lane_of_warp() < kBlocks)
                    all.send_to(s.h[t & 1][share.first_unit() + unit(n)], lane_of_warp(), &s.h_box[t & 1]);
                if (lane_of_warp() == 0) {
#pragma unroll
                    for (int e = 0; e < kExamples; ++e) s.own_h[unit(n)][e] = all.at[e];
                }
            }
            sums[n][0] = gate; // for store_gates
        }
    }
    MANN_INLINE void store_gates(int t) const {
        if (!GateLane::first() || lane_example() >= a.batch) return;
#pragma unroll
        for (int n = 0; n < kUnitsOfWarp; ++n) {
            if (!has_unit(n)) continue;
            const int64_t at = row(t, lane_example());
            const int u = share.first_unit() + unit(n);
            if (a.saved_gates && t < length) a.saved_gates[at * 4 * H + GateLane::gate() * H + u] = sums[n][0];
            if (GateLane::gate() == 0) a.output[at * kRecurrent + u] = to_storage<S>(t < length ? h[n] : T(0));
        }
    }
    // The units' part of every head, to the blocks that want it.
    MANN_INLINE void send_heads() {
        for (int i = thread_again(); i < kHeadPadded / 4 * kExamples; i += kThreads) {
            const int p = i % (kHeadPadded / 4), e = i / (kHeadPadded / 4);
            Four<T> sum{};
            for (int u = 0; u < share.units(); ++u) {
                const Four<T> weights = reinterpret_cast<const Four<T> *>(s.weight_head[u])[p];
                const T x = s.own_h[u][e];
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[j] += x * weights[j];
            }
#pragma unroll
            for (int k = 0; k < kParts; ++k) send(&s.head_parts[share.rank][4 * p], e * kParts + k, &s.head_box, sum);
        }
    }

    // The slots of step t, of what was known after the step before: while the heads are on their way.
    MANN_INLINE void choose() {
        rows.choose(s.usage, s.chosen);
        __syncthreads();
        if (kParts == 1) return merge_candidates(s.chosen, s.step);
        for (int i = thread_again(); i < kParts * R; i += kThreads) {
            const Candidate &mine = s.chosen[i % R];
            send(&s.candidates[share.part()][i % R].usage, share.owned() * kParts + i / R, &s.candidate_box,
                 Four<T>{{mine.usage, mine.slot, T(0), T(0)}});
        }
    }
    // The memory's step of the owned example, as far as the block's slots go; its share of the reads to all blocks.
    MANN_INLINE void remember(int t) {
        mailbox_wait(&s.head_box, t);
        if (threadIdx.x == 0 && t + 1 < a.steps) mailbox_expect(&s.head_box, kHeadBytes);
        if (t < owned_length) {
            if (kParts > 1) {
                mailbox_wait(&s.candidate_box, t);
                if (threadIdx.x == 0 && t + 1 < owned_length) mailbox_expect(&s.candidate_box, kCandidateBytes);
                merge_candidates(s.candidates[0], s.step);
            }
            make_head(s.step, [&](int p) {
                T sum = s.bias_head[p];
#pragma unroll
                for (int from = 0; from < kBlocks; ++from) sum += s.head_parts[from][p];
                return sum;
            });
            __syncthreads();
            rows.write_and_match(s.step, T(a.eps), s.warps.tops[0]);
            if (warp_of_block() < kRowWarps) {
                rows.sum_exps(s.warps.sums[0]);
                rows.sum_rows(s.warps.reads[0]);
            }
            __syncthreads();
            sum_warps(s.warps, s.own_part);
        }
        __syncthreads();
        for (int i = thread_again(); i < kPart / 4 * kBlocks; i += kThreads) {
            const int p = i % (kPart / 4), to = i / (kPart / 4);
            send(&s.read_parts[share.rank][4 * p], to, &s.reads_box, reinterpret_cast<const Four<T> *>(s.own_part)[p]);
        }
    }
    // The reads of step t from their parts, for every example; read weights and usage of the owned one.
    MANN_INLINE void receive_reads(int t) {
        mailbox_wait(&s.reads_box, t);
        if (threadIdx.x == 0 && t + 1 < a.steps) mailbox_expect(&s.reads_box, kReadsBytes);
        for (int i = thread_again(); i < kWords * kExamples; i += kThreads) {
            const int e = i % kExamples, k = i / kExamples;
            s.reads[k][e] = rounded_to<S>(read_of(&s.read_parts[e * kParts], k));
        }
        if (share.owns() && t < owned_length) {
            finish_step(rows, &s.read_parts[share.owned() * kParts], s.warps, T(a.decay));
            rows.give_usage(s.usage);
        }
    }
    MANN_INLINE void store_reads(int t) const {
        if (!share.is_real() || share.part() != 0) return;
        for (int k = thread_again(); k < kWords; k += kThreads) {
            const T x = t < owned_length ? s.reads[k][share.owned()] : T(0);
            a.output[row(t, share.example()) * kRecurrent + H + k] = to_storage<S>(x);
        }
    }
    MANN_INLINE void store_slots(int t) const {
        if (!a.saved_least_used || !share.is_real() || share.part() != 0) return;
        for (int h = thread_again(); h < R; h += kThreads)
            a.saved_least_used[row(t, share.example()) * R + h] = t < owned_length ? s.step.slots[h] : 0;
    }
    MANN_INLINE void copy_state(int copy) {
#pragma unroll
        for (int n = 0; n < kUnitsOfWarp; ++n)
            if (has_unit(n) && GateLane::first() && GateLane::gate() == 0 && lane_example() < a.batch)
                a.saved_c[row(copy, lane_example()) * H + share.first_unit() + unit(n)] = c[n];
        if (!share.is_real()) return;
        rows.give_memory(a.saved_memory + row(copy, share.example()) * N * W);
        rows.give_weights(a.saved_read_weights + row(copy, share.example()) * R * N);
    }

    MANN_INLINE void run() {
        begin();
        fetch(0);
        cluster_barrier(); // every block is there to be written to
        gates_of_h(0);
        for (int t = 0; t < a.steps; ++t) {
            if (t > 0) receive_reads(t - 1);
            if (a.saved_c && t > 0 && t % a.checkpoint_every == 0) copy_state(t / a.checkpoint_every - 1);
            __syncthreads();
            lstm(t);
            __syncthreads();
            send_heads();
            if (t > 0) store_reads(t - 1);
            store_gates(t);
            fetch(t + 1);
            if (share.owns()) {
                if (t < owned_length) choose();
                remember(t);
                store_slots(t);
            }
            mailbox_wait(&s.h_box[t & 1], t / 2);
            if (threadIdx.x == 0 && t + 2 < a.steps) mailbox_expect(&s.h_box[t & 1], kHBytes);
            if (t + 1 < a.steps) gates_of_h(t + 1);
        }
        if (a.steps > 0) receive_reads(a.steps - 1);
        __syncthreads();
        if (a.steps > 0) store_reads(a.steps - 1);
        finish();
        cluster_barrier(); // nobody writes to a block that has ended
    }
    MANN_INLINE void finish() {
#pragma unroll
        for (int n = 0; n < kUnitsOfWarp; ++n) {
            if (!has_unit(n) || !GateLane::first() || GateLane::gate() != 0 || lane_example() >= a.batch) continue;
            const int64_t at = int64_t(lane_example()) * H + share.first_unit() + unit(n);
            a.h1[at] = to_storage<S>(h[n]), a.c1[at] = to_storage<S>(c[n]);
        }
        if (!share.is_real()) return;
        const int b = share.example();
        for (int k = thread_again(); k < kWords && share.part() == 0; k += kThreads)
            a.reads1[int64_t(b) * kWords + k] = to_storage<S>(s.reads[k][share.owned()]);
        rows.give_memory(a.memory1 + int64_t(b) * N * W);
        rows.give_weights(a.read_weights1 + int64_t(b) * R * N);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (rows.exists(i) && rows.lane() == 0)
                a.usage1[int64_t(b) * N + rows.slot(i)] = to_storage<S>(rows.usage[i]);
    }
};

MANN_KERNEL(mann_sequence_forward, MANN_BOUNDS(kThreads, 1), MannForward<S>) {
    MANN_DYNAMIC_SHARED(memory);
    static_assert(sizeof(ForwardShared) <= MANN_SHARED_BYTES);
    Forward(args, *reinterpret_cast<ForwardShared *>(memory)).run();
}

} // namespace mann::cuda
