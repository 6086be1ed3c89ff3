// The LSTM of mann_sequence, spread over the blocks of a cluster: sizes, who has what, products.
//
// A cluster of kBlocks blocks takes kExamples examples through time. Each block has a share of the hidden units, whose
// rows of weight_hh (all four gates) and columns of weight_head stay in its shared memory; a warp makes the gates of
// kUnitsOfWarp units for all examples. The slots of example e stand in the blocks e * kParts and following, kParts of
// them.
#pragma once

#include "rows.h"

namespace mann::cuda {

constexpr int H = MANN_H, kBlocks = MANN_BLOCKS, kExamples = MANN_EXAMPLES;
constexpr int kUnits = (H + kBlocks - 1) / kBlocks; // of a block; the last blocks may have fewer
MANN_CONSTEXPR int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}
constexpr int kUnitsOfWarp = MANN_TENSOR ? 4 : power_of_two((kUnits + kWarps - 1) / kWarps);
constexpr int kUnitWarps = (kUnits + kUnitsOfWarp - 1) / kUnitsOfWarp; // that have units at all
static_assert(kUnitWarps <= kWarps);
// Messages and sums of hidden units are in the order of blocks, warps, units, with room for those that do not exist.
constexpr int kUnitsPadded = kUnitWarps * kUnitsOfWarp, kHidden = kBlocks * kUnitsPadded;
constexpr int kRecurrent = H + kWords;
constexpr int kOwners = kExamples * kParts; // blocks that have a memory
static_assert(kBlocks > 1); // on an H100 a block that was launched alone stopped with an illegal instruction
static_assert(kOwners <= kBlocks && (kExamples & (kExamples - 1)) == 0 && kExamples <= 8);

// A vector of a number for each example: one load or two.
struct Each {
    T at[kExamples];
    MANN_INLINE static Each load(const T *source) {
        Each v;
        if constexpr (kExamples % 4 == 0) {
#pragma unroll
            for (int q = 0; q < kExamples / 4; ++q) {
                const Four<T> four = reinterpret_cast<const Four<T> *>(source)[q];
#pragma unroll
                for (int j = 0; j < 4; ++j) v.at[4 * q + j] = four[j];
            }
        } else if constexpr (kExamples == 2) {
            const Two<T> two = *reinterpret_cast<const Two<T> *>(source);
            v.at[0] = two.at[0], v.at[1] = two.at[1];
        } else {
            v.at[0] = *source;
        }
        return v;
    }
};
// Numbers 0, 1, ... of x [count] to target of another block, in as few messages as there are.
template <int count> MANN_INLINE void send_several(T *target, int rank, Mailbox *box, const T *x) {
    static_assert(count == 1 || count == 2 || count % 4 == 0);
    if constexpr (count == 1) {
        send(target, rank, box, *x);
    } else if constexpr (count == 2) {
        send(target, rank, box, Two<T>{{x[0], x[1]}});
    } else {
#pragma unroll
        for (int j = 0; j < count; j += 4) send(target + j, rank, box, Four<T>{{x[j], x[j + 1], x[j + 2], x[j + 3]}});
    }
}

// Who a block is.
struct Share {
    int rank = cluster_rank();
    int first_example = int(blockIdx.x) / kBlocks * kExamples; // of the cluster, in the batch
    int batch;

    MANN_INLINE explicit Share(int batch) : batch(batch) {}
    MANN_INLINE int first_unit() const { return rank * kUnits; }
    MANN_INLINE int units() const { return max(least(H - first_unit(), kUnits), 0); }
    MANN_INLINE bool owns() const { return rank < kOwners; }
    MANN_INLINE int owned() const { return rank / kParts; } // which of the cluster's examples
    MANN_INLINE int part() const { return rank % kParts; }
    MANN_INLINE int example() const { return first_example + owned(); }
    MANN_INLINE bool is_real() const { return owns() && example() < batch; }
    MANN_INLINE int steps_of(const int64_t *lengths, int e, int steps) const {
        const int b = first_example + e;
        return b >= batch ? 0 : lengths ? int(max(min(int64_t(lengths[b]), int64_t(steps)), int64_t(0))) : steps;
    }
};

// The rows of weight_hh of a block's units, `count` columns of each, in shared memory; or in registers, where they are
// held.
template <int count> struct WeightRows {
    alignas(16) T of[MANN_HELD ? 1 : kUnits][MANN_HELD ? 1 : count][4]; // the last index is the gate

    // Asynchronously where they are stored as they are computed with. Column `at` is column source(at) of weight_hh,
    // none where that is negative.
    template <typename Source> MANN_INLINE void copy(const S *weight_hh, const Share &share, Source &&source) {
        constexpr int kEach = (count + kWarp - 1) / kWarp;
        int from[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            from[i] = i * kWarp + lane_of_warp() < count ? source(i * kWarp + lane_of_warp()) : -1;
#pragma unroll 1
        for (int row = warp_of_block(); row < 4 * kUnits; row += kWarps) {
            const int u = row / 4, gate = row % 4;
            const S *weights = weight_hh + (int64_t(gate) * H + share.first_unit() + u) * kRecurrent;
            T *to = &of[0][0][0] + (u * count + lane_of_warp()) * 4 + gate;
#pragma unroll
            for (int i = 0; i < kEach; ++i)
                if ((i + 1) * kWarp <= count || i * kWarp + lane_of_warp() < count)
                    copy_number(to + i * kWarp * 4, weights + from[i], u < share.units() && from[i] >= 0);
        }
    }
};
// *to(i) = *from(i) for i < count, or zero where from(i) is null, shared out over the threads; seen after
// copy_async_wait.
template <int count, typename To, typename From> MANN_INLINE void copy_numbers(To &&to, From &&from) {
    constexpr int kAtOnce = least(share_of(count), 4);
#pragma unroll 1
    for (int first = thread_again(); first < count; first += kAtOnce * kThreads) {
        S loaded[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int i = first + j * kThreads;
            const S *source = i < count ? from(i) : nullptr;
            if constexpr (sizeof(S) != sizeof(T)) loaded[j] = load_if(source, source);
            else if (i < count) copy_number(to(i), source, source);
        }
        if constexpr (sizeof(S) != sizeof(T)) {
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
                if (first + j * kThreads < count) *to(first + j * kThreads) = to_arith(loaded[j]);
        }
    }
}
// The columns of weight_head of a block's units, likewise, to [kUnits][kHeadPadded].
MANN_INLINE void copy_head(T (*target)[kHeadPadded], const S *weight_head, const Share &share) {
    copy_numbers<kUnits * kHeadPadded>([&](int i) { return &target[i % kUnits][i / kUnits]; },
                                       [&](int i) {
                                           const int u = i % kUnits, p = i / kUnits;
                                           return u < share.units() && p < kHead
                                                      ? weight_head + int64_t(p) * H + share.first_unit() + u
                                                      : nullptr;
                                       });
}

// A warp has kCells cells, unit * kExamples + example; kLanes lanes share one, each with kGates of its four gates: what
// scatter_sums makes of values [kCells, 4].
constexpr int kCells = kUnitsOfWarp * kExamples;
static_assert(kCells <= kWarp);
struct SummedCell {
    static constexpr int kLanes = kWarp / kCells, kGates = kLanes >= 4 ? 1 : 4 / kLanes;
    static constexpr int kGateLanes = kGates * kLanes / 4;
    MANN_INLINE static int number() { return lane_of_warp() / kLanes; }
    MANN_INLINE static int unit() { return warp_of_block() * kUnitsOfWarp + number() / kExamples; } // of the block
    MANN_INLINE static int example() { return number() % kExamples; }
    MANN_INLINE static bool exists() { return true; }
    MANN_INLINE static bool first() { return lane_of_warp() % kLanes == 0; }
    MANN_INLINE static bool first_of_gates() { return lane_of_warp() % kGateLanes == 0; }
    MANN_INLINE static int gate(int i) { return lane_of_warp() % kLanes / kGateLanes * kGates + i; }
    MANN_INLINE static int lane_of(int unit, int example) { return (unit * kExamples + example) * kLanes; }
    template <int count> MANN_INLINE static void take_gates(const T (&own)[count], T (&gates)[4]) {
#pragma unroll
        for (int g = 0; g < 4; ++g)
            gates[g] = __shfl_sync(kWholeWarp, own[g % kGates], g / kGates * kGateLanes, kLanes);
    }
};

} // namespace mann::cuda
