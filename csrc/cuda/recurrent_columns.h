// vector . weights for every example: sums over the rows of each column.
#pragma once

#include "recurrent_product.h"

namespace mann::cuda {

// FMA: four threads that stand eight apart in a warp have the same four columns and share the rows, four at once.
template <int tile, typename T>
MANN_INLINE void add_rows(const T (&weights)[4][4], const Vectors<T> &vectors, int row, T (&sums)[4][tile]) {
#pragma unroll
    for (int e = 0; e < tile; ++e) {
        T vector[4];
        load_quad(vectors.numbers + e * vectors.leading + row, vector);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[j][e] += weights[i][j] * vector[i];
    }
}

// In registers: `held` times 16 rows.
template <int tile, int held, typename T, typename F>
MANN_INLINE void columns_by_fma(const Matrix<T> &weights, const T (*registers)[4][4], const Vectors<T> &vectors,
                                F &&give) {
    const int lane = lane_of_warp(), part = lane / 8, quads = (weights.columns + 3) / 4;
    for (int first = warp_of_block() * 8; first < quads; first += kWarps * 8) {
        const int quad = min(first + lane % 8, quads - 1);
        T sums[4][tile] = {};
#pragma unroll
        for (int i = 0; i < held; ++i)
            if (i * 16 + part * 4 < weights.rows) add_rows(registers[i], vectors, i * 16 + part * 4, sums);
#pragma unroll 1
        for (int row = held * 16 + part * 4; row < weights.rows; row += 16) {
            T weight[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) // beyond the last row the vectors are zero
                load_quad(weights.numbers + (min(row + i, weights.rows - 1) - weights.first) * weights.leading +
                              quad * 4,
                          weight[i]);
            add_rows(weight, vectors, row, sums);
        }
        add_across_groups(sums);
        if (first + lane % 8 >= quads || quad * 4 + part >= weights.columns) continue;
#pragma unroll
        for (int e = 0; e < tile; ++e) give(e, quad * 4 + part, sums[0][e]);
    }
}

// A thread's share of a transposed tile: [16 columns, kDepth rows] at (row, column). Of two bfloat16 in a word, one
// belongs to column 2g, which is line g of the tile, the other to column 2g + 1, which is line g + 8.
MANN_INLINE void load_transposed(const Matrix<Bf16> &weights, int row, int column, uint32_t a[4]) {
    const int lane = lane_of_warp(), last = weights.rows - 1;
    const Bf16 *from = weights.numbers + min(column + lane / 4 * 2, (weights.columns - 1) / 2 * 2);
    row += lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8) {
        const uint32_t even = word_at(from + (min(row, last) - weights.first) * weights.leading);
        const uint32_t odd = word_at(from + (min(row + 1, last) - weights.first) * weights.leading);
        a[2 * half] = (even & 0xFFFFu) | odd << 16;
        a[2 * half + 1] = even >> 16 | (odd & 0xFFFF0000u);
    }
}

// Tensor cores: a warp has 16 columns, then 16 others. In registers: of both, `held` steps of rows.
template <int tile, int held, typename F>
MANN_INLINE void columns_by_tensor(const Matrix<Bf16> &weights, const uint32_t (*registers)[4],
                                   const Vectors<Bf16> &vectors, F &&give) {
    constexpr int depth = kDepth<Bf16>;
    const int lane = lane_of_warp(), steps = (weights.rows + depth - 1) / depth;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
        const int column = (warp_of_block() + pass * kWarps) * 16;
        if (column >= weights.columns) return;
        float sums[2][4] = {};
        uint32_t a[4], b[2];
#pragma unroll
        for (int i = 0; i < held; ++i) {
            if (i >= steps) continue;
            load_vectors<tile>(vectors, i, b);
            mma_bf16(sums[i % 2], registers[pass * held + i], b);
        }
        for (int step = held; step < steps; step += 2)
#pragma unroll
            for (int turn = 0; turn < 2; ++turn) {
                if (step + turn >= steps) continue;
                load_transposed(weights, (step + turn) * depth, column, a);
                load_vectors<tile>(vectors, step + turn, b);
                mma_bf16(sums[turn], a, b);
            }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = column + lane / 4 * 2 + i / 2, example = lane % 4 * 2 + i % 2;
            if (at < weights.columns && example < tile) give(example, at, sums[0][i] + sums[1][i]);
        }
    }
}

// give(example, column, sum) for every column of vector . weights, of at most kMostColumns.
constexpr int kMostColumns = 2 * 16 * kWarps;
template <int tile, typename S, typename F>
MANN_INLINE void vectors_times_columns(const Matrix<S> &weights, const Vectors<S> &vectors, F &&give) {
    if constexpr (kTensor<S>) columns_by_tensor<tile, 0>(weights, nullptr, vectors, give);
    else columns_by_fma<tile, 0>(weights, static_cast<const S(*)[4][4]>(nullptr), vectors, give);
}

// The same, with a thread's first weights in its registers.
template <int tile, typename S> class HeldColumns {
    static constexpr int kQuads = 1, kSteps = 1; // 16 rows, in 16 registers or 8
    S quads_[kTensor<S> ? 1 : kQuads][4][4];
    uint32_t words_[kTensor<S> ? 2 * kSteps : 1][4];

  public:
    // How many rows are not in shared memory.
    static MANN_BOTH int rows(int all) { return min(all, kTensor<S> ? kDepth<S> * kSteps : 16 * kQuads); }

    // at(row, column) is a weight, or zero beyond the matrix.
    template <typename At> MANN_INLINE void take(int columns, At &&at) {
        const int thread = thread_again(), lane = thread % kLanes, warp = thread / kLanes;
        if constexpr (!kTensor<S>) {
            const int column = min(warp * 8 + lane % 8, (columns + 3) / 4 - 1) * 4;
#pragma unroll
            for (int n = 0; n < kQuads; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) quads_[n][i][j] = at(n * 16 + lane / 8 * 4 + i, column + j);
        } else {
#pragma unroll
            for (int n = 0; n < 2 * kSteps; ++n)
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    const int row = n % kSteps * kDepth<S> + part / 2 * kDepth<S> / 2 + lane % 4 * 2;
                    const int column = (warp + n / kSteps * kWarps) * 16 + lane / 4 * 2 + part % 2;
                    words_[n][part] = word_of(at(row, column), at(row + 1, column));
                }
        }
    }
    template <typename F>
    MANN_INLINE void multiply(const Matrix<S> &weights, const Vectors<S> &vectors, F &&give) const {
        if constexpr (kTensor<S>) columns_by_tensor<tile, kSteps>(weights, words_, vectors, give);
        else columns_by_fma<tile, kQuads>(weights, quads_, vectors, give);
    }
};

} // namespace mann::cuda
