// Products of a weight matrix, in shared memory and registers, with one vector for each of the `tile` examples that a
// cluster works on.
//
// float32 multiplies on the FMA units, exactly; bfloat16 on the tensor cores, with float32 sums. The weights are the 16
// side of the tensor cores' products, the examples the 8 side. A thread meets the same weights at every step: the first
// of them stay in its registers, which no other part of a step needs.
#pragma once

#include "block.h"

namespace mann::cuda {

constexpr int kThreads = 512; // of a block
constexpr int kWarps = kThreads / kLanes;

// Whether numbers of this type go to the tensor cores.
template <typename S> constexpr bool kTensor = sizeof(S) == 2;

MANN_BOTH constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
// A step of the tensor cores is eight words deep; rows and vectors are padded to that with zeros.
template <typename S> constexpr int kDepth = kTensor<S> ? 16 : 8;
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

MANN_INLINE uint32_t word_at(const Bf16 *numbers) { return *reinterpret_cast<const uint32_t *>(numbers); }
MANN_INLINE uint32_t word_of(Bf16 low, Bf16 high) {
    return uint32_t(__bfloat16_as_ushort(low)) | uint32_t(__bfloat16_as_ushort(high)) << 16;
}

// A thread's share of a step's words of the vectors. Examples beyond the tile are the last one again.
template <int tile> MANN_INLINE void load_vectors(const Vectors<Bf16> &vectors, int step, uint32_t b[2]) {
    const int lane = lane_of_warp();
    const Bf16 *from = vectors.numbers + min(lane / 4, tile - 1) * vectors.leading + step * kDepth<Bf16> + lane % 4 * 2;
    b[0] = word_at(from), b[1] = word_at(from + kDepth<Bf16> / 2);
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
