// weights . vector for every example: sums over the columns of each row.
#pragma once

#include "recurrent_product.h"

namespace mann::cuda {

// Each sum comes in so many chunks that all warps have work.
template <typename T> struct Partial {
    T *sums; // [chunks, tile, leading]
    int chunks, leading;
};
// What a warp writes at once, eight rows of four pairs of examples, lies in different banks.
MANN_BOTH constexpr int partial_leading(int rows) { return round_up(rows + 12, 16) - 12; }
template <typename S> MANN_BOTH constexpr int chunks_of(int rows, int columns) {
    const int groups = kTensor<S> ? (rows + 15) / 16 : (rows + 3) / 4; // of rows
    const int at_once = kTensor<S> ? kWarps : 8 * kWarps;
    const int wanted = at_once / groups, deep_enough = (columns + 15) / 16, most = 12;
    const int chunks = wanted < deep_enough ? wanted : deep_enough;
    return chunks < 1 ? 1 : chunks > most ? most : chunks;
}
template <int tile, typename T> MANN_INLINE T total(const Partial<T> &partial, int example, int row) {
    T sum = 0;
    for (int chunk = 0; chunk < partial.chunks; ++chunk)
        sum += partial.sums[(chunk * tile + example) * partial.leading + row];
    return sum;
}

// FMA: a thread has four rows, `groups` apart, and takes four columns at once; the four groups of a warp share the
// columns of a chunk. In registers: its first four columns.
constexpr int kHeldRowWords = 16;
struct RowShare {
    int group, groups, chunk, part;
    bool exists;
    MANN_INLINE RowShare(int rows, int chunks, int first) {
        groups = (rows + 3) / 4;
        const int item = min(first + lane_of_warp() % 8, groups * chunks - 1);
        group = item % groups, chunk = item / groups, part = lane_of_warp() / 8;
        exists = first + lane_of_warp() % 8 < groups * chunks;
    }
    MANN_INLINE int row(int j, int rows) const { return min(group + j * groups, rows - 1); }
};

template <int tile, typename T>
MANN_INLINE void add_quad(const T (&weights)[4][4], const Vectors<T> &vectors, int column, T (&sums)[4][tile]) {
#pragma unroll
    for (int e = 0; e < tile; ++e) {
        T vector[4];
        load_quad(vectors.numbers + e * vectors.leading + column, vector);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[j][e] += weights[j][i] * vector[i];
    }
}

template <int tile, bool held, typename T>
MANN_INLINE void rows_by_fma(const Matrix<T> &weights, const T (&registers)[4][4], const Vectors<T> &vectors,
                             const Partial<T> &out, bool add) {
    const int quads = (weights.columns + 3) / 4, stride = out.chunks * 4;
    for (int first = warp_of_block() * 8; first < (weights.rows + 3) / 4 * out.chunks; first += kWarps * 8) {
        const RowShare share(weights.rows, out.chunks, first);
        T sums[4][tile] = {};
        int quad = share.chunk * 4 + share.part;
        if constexpr (held) {
            if (quad < quads) add_quad(registers, vectors, quad * 4, sums);
            quad += stride;
        }
#pragma unroll 1
        for (; quad < quads; quad += stride) {
            T weight[4][4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                load_quad(weights.numbers + share.row(j, weights.rows) * weights.leading + quad * 4 - weights.first,
                          weight[j]);
            add_quad(weight, vectors, quad * 4, sums);
        }
        add_across_groups(sums);
        const int row = share.group + share.part * share.groups;
        if (!share.exists || row >= weights.rows) continue;
#pragma unroll
        for (int e = 0; e < tile; ++e) {
            T &sum = out.sums[(share.chunk * tile + e) * out.leading + row];
            sum = add ? sum + sums[0][e] : sums[0][e];
        }
    }
}

// Tensor cores: a warp has 16 rows, and every `chunks`-th step of columns. In registers: its first four steps.
template <int tile, bool held>
MANN_INLINE void rows_by_tensor(const Matrix<Bf16> &weights, const uint32_t (&registers)[4][4],
                                const Vectors<Bf16> &vectors, const Partial<float> &out, bool add) {
    constexpr int depth = kDepth<Bf16>;
    const int lane = lane_of_warp(), tiles = (weights.rows + 15) / 16, last = weights.rows - 1;
    const int steps = (weights.columns + depth - 1) / depth;
    for (int item = warp_of_block(); item < tiles * out.chunks; item += kWarps) {
        const int chunk = item / tiles, row = item % tiles * 16 + lane / 4, word = lane % 4 * 2;
        const Bf16 *upper = weights.numbers + min(row, last) * weights.leading + word;
        const Bf16 *lower = weights.numbers + min(row + 8, last) * weights.leading + word;
        float sums[2][4] = {}; // two, so that one product does not wait for the other
        uint32_t b[2];
        int step = chunk;
        if constexpr (held) {
#pragma unroll
            for (int i = 0; i < 4; ++i, step += out.chunks) {
                if (step >= steps) continue;
                load_vectors<tile>(vectors, step, b);
                mma_bf16(sums[i % 2], registers[i], b);
            }
        }
        for (; step < steps; step += 2 * out.chunks)
#pragma unroll
            for (int turn = 0; turn < 2; ++turn) {
                const int at = step + turn * out.chunks;
                if (at >= steps) continue;
                const int k = at * depth - weights.first, half = depth / 2;
                const uint32_t a[4] = {word_at(upper + k), word_at(lower + k), word_at(upper + k + half),
                                       word_at(lower + k + half)};
                load_vectors<tile>(vectors, at, b);
                mma_bf16(sums[turn], a, b);
            }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int example = lane % 4 * 2 + i % 2, line = row + i / 2 * 8;
            if (line >= weights.rows || example >= tile) continue;
            float &sum = out.sums[(chunk * tile + example) * out.leading + line];
            sum = (add ? sum : 0) + (sums[0][i] + sums[1][i]);
        }
    }
}

// out = weights . vector, or added to what is there.
template <int tile, typename S>
MANN_INLINE void rows_times_vectors(const Matrix<S> &weights, const Vectors<S> &vectors, const Partial<Arith<S>> &out,
                                    bool add) {
    const std::conditional_t<kTensor<S>, uint32_t, S> none[4][4] = {};
    if constexpr (kTensor<S>) rows_by_tensor<tile, false>(weights, none, vectors, out, add);
    else rows_by_fma<tile, false>(weights, none, vectors, out, add);
}

// The same, with a thread's first weights in its registers: for no more rows than the block has shares for.
template <int tile, typename S> class HeldRows {
    using Word = std::conditional_t<kTensor<S>, uint32_t, S>;
    Word words_[4][4];

  public:
    // How many columns are not in shared memory.
    static MANN_BOTH int columns(int rows, int all) {
        const int chunks = chunks_of<S>(rows, all);
        return min(all, chunks * (kTensor<S> ? 4 * kDepth<S> : 16));
    }
    static MANN_BOTH bool fits(int rows) { return rows <= (kTensor<S> ? 16 : 4 * 8) * kWarps; }

    // at(row, column) is a weight, or zero beyond the matrix.
    template <typename At> MANN_INLINE void take(int rows, int chunks, At &&at) {
        if constexpr (!kTensor<S>) {
            const RowShare share(rows, chunks, warp_of_block() * 8);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    words_[j][i] = at(share.row(j, rows), (share.chunk * 4 + share.part) * 4 + i);
        } else {
            const int lane = lane_of_warp(), tiles = (rows + 15) / 16, item = min(warp_of_block(), tiles * chunks - 1);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    const int row = item % tiles * 16 + lane / 4 + part % 2 * 8;
                    const int column =
                        (item / tiles + i * chunks) * kDepth<S> + part / 2 * kDepth<S> / 2 + lane % 4 * 2;
                    words_[i][part] = word_of(at(row, column), at(row, column + 1));
                }
        }
    }
    MANN_INLINE void multiply(const Matrix<S> &weights, const Vectors<S> &vectors, const Partial<Arith<S>> &out) const {
        if constexpr (kTensor<S>) rows_by_tensor<tile, true>(weights, words_, vectors, out, false);
        else rows_by_fma<tile, true>(weights, words_, vectors, out, false);
    }
};

} // namespace mann::cuda
