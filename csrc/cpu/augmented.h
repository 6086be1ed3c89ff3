// What the two augmented layers share: activations with their slopes, and mixtures of fast weights.
#pragma once

#include <cmath>

#include "plan.h"
#include "simd.h"

#include "cells.h" // needs the functions of simd.h

namespace mann {

// The numbers of the operator's argument `activation`.
enum Activation : int64_t { kRelu, kGelu, kTanh, kIdentity };

} // namespace mann

namespace mann::MANN_ISA {

template <typename T> struct Activated {
    Vec<T> value, slope;
};

// x Phi(x), and Phi(x) + x phi(x).
template <typename T> inline Activated<T> gelu(Vec<T> x) {
    Activated<T> result;
    for (int i = 0; i < kLanes<T>; ++i) {
        const T below = T(0.5) * std::erfc(-x[i] * T(0.70710678118654752));
        result.value[i] = x[i] * below;
        result.slope[i] = below + x[i] * T(0.39894228040143268) * std::exp(T(-0.5) * x[i] * x[i]);
    }
    return result;
}

template <typename T> inline Activated<T> activate(int64_t activation, Vec<T> x) {
    const Vec<T> zero{}, one = zero + 1;
    if (activation == kRelu) return {x <= zero ? zero : x, x <= zero ? zero : one}; // NaN stays NaN
    if (activation == kGelu) return gelu<T>(x);
    if (activation == kTanh) return {hyperbolic_tangent(x), hyperbolic_tangent_slope(x)};
    return {x, one};
}

namespace detail {
template <int examples, typename T>
inline void mix_some(int64_t S, int64_t n, const T *mix, const T *rows, int64_t row_stride, T *out,
                     int64_t out_stride) {
    constexpr int vectors = 2; // that share a broadcast
    for (int64_t i = 0; i < n; i += vectors * kLanes<T>) {
        Vec<T> sum[examples][vectors] = {};
        for (int64_t s = 0; s < S; ++s) {
            const T *at = rows + s * row_stride + i;
            const Vec<T> first = load(at), second = load(at + kLanes<T>);
#pragma GCC unroll 4
            for (int e = 0; e < examples; ++e) {
                const Vec<T> weight = broadcast(mix[e * S + s]);
                sum[e][0] += weight * first;
                sum[e][1] += weight * second;
            }
        }
        for (int e = 0; e < examples; ++e)
            for (int v = 0; v < vectors; ++v) store(out + e * out_stride + i + v * kLanes<T>, sum[e][v]);
    }
}
} // namespace detail

// Examples that are mixed together read the rows once.
constexpr int64_t kMixed = 4;

// Eq. 9: out[e] = sum_s mix[e, s] rows[s], n numbers each, for at most kMixed examples. Whole pairs of vectors are read
// and written.
template <int examples = int(kMixed), typename T>
inline void mix_rows(int64_t count, int64_t S, int64_t n, const T *mix, const T *rows, int64_t row_stride, T *out,
                     int64_t out_stride) {
    if (count == examples) return detail::mix_some<examples>(S, n, mix, rows, row_stride, out, out_stride);
    if constexpr (examples > 1) mix_rows<examples - 1>(count, S, n, mix, rows, row_stride, out, out_stride);
}

} // namespace mann::MANN_ISA
