// The activations of the augmented layers, with their slopes; device code.
#pragma once

#include "device.h"

#include "augmented.h"

namespace mann::cuda {

template <typename T> struct Activated {
    T value, slope;
};
template <int activation, typename T> MANN_INLINE Activated<T> activate(T x) {
    if constexpr (activation == kRelu) return {x <= 0 ? T(0) : x, x <= 0 ? T(0) : T(1)}; // NaN stays NaN
    if constexpr (activation == kGelu) {                                                 // x Phi(x), Phi(x) + x phi(x)
        const T below = T(0.5) * erfc(-x * T(0.70710678118654752));
        return {x * below, below + x * T(0.39894228040143268) * exponential(T(-0.5) * x * x)};
    }
    if constexpr (activation == kTanh) return {hyperbolic_tangent(x), hyperbolic_tangent_slope(x)};
    return {x, T(1)};
}

} // namespace mann::cuda
