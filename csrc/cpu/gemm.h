// The matrix products inside the time loop: few rows (the batch), a matrix that stays the same for the whole episode.
// It is packed once; each row's sums run over k in order, so a row's bits do not depend on which rows stand beside it.
//
// A matrix of bfloat16 meets rows rounded to bfloat16 where the processor has their dot products: two products at a
// time, added up in float32.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace mann::MANN_ISA {

template <typename T> constexpr int kPanelVectors = MANN_VECTOR_REGISTERS == 32 ? 3 : 2;
template <typename T> constexpr int kPanelColumns = kPanelVectors<T> * kLanes<T>;
constexpr int kBlockRows = MANN_VECTOR_REGISTERS == 32 ? 8 : 6;

// A matrix [K, N] as panels [ceil(N / columns)][K][columns], the last one filled with zeros; or [ceil(K / 2)][columns]
// pairs of bfloat16 (k, k + 1), each in the place of a number.
template <typename T> struct Packed {
    const T *panels;
    int64_t K, N;
    bool pairs = false;
};

// Whether matrices of this storage type are packed as pairs.
template <typename S> inline bool packs_pairs() {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, Bf16>) return isa() == Isa::kAvx512Bf16;
#endif
    return false;
}

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

#if defined(__AVX512F__)
// The same, as pairs. A row of an even number of columns has its pairs side by side already.
inline Packed<float> pack_pairs(const Bf16 *source, bool transposed, int64_t K, int64_t N, float *target) {
    constexpr int64_t columns = kPanelColumns<float>, lanes = kLanes<float>;
    float *out = target;
    for (int64_t n0 = 0; n0 < N; n0 += columns, out += (K + 1) / 2 * columns) {
        const int64_t width = N - n0 < columns ? N - n0 : columns;
        if (transposed && K % 2 == 0) {
            transpose(reinterpret_cast<const float *>(source + n0 * K), K / 2, width, K / 2, out, columns, columns);
            continue;
        }
        for (int64_t k = 0; k < K; k += 2) {
            for (int64_t j = 0; j < columns; j += lanes) {
                Bf16 pair[2][lanes] = {};
                for (int64_t i = 0; i < 2 && k + i < K; ++i)
                    for (int64_t n = 0; n < lanes && j + n < width; ++n)
                        pair[i][n] = transposed ? source[(n0 + j + n) * K + k + i] : source[(k + i) * N + n0 + j + n];
                const auto low = reinterpret_cast<detail::Bits32>(detail::widen(pair[0])) >> 16;
                const auto high = reinterpret_cast<detail::Bits32>(detail::widen(pair[1]));
                store(out + k / 2 * columns + j, reinterpret_cast<Vec<float>>(low | high));
            }
        }
    }
    return {target, K, N, true};
}
#endif

namespace detail {
// out = sum + initial, for some of the columns.
template <typename T, int rows>
inline void finish_block(Vec<T> (&sum)[rows][kPanelVectors<T>], const T *initial, int64_t initial_stride, T *out,
                         int64_t out_stride, int64_t columns) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kPanelVectors<T>; ++v) {
            const int64_t left = columns - v * kLanes<T>;
            if (left <= 0) break;
            if (initial) sum[i][v] += load_some(initial + i * initial_stride + v * kLanes<T>, left);
            store_some(out + i * out_stride + v * kLanes<T>, sum[i][v], left);
        }
    }
}
#if defined(__AVX512F__)
// gemm_block of pairs: the rows become bfloat16 some hundred numbers at a time, which stay in L1.
template <int rows>
[[gnu::target("avx512bf16")]] inline void pairs_block(const float *a, int64_t lda, const float *panel, int64_t K,
                                                      const float *initial, int64_t initial_stride, float *out,
                                                      int64_t out_stride, int64_t columns) {
    constexpr int vectors = kPanelVectors<float>, lanes = kLanes<float>;
    constexpr int64_t pairs_at_once = 128;
    Vec<float> sum[rows][vectors] = {};
    alignas(64) uint32_t row[rows][pairs_at_once];
    for (int64_t k0 = 0; k0 < K; k0 += 2 * pairs_at_once) {
        const int64_t count = K - k0 < 2 * pairs_at_once ? K - k0 : 2 * pairs_at_once;
        for (int i = 0; i < rows; ++i)
            for (int64_t k = 0; k < count; k += 2 * lanes) {
                const float *at = a + i * lda + k0 + k;
                const Vec<float> second = count - k > lanes ? load_some(at + lanes, count - k - lanes) : Vec<float>{};
                _mm512_store_si512(&row[i][k / 2], (__m512i)_mm512_cvtne2ps_pbh(second, load_some(at, count - k)));
            }
        for (int64_t pair = 0; 2 * pair < count; ++pair, panel += kPanelColumns<float>) {
            __m512bh b[vectors];
            for (int v = 0; v < vectors; ++v) b[v] = (__m512bh)load(panel + v * lanes);
#pragma GCC unroll 8
            for (int i = 0; i < rows; ++i) {
                const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(row[i][pair]));
#pragma GCC unroll 3
                for (int v = 0; v < vectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x, b[v]);
            }
        }
    }
    finish_block<float, rows>(sum, initial, initial_stride, out, out_stride, columns);
}
#endif
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
    finish_block<T, rows>(sum, initial, initial_stride, out, out_stride, columns);
}
template <typename T, int rows = kBlockRows>
inline void gemm_rows(int64_t M, const T *a, int64_t lda, const T *panel, const Packed<T> &b, const T *initial,
                      int64_t initial_stride, T *out, int64_t out_stride, int64_t columns) {
    if (M != rows) {
        if constexpr (rows > 1)
            gemm_rows<T, rows - 1>(M, a, lda, panel, b, initial, initial_stride, out, out_stride, columns);
        return;
    }
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>)
        if (b.pairs) return pairs_block<rows>(a, lda, panel, b.K, initial, initial_stride, out, out_stride, columns);
#endif
    gemm_block<T, rows>(a, lda, panel, b.K, initial, initial_stride, out, out_stride, columns);
}
} // namespace detail

// out [M, N] = initial [M, N] + a [M, K] b. Rows are lda, initial_stride, out_stride apart; initial may be null (zero),
// equal to out, or one row for all (initial_stride 0). Out of line: it is large, and called in many places.
template <typename T>
[[gnu::noinline]] void gemm(int64_t M, const T *a, int64_t lda, Packed<T> b, const T *initial, int64_t initial_stride,
                            T *out, int64_t out_stride) {
    const int64_t blocks = (M + kBlockRows - 1) / kBlockRows;
    for (int64_t n0 = 0; n0 < b.N; n0 += kPanelColumns<T>) {
        const T *panel = b.panels + n0 * (b.pairs ? (b.K + 1) / 2 : b.K);
        const T *start = initial ? initial + n0 : nullptr;
        for (int64_t block = 0; block < blocks; ++block) { // of nearly equal height
            const int64_t first = M * block / blocks, last = M * (block + 1) / blocks;
            detail::gemm_rows<T>(last - first, a + first * lda, lda, panel, b,
                                 start ? start + first * initial_stride : nullptr, initial_stride,
                                 out + first * out_stride + n0, out_stride,
                                 b.N - n0 < kPanelColumns<T> ? b.N - n0 : kPanelColumns<T>);
        }
    }
}

} // namespace mann::MANN_ISA
