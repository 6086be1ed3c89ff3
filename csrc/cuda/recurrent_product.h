// Products of a weight matrix, in shared memory and registers, with one vector for each of the `tile` examples that a
// cluster works on.
//
// float32 multiplies on the FMA units, or on the tensor cores in TF32 where torch allows that; bfloat16 on the tensor
// cores, with float32 sums. The weights are the 16 side of the tensor cores' products, the examples the 8 side. A
// thread meets the same weights at every step: the first of them stay in its registers, which no other part of a step
// needs.
#pragma once

#include "block.h"

namespace mann::cuda {

constexpr int kThreads = 512; // of a block
constexpr int kWarps = kThreads / kLanes;

enum class Arithmetic { kFma, kTf32, kBf16 };

MANN_BOTH constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
// A step of the tensor cores is eight words deep; rows and vectors are padded to that with zeros.
template <typename S> constexpr int kPerWord = sizeof(S) == 2 ? 2 : 1;
template <typename S> constexpr int kDepth = 8 * kPerWord<S>;
// How far apart the rows of a matrix, or vectors, stand: 4 words modulo 8, so that what eight groups of four threads
// read at once lies in different banks.
template <typename S> MANN_BOTH constexpr int leading(int columns) {
    return round_up(columns, kDepth<S>) + kDepth<S> / 2;
}

template <typename S> struct Matrix {
    const S *numbers; // in shared memory, without what is in registers
    int leading;
    int rows, columns;
    int first; // the column (products of rows) or row (of columns) where the shared part begins
};
template <typename S> struct Vectors {
    const S *numbers; // [tile, leading] in shared memory
    int leading;
};

template <typename T> struct QuadOf {
    using type = float4;
};
#if defined(MANN_CUDA_ON_CPU)
template <> struct QuadOf<double> {
    using type = double4;
};
#endif
template <typename T> MANN_INLINE void load_quad(const T *from, T to[4]) {
    const auto quad = *reinterpret_cast<const typename QuadOf<T>::type *>(from);
    to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
}

// What a weight is multiplied as.
template <Arithmetic arithmetic, typename S> MANN_INLINE S as_factor(S weight) {
    if constexpr (arithmetic == Arithmetic::kTf32) return __uint_as_float(to_tf32(weight));
    else return weight;
}
MANN_INLINE uint32_t word_at(const float *numbers) { return __float_as_uint(*numbers); }
MANN_INLINE uint32_t word_at(const Bf16 *numbers) { return *reinterpret_cast<const uint32_t *>(numbers); }
MANN_INLINE uint32_t word_of(float number, float) { return __float_as_uint(number); }
MANN_INLINE uint32_t word_of(Bf16 low, Bf16 high) {
    return uint32_t(__bfloat16_as_ushort(low)) | uint32_t(__bfloat16_as_ushort(high)) << 16;
}

template <Arithmetic arithmetic> MANN_INLINE void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    if constexpr (arithmetic == Arithmetic::kTf32) mma_tf32(d, a, b);
    else mma_bf16(d, a, b);
}
// A thread's share of a step's words of the vectors. Examples beyond the tile are the last one again.
template <Arithmetic arithmetic, int tile, typename S>
MANN_INLINE void load_vectors(const Vectors<S> &vectors, int step, uint32_t b[2]) {
    const int lane = lane_of_warp();
    const S *from =
        vectors.numbers + min(lane / 4, tile - 1) * vectors.leading + step * kDepth<S> + lane % 4 * kPerWord<S>;
    b[0] = word_at(from), b[1] = word_at(from + kDepth<S> / 2);
    if constexpr (arithmetic == Arithmetic::kTf32)
        b[0] = to_tf32(__uint_as_float(b[0])), b[1] = to_tf32(__uint_as_float(b[1]));
}

// Each of the four groups of eight threads of a warp holds a part of every sum; it gets the total of its own line.
template <int tile, typename T> MANN_INLINE void add_across_groups(T (&sums)[4][tile]) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < tile; ++e) {
            const T give = upper ? sums[j][e] : sums[j + 2][e], keep = upper ? sums[j + 2][e] : sums[j][e];
            sums[j][e] = keep + __shfl_xor_sync(kWholeWarp, give, 16);
        }
#pragma unroll
    for (int e = 0; e < tile; ++e) {
        const T give = odd ? sums[0][e] : sums[1][e], keep = odd ? sums[1][e] : sums[0][e];
        sums[0][e] = keep + __shfl_xor_sync(kWholeWarp, give, 8);
    }
}

} // namespace mann::cuda
