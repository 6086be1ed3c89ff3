// Products with weight_hh of mann_sequence on tensor cores (MANN_TENSOR): of bfloat16 as it is stored, of float32 in
// TF32.
//
// A warp multiplies 16 rows of weights with all examples, up to 8, at a time. What they are multiplied with stands in
// shared memory example after example. The 16 columns of a fragment go to the four lanes of a row in fours, so a lane
// loads its numbers at once.
#pragma once

#include "controller.h"

#if MANN_TENSOR
namespace mann::cuda {

constexpr int kDepth = 16; // rows and columns of a fragment
MANN_CONSTEXPR int fragments_of(int count) { return (count + kDepth - 1) / kDepth; }
// Numbers of an example, with room for whole fragments; lanes that load at once meet different banks.
MANN_CONSTEXPR int stride_of(int count) { return round_up(count + kDepth, 2 * kDepth) - kDepth; }

// A lane's share of a fragment, in the order of mma_bf16, or of two of mma_tf32.
struct alignas(16) Fragment {
    static constexpr bool kHalf = sizeof(S) == 2;
    uint32_t bits[kHalf ? 4 : 8];

    MANN_INLINE static uint32_t pair(T low, T high) { // of numbers that were rounded
        return __float_as_uint(high) & 0xffff0000u | __float_as_uint(low) >> 16;
    }
    MANN_INLINE static uint32_t to_tf32(T x) { return x != x ? __float_as_uint(x) : __float_as_uint(x) + 0x1000u; }

    // What a lane takes: weight(row, column) as it is stored.
    template <typename F> MANN_INLINE static void load(S (&stored)[8], int lane, F &&weight) {
#pragma unroll
        for (int i = 0; i < 8; ++i) stored[i] = weight(lane / 4 + i % 2 * 8, lane % 4 * 4 + i / 2);
    }
    MANN_INLINE explicit Fragment(const S (&stored)[8]) {
#pragma unroll
        for (int i = 0; i < (kHalf ? 4 : 8); ++i) {
            const int first = i / 2 * 4 + i % 2; // and the next column
            if constexpr (kHalf) bits[i] = pair(to_arith(stored[first]), to_arith(stored[first + 2]));
            else bits[i] = to_tf32(to_arith(stored[i]));
        }
    }
    // sums += weights times four numbers of each example; sums as those of an mma.
    MANN_INLINE void multiply(T (&sums)[4], const Four<T> &x) const {
        if constexpr (kHalf) {
            const uint32_t b[] = {pair(x.at[0], x.at[1]), pair(x.at[2], x.at[3])};
            mma_bf16(sums, bits, b);
        } else {
            const uint32_t b[] = {to_tf32(x.at[0]), to_tf32(x.at[1]), to_tf32(x.at[2]), to_tf32(x.at[3])};
            mma_tf32(sums, bits, b);
            mma_tf32(sums, bits + 4, b + 2);
        }
    }
};
// `count` fragments of every lane: *target(f, lane) of weight(f, row, column), so many loaded at once.
template <int count, typename Target, typename Weight>
MANN_INLINE void take_fragments(Target &&target, Weight &&weight) {
    constexpr int kAll = count * kWarp, kAtOnce = least(share_of(kAll), 4);
#pragma unroll 1
    for (int first = int(threadIdx.x); first < kAll; first += kAtOnce * kThreads) {
        S stored[kAtOnce][8];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int i = least(first + j * kThreads, kAll - 1);
            Fragment::load(stored[j], i % kWarp, [&](int row, int column) { return weight(i / kWarp, row, column); });
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int i = first + j * kThreads;
            if (i < kAll) *target(i / kWarp, i % kWarp) = Fragment(stored[j]);
        }
    }
}
// Numbers [count] of every example, one example after the other; without tensor cores number after number.
template <int count> struct OfExamples {
    alignas(16) T all[kExamples][stride_of(count)];
    MANN_INLINE T &at(int k, int e) { return all[e][k]; }
    MANN_INLINE void clear() { // what stands after the numbers of an example is zero, once
        constexpr int kRoom = stride_of(count) - count;
        for (int i = thread_again(); i < kExamples * kRoom; i += kThreads) all[i / kRoom][count + i % kRoom] = 0;
    }
};
// A lane's four numbers of columns 16 i and following, of x [kExamples, stride].
template <int stride> MANN_INLINE Four<T> numbers_of_lane(const T (*x)[stride], int i) {
    const int lane = lane_of_warp();
    return *reinterpret_cast<const Four<T> *>(&x[lane / 4 % kExamples][kDepth * i + lane % 4 * 4]);
}

// Of the gates of four units, row gate * 4 + unit: a lane has all four of a unit for one example.
struct TensorCell {
    static constexpr int kGates = 4, kLanes = 1;
    MANN_INLINE static int unit() { return warp_of_block() * 4 + lane_of_warp() / 4 % 4; } // of the block
    MANN_INLINE static int example() { return lane_of_warp() % 4 * 2 + lane_of_warp() / 16; }
    MANN_INLINE static bool exists() { return example() < kExamples; }
    MANN_INLINE static bool first() { return true; }
    MANN_INLINE static bool first_of_gates() { return true; }
    MANN_INLINE static int gate(int i) { return i; }
    MANN_INLINE static int lane_of(int unit, int example) { return (example % 2 * 4 + unit) * 4 + example / 2; }
    // From sums of rows lane / 4 and 8 more, for examples lane % 4 * 2 and one more.
    MANN_INLINE static void take_gates(const T (&sums)[4], T (&gates)[4]) {
        const bool upper = lane_of_warp() / 16;
        const T first = __shfl_xor_sync(kWholeWarp, upper ? sums[0] : sums[1], 16);
        const T second = __shfl_xor_sync(kWholeWarp, upper ? sums[2] : sums[3], 16);
        gates[0] = upper ? first : sums[0], gates[1] = upper ? sums[1] : first;
        gates[2] = upper ? second : sums[2], gates[3] = upper ? sums[3] : second;
    }
};

} // namespace mann::cuda
#else
namespace mann::cuda {

// Numbers [count] of every example: number after number, or for tensor cores example after example.
template <int count> struct OfExamples {
    alignas(16) T all[count][kExamples];
    MANN_INLINE T &at(int k, int e) { return all[k][e]; }
    MANN_INLINE void clear() {}
};

} // namespace mann::cuda
#endif
