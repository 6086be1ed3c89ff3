// A fully connected layer with a slow and a fast weight: augmented_linear and its backward. The product with row s of a
// task's memory is that of (mix_s x) with the row: the weight of an example is never built.
#include "launch.h"
#include "product.h"

namespace mann::cuda {

// The numbers of the operator's argument `activation`.
enum Activation : int { kRelu, kGelu, kTanh, kIdentity };

template <typename S> struct LinearArgs {
    int G, L, S_rows, I, O;          // tasks, examples of a task, rows of its memory, inputs, outputs
    const S *x, *weight, *mix;       // [G, L, I], [O, I], [G, L, S] or null (1)
    const S *fast;                   // [G, S] of [O, I], these far apart:
    int64_t task_stride, row_stride; // in numbers
};
template <typename S> struct LinearForwardArgs : LinearArgs<S> {
    int activation;
    const S *bias;    // [O] or null
    S *y;             // [G, L, O] out
    Arith<S> *slopes; // [2, G, L, O] out, slow and fast; or null
};
template <typename S> struct LinearBackwardArgs : LinearArgs<S> {
    const S *dy;                            // [G, L, O]
    const Arith<S> *slopes;                 // [2, G, L, O] or null (1)
    S *dx, *dweight, *dfast, *dmix, *dbias; // [G, L, I], [O, I], [G, S, O, I], [G, L, S] as mix, [O] out
    Arith<S> *dots;                         // [tiles of I, G * L * S], the parts of dmix; as mix
};

template <typename T> struct Activated {
    T value, slope;
};
template <typename T> MANN_INLINE Activated<T> activate(int activation, T x) {
    if (activation == kRelu) return {x <= 0 ? T(0) : x, x <= 0 ? T(0) : T(1)}; // NaN stays NaN
    if (activation == kGelu) {                                                 // x Phi(x), and Phi(x) + x phi(x)
        const T below = T(0.5) * erfc(-x * T(0.70710678118654752));
        return {x * below, below + x * T(0.39894228040143268) * exponential(T(-0.5) * x * x)};
    }
    if (activation == kTanh) return {hyperbolic_tangent(x), hyperbolic_tangent_slope(x)};
    return {x, T(1)};
}

// Of example i of task g, or of all tasks where g is 0: x, and the weight of row s.
template <typename S> MANN_INLINE Arith<S> mix_of(const LinearArgs<S> &a, int64_t example, int s) {
    return a.mix ? to_arith(a.mix[example * a.S_rows + s]) : Arith<S>(1);
}
template <typename S> MANN_INLINE const S *row_of(const LinearArgs<S> &a, int64_t g, int s) {
    return a.fast + g * a.task_stride + s * a.row_stride;
}
// Before the activation of one side: 0 the slow, 1 the fast.
template <typename S> MANN_INLINE Arith<S> gradient_of(const LinearBackwardArgs<S> &a, int64_t at, int side) {
    const Arith<S> dy = to_arith(a.dy[at]);
    return a.slopes ? dy * a.slopes[int64_t(side) * a.G * a.L * a.O + at] : dy;
}

// A block for kTileRows examples of a task and kTileColumns outputs.
template <typename S>
__global__ void __launch_bounds__(kTileThreads, 1) augmented_linear_kernel(LinearForwardArgs<S> a) {
    using T = Arith<S>;
    MANN_SHARED(T, shared, Operands<T>::kSize);
    const Operands<T> operands(shared);
    const int64_t g = blockIdx.x;
    const int l0 = int(blockIdx.y) * kTileRows, o0 = int(blockIdx.z) * kTileColumns;
    const auto weight_of = [&](const S *weight) {
        return [&a, o0, weight](int o, int i) {
            return o0 + o < a.O && i < a.I ? to_arith(weight[int64_t(o0 + o) * a.I + i]) : T(0);
        };
    };
    const auto x_of = [&](int l, int i) {
        return l0 + l < a.L && i < a.I ? to_arith(a.x[(g * a.L + l0 + l) * a.I + i]) : T(0);
    };
    Tile<T> slow, fast;
    multiply<Fast::kDepth, Fast::kDepth>(slow, a.I, operands, x_of, weight_of(a.weight));
    for (int s = 0; s < a.S_rows; ++s) {
        const auto mixed = [&](int l, int i) {
            return a.mix && l0 + l < a.L ? mix_of(a, g * a.L + l0 + l, s) * x_of(l, i) : x_of(l, i);
        };
        multiply<Fast::kDepth, Fast::kDepth>(fast, a.I, operands, mixed, weight_of(row_of(a, g, s)));
    }
    slow.each([&](int l, int o, T sum) {
        if (l0 + l >= a.L || o0 + o >= a.O) return;
        const int64_t at = (g * a.L + l0 + l) * a.O + o0 + o;
        const auto of_slow = activate(a.activation, sum + (a.bias ? to_arith(a.bias[o0 + o]) : T(0)));
        const auto of_fast = activate(a.activation, fast.at[l - fast.row()][o - fast.column()]);
        a.y[at] = to_storage<S>(of_slow.value + of_fast.value);
        if (a.slopes) a.slopes[at] = of_slow.slope, a.slopes[int64_t(a.G) * a.L * a.O + at] = of_fast.slope;
    });
}

// dx = dslow W + sum_s mix_s dfast F_s, and this tile's share of dmix_s = <dfast F_s, x>: a block for kTileRows
// examples of a task and kTileColumns inputs.
template <typename S>
__global__ void __launch_bounds__(kTileThreads, 1) augmented_linear_backward_x_kernel(LinearBackwardArgs<S> a) {
    using T = Arith<S>;
    MANN_SHARED(T, shared, Operands<T>::kSize);
    const Operands<T> operands(shared);
    const int64_t g = blockIdx.x;
    const int l0 = int(blockIdx.y) * kTileRows, i0 = int(blockIdx.z) * kTileColumns;
    const auto gradient = [&](int side) {
        return [&a, g, l0, side](int l, int o) {
            return l0 + l < a.L && o < a.O ? gradient_of(a, (g * a.L + l0 + l) * a.O + o, side) : T(0);
        };
    };
    const auto weight_of = [&](const S *weight) {
        return [&a, i0, weight](int i, int o) {
            return i0 + i < a.I && o < a.O ? to_arith(weight[int64_t(o) * a.I + i0 + i]) : T(0);
        };
    };
    Tile<T> dx;
    multiply<Fast::kDepth, Fast::kOther>(dx, a.O, operands, gradient(0), weight_of(a.weight));
    for (int s = 0; s < a.S_rows; ++s) {
        Tile<T> product;
        multiply<Fast::kDepth, Fast::kOther>(product, a.O, operands, gradient(1), weight_of(row_of(a, g, s)));
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
            const int l = l0 + dx.row() + r;
            const int64_t example = g * a.L + l;
            const T mix = l < a.L ? mix_of(a, example, s) : T(0);
            T dot = 0;
#pragma unroll
            for (int c = 0; c < kOwn; ++c) {
                const int i = i0 + dx.column() + c;
                if (a.mix && l < a.L && i < a.I) dot += product.at[r][c] * to_arith(a.x[example * a.I + i]);
                dx.at[r][c] += mix * product.at[r][c];
            }
            dot = sum_lanes(dot, kTileColumns / kOwn);
            if (a.mix && l < a.L && dx.column() == 0)
                a.dots[(int64_t(blockIdx.z) * a.G * a.L + example) * a.S_rows + s] = dot;
        }
    }
    dx.each([&](int l, int i, T sum) {
        if (l0 + l < a.L && i0 + i < a.I) a.dx[(g * a.L + l0 + l) * a.I + i0 + i] = to_storage<S>(sum);
    });
}

// dmix: the sum of its parts, a thread for each number.
template <typename S>
__global__ void __launch_bounds__(kTileThreads, 1)
    augmented_linear_backward_mix_kernel(const Arith<S> *dots, S *dmix, int64_t count, int parts) {
    const int64_t at = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
    if (at >= count) return;
    Arith<S> sum = 0;
    for (int part = 0; part < parts; ++part) sum += dots[part * count + at];
    dmix[at] = to_storage<S>(sum);
}

// dweight = dslow^T x over all examples, and dbias: blockIdx.x 0. dfast_s = (mix_s dfast)^T x over those of task g:
// blockIdx.x 1 + g * S + s. A block for kTileRows outputs and kTileColumns inputs.
template <typename S>
__global__ void __launch_bounds__(kTileThreads, 1) augmented_linear_backward_w_kernel(LinearBackwardArgs<S> a) {
    using T = Arith<S>;
    MANN_SHARED(T, shared, Operands<T>::kSize);
    const Operands<T> operands(shared);
    const bool of_slow = blockIdx.x == 0;
    const int64_t row = of_slow ? 0 : int64_t(blockIdx.x) - 1, g = row / a.S_rows;
    const int s = int(row % a.S_rows);
    const int o0 = int(blockIdx.y) * kTileRows, i0 = int(blockIdx.z) * kTileColumns;
    const int64_t first = of_slow ? 0 : g * a.L;
    const int examples = of_slow ? a.G * a.L : a.L;
    const auto gradient = [&](int o, int l) {
        if (o0 + o >= a.O || l >= examples) return T(0);
        const T dy = gradient_of(a, (first + l) * a.O + o0 + o, of_slow ? 0 : 1);
        return of_slow || !a.mix ? dy : dy * mix_of(a, first + l, s);
    };
    Tile<T> dweight;
    multiply<Fast::kOther, Fast::kOther>(dweight, examples, operands, gradient, [&](int i, int l) {
        return i0 + i < a.I && l < examples ? to_arith(a.x[(first + l) * a.I + i0 + i]) : T(0);
    });
    S *target = of_slow ? a.dweight : a.dfast + row * a.O * a.I;
    dweight.each([&](int o, int i, T sum) {
        if (o0 + o < a.O && i0 + i < a.I) target[int64_t(o0 + o) * a.I + i0 + i] = to_storage<S>(sum);
    });
    if (!of_slow || blockIdx.z != 0) return;
    for_each(kTileRows, [&](int o) {
        if (o0 + o >= a.O) return;
        T sum = 0;
        for (int l = 0; l < examples; ++l) sum += gradient(o, l);
        a.dbias[o0 + o] = to_storage<S>(sum);
    });
}

// The layer of a call; rows of fast may lie apart, what is inside one may not.
template <typename S, typename Args>
static void take_layer(Call &call, Args &a, const Tensor &x, const Tensor &weight, const Tensor &fast,
                       const std::optional<Tensor> &mix) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && fast.dim() == 4, "augmented_linear: wrong dimensions");
    const int64_t G = x.size(0), L = x.size(1), I = x.size(2), O = weight.size(0), rows = fast.size(1);
    STD_TORCH_CHECK(I > 0 && O > 0 && rows > 0 && (mix || rows == 1),
                    "augmented_linear: an empty layer, or rows without a mixture");
    STD_TORCH_CHECK(G * L < int64_t(1) << 31 && L < int64_t(1) << 20 && I < int64_t(1) << 21 && O < int64_t(1) << 21 &&
                        G * rows < (int64_t(1) << 31) - 1,
                    "augmented_linear: a layer too large for the CUDA kernel");
    a.G = G, a.L = L, a.S_rows = rows, a.I = I, a.O = O;
    a.x = call.in<S>(x, "x", {G, L, I});
    a.weight = call.in<S>(weight, "weight", {O, I});
    a.mix = call.in<S>(mix, "mix", {G, L, rows});
    a.fast = call.rows<S>(fast, "fast", {G, rows, O, I}, a.task_stride, a.row_stride);
}

static int64_t tiles(int64_t count, int tile) { return (count + tile - 1) / tile; }

static std::tuple<Tensor, Tensor> augmented_linear_cuda(Tensor x, Tensor weight, Tensor fast, std::optional<Tensor> mix,
                                                        std::optional<Tensor> bias, int64_t activation, bool save) {
    Call call(x);
    Tensor y = x, slopes = x;
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        LinearForwardArgs<S> a{};
        take_layer<S>(call, a, x, weight, fast, mix);
        const int64_t G = a.G, L = a.L, O = a.O;
        const bool keep = save && activation != kIdentity;
        y = call.empty({G, L, O});
        slopes = keep ? call.empty({2, G, L, O}, call.arithmetic()) : call.empty({0}, call.arithmetic());
        a.activation = int(activation), a.bias = call.in<S>(bias, "bias", {O});
        a.y = out<S>(y), a.slopes = keep ? out<Arith<S>>(slopes) : nullptr;
        const auto augmented_linear = &augmented_linear_kernel<S>;
        if (G * L > 0)
            MANN_LAUNCH(augmented_linear, dim3(G, tiles(L, kTileRows), tiles(O, kTileColumns)), kTileThreads, 1, 0,
                        call.stream(), a);
    });
    return {y, slopes};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> augmented_linear_backward_cuda(Tensor dy, Tensor x,
                                                                                         Tensor weight, Tensor fast,
                                                                                         std::optional<Tensor> mix,
                                                                                         Tensor slopes) {
    Call call(x);
    Tensor dx = x, dweight = x, dfast = x, dmix = x, dbias = x;
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        using T = Arith<S>;
        LinearBackwardArgs<S> a{};
        take_layer<S>(call, a, x, weight, fast, mix);
        const int64_t G = a.G, L = a.L, rows = a.S_rows, I = a.I, O = a.O, parts = tiles(I, kTileColumns);
        dx = call.empty({G, L, I}), dweight = call.empty({O, I}), dfast = call.empty({G, rows, O, I});
        dmix = mix ? call.empty({G, L, rows}) : call.empty({0}), dbias = call.empty({O});
        a.dy = call.in<S>(dy, "dy", {G, L, O});
        if (slopes.numel() > 0) a.slopes = call.in<T>(slopes, "slopes", {2, G, L, O});
        a.dx = out<S>(dx), a.dweight = out<S>(dweight), a.dfast = out<S>(dfast), a.dmix = out<S>(dmix);
        a.dbias = out<S>(dbias), a.dots = mix ? call.scratch<T>(parts * G * L * rows) : nullptr;
        const auto augmented_linear_backward_x = &augmented_linear_backward_x_kernel<S>;
        const auto augmented_linear_backward_mix = &augmented_linear_backward_mix_kernel<S>;
        const auto augmented_linear_backward_w = &augmented_linear_backward_w_kernel<S>;
        if (G * L > 0)
            MANN_LAUNCH(augmented_linear_backward_x, dim3(G, tiles(L, kTileRows), parts), kTileThreads, 1, 0,
                        call.stream(), a);
        if (mix && G * L > 0)
            MANN_LAUNCH(augmented_linear_backward_mix, tiles(G * L * rows, kTileThreads), kTileThreads, 1, 0,
                        call.stream(), a.dots, a.dmix, G * L * rows, int(parts));
        MANN_LAUNCH(augmented_linear_backward_w, dim3(1 + G * rows, tiles(O, kTileRows), parts), kTileThreads, 1, 0,
                    call.stream(), a);
    });
    return {dx, dweight, dfast, dmix, dbias};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("augmented_linear", TORCH_BOX(&mann::cuda::augmented_linear_cuda));
    m.impl("augmented_linear_backward", TORCH_BOX(&mann::cuda::augmented_linear_backward_cuda));
}
