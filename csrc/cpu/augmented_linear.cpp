// A fully connected layer with a slow and a fast weight: augmented_linear and its backward. The products with all rows
// of a task's memory are one matrix product that its examples share; they are mixed afterwards.
#include "augmented_linear.h"
#include "gemm.h"

namespace mann::MANN_ISA {

// The S weights [O, I] of a task side by side, as [S * O, I], or (beside) as [O, S * I].
template <typename S>
inline void stack_rows(const S *fast, int64_t row_stride, int64_t rows, int64_t O, int64_t I, bool beside,
                       Arith<S> *target) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < O; ++o)
            convert(fast + r * row_stride + o * I, target + (beside ? o * rows + r : r * O + o) * I, I);
}

// out[o] = <x, weight[o]>; x is filled with zeros to whole vectors.
template <typename S> inline void dot_rows(const S *weight, int64_t O, int64_t I, const Arith<S> *x, Arith<S> *out) {
    using T = Arith<S>;
    constexpr int64_t together = 4;
    for (int64_t o = 0; o < O; o += together) {
        const int64_t last = std::min(together, O - o) - 1; // the last one again, where there are fewer
        Vec<T> sum[together] = {};
        for (int64_t i = 0; i < I; i += kLanes<T>)
            for (int64_t j = 0; j < together; ++j)
                sum[j] += load(x + i) * load_arith(weight + (o + std::min(j, last)) * I + i, I - i);
        T sums[together];
        sum_lanes<together>(sum, sums);
        for (int64_t j = 0; j <= last; ++j) out[o + j] = sums[j];
    }
}

// out [I] = sum_o dy[o] weight[o].
template <typename S> inline void add_rows(const S *weight, int64_t O, int64_t I, const Arith<S> *dy, Arith<S> *out) {
    using T = Arith<S>;
    for (int64_t i = 0; i < I; i += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t o = 0; o < O; ++o) sum += broadcast(dy[o]) * load_arith(weight + o * I + i, I - i);
        store_some(out + i, sum, I - i);
    }
}

// One example: y = act(slow) + act(sum_s mix_s fast_s), and the slopes.
template <typename S>
inline void finish_linear(const AugmentedLinearArgs &a, int64_t example, const Arith<S> *slow, const Arith<S> *fast,
                          const Arith<S> *mix) {
    using T = Arith<S>;
    for (int64_t o = 0; o < a.O; o += kLanes<T>) {
        Vec<T> sum = load(fast + o);
        if (mix) {
            sum *= broadcast(mix[0]);
            for (int64_t r = 1; r < a.S; ++r) sum += broadcast(mix[r]) * load(fast + r * a.O + o);
        }
        const Activated<T> s = activate<T>(a.activation, load(slow + o)), f = activate<T>(a.activation, sum);
        const int64_t at = example * a.O + o;
        store_storage(static_cast<S *>(a.y) + at, s.value + f.value, a.O - o);
        if (a.slopes) {
            T *slopes = static_cast<T *>(a.slopes) + at;
            store_some(slopes, s.slope, a.O - o);
            store_some(slopes + a.G * a.L * a.O, f.slope, a.O - o);
        }
    }
}

template <typename S> void augmented_linear(const AugmentedLinearArgs &a, int64_t begin, int64_t end, void *memory) {
    using T = Arith<S>;
    const AugmentedLinearPlan plan(a);
    T *scratch = static_cast<T *>(memory), *x = scratch + plan.x, *slow = scratch + plan.slow,
      *fast = scratch + plan.fast, *mix = scratch + plan.mix, *bias = scratch + plan.bias;
    const int64_t x_stride = round_up(a.I, 16);
    const Packed<T> slow_panels = pack(static_cast<const S *>(a.weight), true, a.I, a.O, scratch + plan.slow_panels);
    if (a.bias) convert(static_cast<const S *>(a.bias), bias, a.O);
    int64_t task = -1;
    for (int64_t first = begin, count; first < end; first += count) {
        count = std::min({end - first, kLinearRows, a.L - first % a.L}); // of one task
        const int64_t now = first / a.L;
        const S *rows = static_cast<const S *>(a.fast.data) + now * a.fast.task_stride;
        convert_rows(static_cast<const S *>(a.x) + first * a.I, x, count, a.I, x_stride);
        gemm(count, x, x_stride, slow_panels, a.bias ? bias : nullptr, 0, slow, a.O);
        if (a.L < kFewRows) {
            for (int64_t l = 0; l < count; ++l)
                for (int64_t r = 0; r < a.S; ++r)
                    dot_rows(rows + r * a.fast.row_stride, a.O, a.I, x + l * x_stride, fast + (l * a.S + r) * a.O);
        } else {
            if (now != task) {
                stack_rows(rows, a.fast.row_stride, a.S, a.O, a.I, false, scratch + plan.stacked);
                pack<T>(scratch + plan.stacked, true, a.I, a.S * a.O, scratch + plan.fast_panels);
                task = now;
            }
            gemm(count, x, x_stride, Packed<T>{scratch + plan.fast_panels, a.I, a.S * a.O}, static_cast<T *>(nullptr),
                 0, fast, a.S * a.O);
        }
        if (a.mix) convert(static_cast<const S *>(a.mix) + first * a.S, mix, count * a.S);
        for (int64_t l = 0; l < count; ++l)
            finish_linear<S>(a, first + l, slow + l * a.O, fast + l * a.S * a.O, a.mix ? mix + l * a.S : nullptr);
    }
}

// One example: dx += sum_s mix_s products_s, dmix_s = <products_s, x>, where products_s = dfast_y fast_s.
template <typename S>
inline void unmix_products(const AugmentedLinearBackwardArgs &a, int64_t example, const Arith<S> *x,
                           const Arith<S> *products, const Arith<S> *mix, Arith<S> *dx) {
    using T = Arith<S>;
    for (int64_t r = 0; r < a.S; ++r, products += a.I) {
        const Vec<T> weight = broadcast(mix ? mix[r] : T(1));
        Vec<T> dot{};
        for (int64_t i = 0; i < a.I; i += kLanes<T>) {
            const Vec<T> product = load_some(products + i, a.I - i);
            dot += product * load(x + i);
            store_some(dx + i, load_some(dx + i, a.I - i) + weight * product, a.I - i);
        }
        if (mix) static_cast<S *>(a.dmix)[example * a.S + r] = to_storage<S>(sum_lanes<T>(dot));
    }
}

// dslow and dfast_y, the gradients before the activations, and from them dx and dmix.
template <typename S>
void augmented_linear_backward_x(const AugmentedLinearBackwardArgs &a, int64_t begin, int64_t end, void *memory) {
    using T = Arith<S>;
    const AugmentedLinearBackwardXPlan plan(a);
    T *scratch = static_cast<T *>(memory), *x = scratch + plan.x, *dx = scratch + plan.dx,
      *products = scratch + plan.products, *mix = scratch + plan.mix;
    T *dslow = static_cast<T *>(a.dslow), *dfast = static_cast<T *>(a.dfast_y);
    const T *slopes = static_cast<const T *>(a.slopes);
    const int64_t all = a.G * a.L * a.O;
    const Packed<T> slow_panels = pack(static_cast<const S *>(a.weight), false, a.O, a.I, scratch + plan.slow_panels);
    int64_t task = -1;
    for (int64_t first = begin, count; first < end; first += count) {
        count = std::min({end - first, kLinearRows, a.L - first % a.L});
        const int64_t now = first / a.L, from = first * a.O;
        const S *rows = static_cast<const S *>(a.fast.data) + now * a.fast.task_stride;
        convert(static_cast<const S *>(a.dy) + from, dslow + from, count * a.O);
        for (int64_t i = from; i < from + count * a.O; ++i) {
            dfast[i] = slopes ? dslow[i] * slopes[all + i] : dslow[i];
            if (slopes) dslow[i] *= slopes[i];
        }
        gemm(count, dslow + from, a.O, slow_panels, static_cast<T *>(nullptr), 0, dx, a.I);
        if (a.L < kFewRows) {
            for (int64_t l = 0; l < count; ++l)
                for (int64_t r = 0; r < a.S; ++r)
                    add_rows(rows + r * a.fast.row_stride, a.O, a.I, dfast + from + l * a.O,
                             products + (l * a.S + r) * a.I);
        } else {
            if (now != task) {
                stack_rows(rows, a.fast.row_stride, a.S, a.O, a.I, true, scratch + plan.stacked);
                pack<T>(scratch + plan.stacked, false, a.O, a.S * a.I, scratch + plan.fast_panels);
                task = now;
            }
            gemm(count, dfast + from, a.O, Packed<T>{scratch + plan.fast_panels, a.O, a.S * a.I},
                 static_cast<T *>(nullptr), 0, products, a.S * a.I);
        }
        if (a.mix) convert(static_cast<const S *>(a.mix) + first * a.S, mix, count * a.S);
        for (int64_t l = 0; l < count; ++l) {
            convert_rows(static_cast<const S *>(a.x) + (first + l) * a.I, x, 1, a.I, round_up(a.I, 16));
            unmix_products<S>(a, first + l, x, products + l * a.S * a.I, a.mix ? mix + l * a.S : nullptr, dx + l * a.I);
        }
        convert(dx, static_cast<S *>(a.dx) + first * a.I, count * a.I);
    }
}

// Outputs [o, o + outputs) of dweight, dfast and dbias: dweight = dslow^T x, dfast_s = (mix_s dfast_y)^T x.
template <typename S>
void weights_of_outputs(const AugmentedLinearBackwardArgs &a, int64_t o, int64_t outputs, Arith<S> *scratch) {
    using T = Arith<S>;
    const AugmentedLinearBackwardWPlan plan(a);
    T *factors = scratch + plan.factors, *slow = scratch + plan.slow, *fast = scratch + plan.fast,
      *mix = scratch + plan.mix;
    T dbias[kLinearOutputs] = {};
    std::memset(slow, 0, outputs * a.I * sizeof(T));
    for (int64_t g = 0; g < a.G; ++g) {
        std::memset(fast, 0, a.S * outputs * a.I * sizeof(T));
        for (int64_t l = 0; l < a.L; l += kLinearRows) {
            const int64_t rows = std::min(kLinearRows, a.L - l), first = g * a.L + l;
            const Packed<T> panels =
                pack(static_cast<const S *>(a.x) + first * a.I, false, rows, a.I, scratch + plan.panels);
            transpose(static_cast<const T *>(a.dslow) + first * a.O + o, a.O, rows, outputs, factors, kLinearRows,
                      kLinearRows);
            for (int64_t i = 0; i < outputs; ++i)
                for (int64_t j = 0; j < rows; ++j) dbias[i] += factors[i * kLinearRows + j];
            gemm(outputs, factors, kLinearRows, panels, slow, a.I, slow, a.I);
            transpose(static_cast<const T *>(a.dfast_y) + first * a.O + o, a.O, rows, outputs, factors, kLinearRows,
                      kLinearRows);
            if (a.mix) {
                convert(static_cast<const S *>(a.mix) + first * a.S, mix, rows * a.S);
                for (int64_t r = a.S - 1; r >= 0; --r) // the first last: it stands where the unmixed ones do
                    for (int64_t i = 0; i < outputs; ++i)
                        for (int64_t j = 0; j < rows; ++j)
                            factors[(r * outputs + i) * kLinearRows + j] =
                                factors[i * kLinearRows + j] * mix[j * a.S + r];
            }
            gemm(a.S * outputs, factors, kLinearRows, panels, fast, a.I, fast, a.I);
        }
        for (int64_t r = 0; r < a.S; ++r)
            convert(fast + r * outputs * a.I, static_cast<S *>(a.dfast) + ((g * a.S + r) * a.O + o) * a.I,
                    outputs * a.I);
    }
    convert(slow, static_cast<S *>(a.dweight) + o * a.I, outputs * a.I);
    convert(dbias, static_cast<S *>(a.dbias) + o, outputs);
}

template <typename S>
void augmented_linear_backward_w(const AugmentedLinearBackwardArgs &a, int64_t begin, int64_t end, void *memory) {
    for (int64_t o = begin * kLinearOutputs; o < std::min(end * kLinearOutputs, a.O); o += kLinearOutputs)
        weights_of_outputs<S>(a, o, std::min(kLinearOutputs, a.O - o), static_cast<Arith<S> *>(memory));
}

} // namespace mann::MANN_ISA

MANN_KERNEL(augmented_linear, AugmentedLinearArgs)
MANN_KERNEL(augmented_linear_backward_x, AugmentedLinearBackwardArgs)
MANN_KERNEL(augmented_linear_backward_w, AugmentedLinearBackwardArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

template <typename Args>
static Args linear_args(const Tensor &x, const Tensor &weight, const Tensor &fast, bool mixed) {
    STD_TORCH_CHECK((x.dim() == 2 || x.dim() == 3) && weight.dim() == 2 && fast.dim() == x.dim() + 1,
                    "augmented_linear: wrong dimensions");
    Args args{};
    args.G = x.dim() == 3 ? x.size(0) : 1, args.L = x.size(-2), args.I = x.size(-1);
    args.O = weight.size(0), args.S = fast.size(-3);
    STD_TORCH_CHECK(args.I > 0 && args.O > 0 && args.S > 0 && (mixed || args.S == 1),
                    "augmented_linear: an empty layer, or rows without a mixture");
    return args;
}

static std::tuple<Tensor, Tensor> augmented_linear_cpu(Tensor x, Tensor weight, Tensor fast, std::optional<Tensor> mix,
                                                       std::optional<Tensor> bias, int64_t activation, bool save) {
    Call call(x);
    auto args = linear_args<AugmentedLinearArgs>(x, weight, fast, mix.has_value());
    const auto [G, L, S, I, O] = std::tuple{args.G, args.L, args.S, args.I, args.O};
    const bool tasks = x.dim() == 3;
    Tensor y = call.empty(of_tasks(tasks, {G, L, O}));
    const bool keep = save && activation != kIdentity;
    Tensor slopes = keep ? call.empty({2, G, L, O}, call.arithmetic()) : call.empty({0}, call.arithmetic());
    args.activation = activation;
    args.x = call.in(x, "x", {G, L, I});
    args.weight = call.in(weight, "weight", {O, I});
    args.fast = call.rows(fast, "fast", {G, S, O, I});
    args.mix = call.in(mix, "mix", {G, L, S});
    args.bias = call.in(bias, "bias", {O});
    args.y = out(y), args.slopes = keep ? out(slopes) : nullptr;
    call.run(augmented_linear_pick(), &args, G * L, AugmentedLinearPlan(args).size, double(G) * L * O * I * (1 + S));
    return {y, slopes};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> augmented_linear_backward_cpu(Tensor dy, Tensor x,
                                                                                        Tensor weight, Tensor fast,
                                                                                        std::optional<Tensor> mix,
                                                                                        Tensor slopes) {
    Call call(x);
    auto args = linear_args<AugmentedLinearBackwardArgs>(x, weight, fast, mix.has_value());
    const auto [G, L, S, I, O] = std::tuple{args.G, args.L, args.S, args.I, args.O};
    const bool tasks = x.dim() == 3;
    Tensor dx = call.empty(of_tasks(tasks, {G, L, I})), dfast = call.empty(of_tasks(tasks, {G, S, O, I}));
    Tensor dweight = call.empty({O, I}), dbias = call.empty({O});
    Tensor dmix = mix ? call.empty(of_tasks(tasks, {G, L, S})) : call.empty({0});
    args.dy = call.in(dy, "dy", {G, L, O});
    args.x = call.in(x, "x", {G, L, I});
    args.weight = call.in(weight, "weight", {O, I});
    args.fast = call.rows(fast, "fast", {G, S, O, I});
    args.mix = call.in(mix, "mix", {G, L, S});
    if (slopes.numel() > 0) args.slopes = call.in(slopes, call.arithmetic(), "slopes", {2, G, L, O});
    args.dslow = call.scratch(G * L * O), args.dfast_y = call.scratch(G * L * O);
    args.dx = out(dx), args.dweight = out(dweight), args.dfast = out(dfast), args.dmix = out(dmix);
    args.dbias = out(dbias);
    const double work = double(G) * L * O * I * (1 + S);
    const int64_t blocks = (O + kLinearOutputs - 1) / kLinearOutputs;
    call.run(augmented_linear_backward_x_pick(), &args, G * L, AugmentedLinearBackwardXPlan(args).size, work);
    call.run(augmented_linear_backward_w_pick(), &args, blocks, AugmentedLinearBackwardWPlan(args).size, work);
    return {dx, dweight, dfast, dmix, dbias};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("augmented_linear", TORCH_BOX(&mann::augmented_linear_cpu));
    m.impl("augmented_linear_backward", TORCH_BOX(&mann::augmented_linear_backward_cpu));
}
#endif
