// A tile of a matrix product by a block, in arithmetic type: no rounding to TF32.
#pragma once

#include "block.h"

namespace mann::cuda {

// The tile is kTileRows x kTileColumns; each of kTileThreads threads has 4 x 4 of its numbers.
constexpr int kTileRows = 32, kTileColumns = 64, kTileDepth = 16, kTileThreads = 128;
constexpr int kOwn = 4;

template <typename T> struct Tile {
    T at[kOwn][kOwn] = {};

    // Where this thread's numbers begin.
    MANN_INLINE static int row() { return int(threadIdx.x) / (kTileColumns / kOwn) * kOwn; }
    MANN_INLINE static int column() { return int(threadIdx.x) % (kTileColumns / kOwn) * kOwn; }
    // f(row, column, number) of the tile, for each of this thread's.
    template <typename F> MANN_INLINE void each(F &&f) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
            for (int j = 0; j < kOwn; ++j) f(row() + i, column() + j, at[i][j]);
    }
};

// Two operands in shared memory, deep ones beside each other; rows stand apart so that vectors of four are aligned.
template <typename T> struct Operands {
    static constexpr int kRowStride = kTileRows + 4, kColumnStride = kTileColumns + 4;
    static constexpr int kSize = kTileDepth * (kRowStride + kColumnStride);
    T *rows, *columns;
    MANN_INLINE explicit Operands(T *shared) : rows(shared), columns(shared + kTileDepth * kRowStride) {}
};

// Which index of an operand's neighbours are neighbours in memory.
enum class Fast { kDepth, kOther };

// Numbers f(i, k), i < count, k < kTileDepth, to shared[k * stride + i]: neighbours by neighbouring threads.
template <Fast fast, int count, typename T, typename F> MANN_INLINE void fill(T *shared, int stride, F &&f) {
    for (int at = int(threadIdx.x); at < count * kTileDepth; at += kTileThreads) {
        const int i = fast == Fast::kDepth ? at / kTileDepth : at % count;
        const int k = fast == Fast::kDepth ? at % kTileDepth : at / count;
        shared[k * stride + i] = f(i, k);
    }
}

// tile += sum over k < depth of a(row, k) b(column, k). What is outside the matrices a and b give as zero, also beyond
// depth. Starts and ends with a barrier between it and other uses of the operands.
template <Fast fast_a, Fast fast_b, typename T, typename A, typename B>
MANN_INLINE void multiply(Tile<T> &tile, int depth, const Operands<T> &operands, A &&a, B &&b) {
    using Op = Operands<T>;
    for (int k0 = 0; k0 < depth; k0 += kTileDepth) {
        fill<fast_a, kTileRows>(operands.rows, Op::kRowStride, [&](int i, int k) { return a(i, k0 + k); });
        fill<fast_b, kTileColumns>(operands.columns, Op::kColumnStride, [&](int j, int k) { return b(j, k0 + k); });
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < kTileDepth; ++k) {
            const Heads<T> x = load_heads(operands.rows + k * Op::kRowStride + tile.row(), 0);
            const Heads<T> y = load_heads(operands.columns + k * Op::kColumnStride + tile.column(), 0);
#pragma unroll
            for (int i = 0; i < kOwn; ++i)
#pragma unroll
                for (int j = 0; j < kOwn; ++j) tile.at[i][j] += x.head[i] * y.head[j];
        }
        __syncthreads();
    }
}

} // namespace mann::cuda
