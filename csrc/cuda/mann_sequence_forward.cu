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
#include "recurrent_forward.h"

namespace mann::cuda {

// The units' part of the heads: four numbers of an example to a thread, or the units split over several lanes.
constexpr int kHeadItems = kHeadPadded / 4 * kExamples;
constexpr int kHeadLanes = kHeadItems * 8 <= kThreads   ? 8
                           : kHeadItems * 4 <= kThreads ? 4
                           : kHeadItems * 2 <= kThreads ? 2
                                                        : 1;

struct ForwardShared {
    // By messages.
    Hidden h[2];
    alignas(16) T head_parts[kBlocks][kHeadPadded];
    alignas(16) T read_parts[kOwners][kPart];
    Candidate candidates[kParts][R];
    Mailbox h_box[2], head_box, reads_box, candidate_box;
    // Of the block.
    RecurrentWeights weight_hh;
    alignas(16) T weight_head[kUnits][kHeadPadded];
    Reads reads;
    alignas(16) T own_h[kUnitsPadded][kExamples];
    alignas(16) T own_part[kPart]; // of read_parts
    alignas(16) T bias_head[kHeadPadded];
    alignas(16) Step step;
    WarpSums warps;
    alignas(4 * sizeof(Order)) Order usage[kOrders];
};

constexpr int kHBytes = kHidden * kExamples * sizeof(T), kHeadBytes = kBlocks * kHeadPadded * sizeof(T);
constexpr int kReadsBytes = kOwners * kPart * sizeof(T), kCandidateBytes = kParts * R * sizeof(Candidate);

struct Forward {
    const MannForward<S> &a;
    ForwardShared &s;
    const Share share;
    Rows rows;
    // Of the lane's cell.
    const bool exists;         // whether there is such a unit
    const int example, length; // in the batch; its real steps
    T c = 0, h = 0;
    T gates_x[Cell::kGates] = {}; // of the next step
    T own_gates[Cell::kGates];    // of the step
    Gates gates;                  // of the next step so far
    const int owned_length;       // real steps of the block's example

    MANN_INLINE Forward(const MannForward<S> &args, ForwardShared &shared)
        : a(args), s(shared), share(args.batch), rows{}, exists(Cell::unit() < share.units() && Cell::exists()),
          example(share.first_example + Cell::example()),
          length(share.steps_of(args.lengths, Cell::example(), args.steps)),
          gates(args.weight_hh, share, shared.weight_hh),
          owned_length(share.owns() ? share.steps_of(args.lengths, share.owned(), args.steps) : 0) {
        rows.part = share.part();
    }
    MANN_INLINE bool is_real() const { return exists && example < a.batch; }
    MANN_INLINE int unit() const { return share.first_unit() + Cell::unit(); } // of all
    MANN_INLINE int64_t row(int t, int b) const { return int64_t(t) * a.batch + b; }

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
        gates.take_weights();
        copy_head(s.weight_head, a.weight_head, share);
        copy_numbers<kHeadPadded>([&](int p) { return &s.bias_head[p]; },
                                  [&](int p) { return p < kHead ? a.bias_head + p : nullptr; });
        open_step(s.step);
        rows.open_usage(s.usage);
        s.h[0].clear(), s.h[1].clear(), s.reads.clear();
        copy_numbers<kHidden * kExamples>([&](int i) { return &s.h[1].at(i / kExamples, i % kExamples); },
                                          [&](int i) {
                                              const int b = share.first_example + i % kExamples,
                                                        other = i / kExamples % kUnitsPadded;
                                              const int u = i / kExamples / kUnitsPadded * kUnits + other;
                                              return b < a.batch && other < kUnits && u < H ? a.h + int64_t(b) * H + u
                                                                                            : nullptr;
                                          });
        copy_numbers<kWords * kExamples>([&](int i) { return &s.reads.at(i / kExamples, i % kExamples); },
                                         [&](int i) {
                                             const int b = share.first_example + i % kExamples;
                                             return b < a.batch ? a.reads + int64_t(b) * kWords + i / kExamples
                                                                : nullptr;
                                         });
        if (is_real()) {
            const int64_t at = int64_t(example) * H + unit();
            h = to_arith(a.h[at]), c = to_arith(a.c[at]);
        }
        const bool real = share.is_real();
        const int b = share.example();
        rows.take_memory(real ? a.memory + int64_t(b) * N * W : nullptr);
        rows.take_weights(real ? a.read_weights + int64_t(b) * R * N : nullptr);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            rows.usage[i] = to_arith(load_if(real && rows.exists(i), a.usage + int64_t(b) * N + rows.slot(i)));
        // What is sent again as long as the example has no real step.
        const bool first = real && share.part() == 0;
        copy_numbers<kWords>([&](int p) { return &s.own_part[p]; },
                             [&](int p) { return first ? a.reads + int64_t(b) * kWords + p : nullptr; });
        for (int p = kWords + thread_again(); p < kPart; p += kThreads)
            s.own_part[p] = T(p < kTopAt && share.part() == 0);
        copy_async_commit();
        copy_async_wait<0>(); // seen by all after the cluster's barrier
        if (share.owns()) rows.give_usage(s.usage);
    }

    MANN_INLINE int64_t gates_at(int t) const { return (row(t, example) * 4 + Cell::gate(0)) * H + unit(); }
    // Of step t, long before they are used.
    MANN_INLINE void fetch(int t) {
        if (!exists || t >= length) return;
        const S *from = a.gates_x + gates_at(t);
#pragma unroll
        for (int i = 0; i < Cell::kGates; ++i) gates_x[i] = to_arith(from[i * H]);
    }
    MANN_INLINE void gates_of_h(int t) { // the h before step t
        gates.begin();
        if (warp_of_block() < kUnitWarps) gates.multiply_h(s.h[(t + 1) & 1]);
    }

    // Eq. 9 to 16 for the units of the warp; h goes to every block.
    MANN_INLINE void lstm(int t) {
        if (warp_of_block() >= kUnitWarps) return;
        gates.multiply_reads(s.reads);
        T all[4];
        gates.finish(own_gates, all, [&](int i, T sum) {
            const T x = sum + gates_x[i];
            return Cell::gate(i) == 2 ? hyperbolic_tangent(x) : sigmoid(x);
        });
        if (exists && t < length) {
            c = all[1] * c + all[0] * all[2];
            h = rounded_to<S>(all[3] * hyperbolic_tangent(c));
        }
        if (Cell::first() && Cell::exists()) s.own_h[Cell::unit()][Cell::example()] = h;
        send_h(t);
    }
    // The h of the warp's cells to every block: up to four that stand together to a lane, as far as there are lanes.
    MANN_INLINE void send_h(int t) {
        constexpr int kSize = least(kCells, 4), kPieces = kCells / kSize, kMessages = kBlocks * kPieces;
        const int first_unit = share.rank * kUnitsPadded + warp_of_block() * kUnitsOfWarp;
#pragma unroll
        for (int first = 0; first < kMessages; first += kWarp) {
            const int message = first + lane_of_warp(), at = message / kBlocks % kPieces * kSize;
            T x[kSize];
#pragma unroll
            for (int j = 0; j < kSize; ++j) {
                const int unit = MANN_TENSOR ? (at + j) % kUnitsOfWarp : (at + j) / kExamples;
                const int e = MANN_TENSOR ? (at + j) / kUnitsOfWarp : (at + j) % kExamples;
                x[j] = __shfl_sync(kWholeWarp, h, Cell::lane_of(unit, e));
            }
            T *target = MANN_TENSOR ? &s.h[t & 1].at(first_unit, at / kUnitsOfWarp)
                                    : &s.h[t & 1].at(first_unit + at / kExamples, at % kExamples);
            if (message < kMessages) send_several<kSize>(target, message % kBlocks, &s.h_box[t & 1], x);
        }
    }
    MANN_INLINE void store_gates(int t) const {
        if (!is_real()) return;
        if (a.saved_gates && t < length && Cell::first_of_gates()) {
            T *to = a.saved_gates + gates_at(t);
#pragma unroll
            for (int i = 0; i < Cell::kGates; ++i) to[i * H] = own_gates[i];
        }
        if (Cell::first()) a.output[row(t, example) * kRecurrent + unit()] = to_storage<S>(t < length ? h : T(0));
    }
    // The units' part of every head, to the blocks that want it.
    MANN_INLINE void send_heads() {
        constexpr int kLanesInAll = kHeadItems * kHeadLanes;
        for (int i = thread_again(); i < round_up(kLanesInAll, kWarp); i += kThreads) {
            const int item = least(i / kHeadLanes, kHeadItems - 1), from = i % kHeadLanes;
            const int p = item % (kHeadPadded / 4), e = item / (kHeadPadded / 4);
            Four<T> sum{};
#pragma unroll
            for (int n = 0; n < (kUnits + kHeadLanes - 1) / kHeadLanes; ++n) {
                const int u = n * kHeadLanes + from;
                if (kUnits % kHeadLanes != 0 && u >= kUnits) break;
                const Four<T> weights = reinterpret_cast<const Four<T> *>(s.weight_head[u])[p];
                const T x = s.own_h[u][e];
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[j] += x * weights[j];
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[j] = sum_lanes(sum[j], 1, kHeadLanes);
            if (from != 0 || i >= kLanesInAll) continue;
#pragma unroll
            for (int k = 0; k < kParts; ++k) send(&s.head_parts[share.rank][4 * p], e * kParts + k, &s.head_box, sum);
        }
    }

    // The slots of the step to come, of what is known before it: while the heads are on their way.
    MANN_INLINE void choose() {
        rows.choose(s.usage, [&](int h, Order order, int slot) {
            if constexpr (kParts == 1) {
                s.step.slots[h] = slot;
            } else {
#pragma unroll
                for (int to = 0; to < kParts; ++to)
                    send(&s.candidates[share.part()][h].at[0], share.owned() * kParts + to, &s.candidate_box,
                         Candidate{{order, Order(slot)}});
            }
        });
    }
    // The memory's step of the owned example, as far as the block's slots go; its share of the reads to all blocks.
    MANN_INLINE void remember(int t) {
        if (kParts > 1 && t < owned_length) {
            mailbox_wait(&s.candidate_box, t);
            if (threadIdx.x == 0 && t + 1 < owned_length) mailbox_expect(&s.candidate_box, kCandidateBytes);
            merge_candidates(s.candidates, s.step);
        }
        mailbox_wait(&s.head_box, t);
        if (threadIdx.x == 0 && t + 1 < a.steps) mailbox_expect(&s.head_box, kHeadBytes);
        if (t < owned_length) {
            make_head(s.step, [&](int p, int) {
                T sum = s.bias_head[p];
#pragma unroll
                for (int from = 0; from < kBlocks; ++from) sum += s.head_parts[from][p];
                return sum;
            });
            __syncthreads();
            if (warp_of_block() < kRowWarps) {
                T *part = s.warps.of_warp();
                rows.write_and_match(s.step, T(a.eps), part + kTopAt);
                rows.sum_exps(part + kSumAt);
                rows.sum_rows(part);
            }
        }
        __syncthreads();
        for (int i = thread_again(); i < kPart / 4; i += kThreads) {
            Four<T> &part = reinterpret_cast<Four<T> *>(s.own_part)[i];
            if (t < owned_length) part = sum_warps(s.warps, i);
            const Four<T> sum = part;
#pragma unroll
            for (int to = 0; to < kBlocks; ++to) send(&s.read_parts[share.rank][4 * i], to, &s.reads_box, sum);
        }
    }
    // The reads of step t from their parts, for every example; read weights and usage of the owned one.
    MANN_INLINE void receive_reads(int t) {
        mailbox_wait(&s.reads_box, t);
        if (threadIdx.x == 0 && t + 1 < a.steps) mailbox_expect(&s.reads_box, kReadsBytes);
#pragma unroll
        for (int n = 0; n < share_of(kWords * kExamples); ++n) {
            const int i = thread_again() + n * kThreads, e = i % kExamples, k = i / kExamples;
            if (i >= kWords * kExamples) break;
            s.reads.at(k, e) = rounded_to<S>(read_of(&s.read_parts[e * kParts], k));
        }
        if (share.owns() && t < owned_length) {
            finish_step(rows, &s.read_parts[share.owned() * kParts], s.warps, T(a.decay));
            rows.give_usage(s.usage);
        }
    }
    MANN_INLINE void store_reads(int t) const {
        if (!share.is_real() || share.part() != 0) return;
        for (int k = thread_again(); k < kWords; k += kThreads) {
            const T x = t < owned_length ? s.reads.at(k, share.owned()) : T(0);
            a.output[row(t, share.example()) * kRecurrent + H + k] = to_storage<S>(x);
        }
    }
    MANN_INLINE void store_slots(int t) const {
        if (!a.saved_least_used || !share.is_real() || share.part() != 0) return;
        for (int h = thread_again(); h < R; h += kThreads)
            a.saved_least_used[row(t, share.example()) * R + h] = t < owned_length ? s.step.slots[h] : 0;
    }
    MANN_INLINE void copy_state(int copy) {
        if (is_real() && Cell::first()) a.saved_c[row(copy, example) * H + unit()] = c;
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
            fetch(t + 1);
            if (share.owns()) {
                if (t < owned_length) choose();
                if (t > 0) store_reads(t - 1);
                remember(t);
                store_slots(t);
            }
            store_gates(t);
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
        if (is_real() && Cell::first()) {
            const int64_t at = int64_t(example) * H + unit();
            a.h1[at] = to_storage<S>(h), a.c1[at] = to_storage<S>(c);
        }
        if (!share.is_real()) return;
        const int b = share.example();
        for (int k = thread_again(); k < kWords && share.part() == 0; k += kThreads)
            a.reads1[int64_t(b) * kWords + k] = to_storage<S>(s.reads.at(k, share.owned()));
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
