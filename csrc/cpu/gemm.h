// The matrix products inside the time loop: few rows (the batch), a matrix that stays the same for the whole episode.
// It is packed once; each row's sums run over k in order, so a row's bits do not depend on which rows stand beside it.
#pragma once

#include "simd.h"

namespace mann::MANN_ISA {

template <typename T> constexpr int kPanelVectors = MANN_VECTOR_REGISTERS == 32 ? 3 : 2;
template <typename T> constexpr int kPanelColumns = kPanelVectors<T> * kLanes<T>;
constexpr int kBlockRows = MANN_VECTOR_REGISTERS == 32 ? 8 : 6;

// A matrix [K, N] as panels [ceil(N / columns)][K][columns], the last one filled with zeros.
template <typename T> struct Packed {
    const T *panels;
    int64_t K, N;
};

template <typename T> inline int64_t packed_size(int64_t K, int64_t N) {
    constexpr int64_t columns = kPanelColumns<T>;
    return (N + columns - 1) / columns * columns * K;
}

// Packs b [K, N], stored row by row, or (transposed) stored as [N, K].
template <typename S>
inline Packed<Arith<S>> pack(const S *source, bool transposed, int64_t K, int64_t N, Arith<S> *target) {
    using T = Arith<S>;
    constexpr int64_t columns = kPanelColumns<T>;
    T *out = target;
    for (int64_t n0 = 0; n0 < N; n0 += columns, out += K * columns) {
        const int64_t width = N - n0 < columns ? N - n0 : columns;
        if (transposed) {
            transpose(source + n0 * K, K, width, K, out, columns, columns);
        } else {
            for (int64_t k = 0; k < K; ++k)
                for (int64_t j = 0; j < columns; j += kLanes<T>)
                    store(out + k * columns + j, j < width ? load_arith(source + k * N + n0 + j, width - j) : Vec<T>{});
        }
    }
    return {target, K, N};
}

namespace detail {
template <typename T, int rows>
inline void gemm_block(const T *a, int64_t lda, const T *panel, int64_t K, const T *initial, int64_t initial_stride,
                       T *out, int64_t out_stride, int64_t columns) {
    constexpr int vectors = kPanelVectors<T>, lanes = kLanes<T>;
    Vec<T> sum[rows][vectors] = {};
    for (int64_t k = 0; k < K; ++k, panel += kPanelColumns<T>) {
        Vec<T> b[vectors];
        for (int v = 0; v < vectors; ++v) b[v] = load(panel + v * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
            const Vec<T> x = broadcast(a[i * lda + k]);
#pragma GCC unroll 3
            for (int v = 0; v < vectors; ++v) sum[i][v] += x * b[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) {
            const int64_t left = columns - v * lanes;
            if (left <= 0) break;
            if (initial) sum[i][v] += load_some(initial + i * initial_stride + v * lanes, left);
            store_some(out + i * out_stride + v * lanes, sum[i][v], left);
        }
    }
}
template <typename T, int rows = kBlockRows>
inline void gemm_rows(int64_t M, const T *a, int64_t lda, const T *panel, int64_t K, const T *initial,
                      int64_t initial_stride, T *out, int64_t out_stride, int64_t columns) {
    if (M == rows) return gemm_block<T, rows>(a, lda, panel, K, initial, initial_stride, out, out_stride, columns);
    if constexpr (rows > 1)
        gemm_rows<T, rows - 1>(M, a, lda, panel, K, initial, initial_stride, out, out_stride, columns);
}
} // namespace detail

// out [M, N] = initial [M, N] + a [M, K] b. Rows are lda, initial_stride, out_stride apart; initial may be null (zero),
// equal to out, or one row for all (initial_stride 0). Out of line: it is large, and called in many places.
template <typename T>
[[gnu::noinline]] void gemm(int64_t M, const T *a, int64_t lda, Packed<T> b, const T *initial, int64_t initial_stride,
                            T *out, int64_t out_stride) {
    const int64_t blocks = (M + kBlockRows - 1) / kBlockRows;
    for (int64_t n0 = 0; n0 < b.N; n0 += kPanelColumns<T>) {
        const T *panel = b.panels + n0 * b.K;
        const T *start = initial ? initial + n0 : nullptr;
        for (int64_t block = 0; block < blocks; ++block) { // of nearly equal height
            const int64_t first = M * block / blocks, last = M * (block + 1) / blocks;
            detail::gemm_rows<T>(last - first, a + first * lda, lda, panel, b.K,
                                 start ? start + first * initial_stride : nullptr, initial_stride,
                                 out + first * out_stride + n0, out_stride,
                                 b.N - n0 < kPanelColumns<T> ? b.N - n0 : kPanelColumns<T>);
        }
    }
}

} // namespace mann::MANN_ISA
