// The LSTM of mann_sequence, spread over the blocks of a cluster: sizes, who has what, products.
//
// A cluster of kBlocks blocks takes kExamples examples through time. Each block has a share of the hidden units, whose
// rows of weight_hh (all four gates) and columns of weight_head stay in its shared memory; a warp makes the gates of a
// unit for all examples. The slots of example e stand in the blocks e * kParts and following, kParts of them.
#pragma once

#include "rows.h"

namespace mann::cuda {

constexpr int H = MANN_H, kBlocks = MANN_BLOCKS, kExamples = MANN_EXAMPLES;
constexpr int kUnits = (H + kBlocks - 1) / kBlocks; // of a block; the last blocks may have fewer
constexpr int kRecurrent = H + kWords;
constexpr int kOwners = kExamples * kParts; // blocks that have a memory
static_assert(kBlocks > 1); // on an H100 a block that was launched alone stopped with an illegal instruction
static_assert(kOwners <= kBlocks && (kExamples & (kExamples - 1)) == 0 && kExamples <= 8);

struct alignas(2 * sizeof(T)) Two {
    T at[2];
};
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
            const Two two = *reinterpret_cast<const Two *>(source);
            v.at[0] = two.at[0], v.at[1] = two.at[1];
        } else {
            v.at[0] = *source;
        }
        return v;
    }
    MANN_INLINE void send_to(T *target, int rank, Mailbox *box) const {
        if constexpr (kExamples % 4 == 0) {
#pragma unroll
            for (int q = 0; q < kExamples / 4; ++q)
                send(target + 4 * q, rank, box, Four<T>{{at[4 * q], at[4 * q + 1], at[4 * q + 2], at[4 * q + 3]}});
        } else {
#pragma unroll
            for (int e = 0; e < kExamples; ++e) send(target + e, rank, box, at[e]);
        }
    }
};

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

// After scatter_sums of 4 * kExamples values, gate after gate, over a warp: a lane has the sum of gate() for example().
constexpr int kGateLanes = kWarp / (4 * kExamples) > 0 ? kWarp / (4 * kExamples) : 1;
struct GateLane {
    MANN_INLINE static int gate() { return lane_of_warp() / kGateLanes / kExamples; }
    MANN_INLINE static int example() { return lane_of_warp() / kGateLanes % kExamples; }
    MANN_INLINE static bool first() { return lane_of_warp() % kGateLanes == 0; }
    MANN_INLINE static int of(int gate, int example) { return (gate * kExamples + example) * kGateLanes; }
};

} // namespace mann::cuda
