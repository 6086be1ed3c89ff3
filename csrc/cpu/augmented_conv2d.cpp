// A convolution with a slow and a fast weight, and pooling: augmented_conv2d and its backward.
#include "augmented_conv2d_backward.h"
#include "augmented_conv2d_forward.h"

MANN_KERNEL(augmented_conv2d, AugmentedConv2dArgs)
MANN_KERNEL(augmented_conv2d_backward_x, AugmentedConv2dBackwardArgs)
MANN_KERNEL(augmented_conv2d_backward_w, AugmentedConv2dBackwardArgs)
MANN_KERNEL(augmented_conv2d_finish, AugmentedConv2dBackwardArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static ConvShape conv_shape(const Tensor &x, const Tensor &weight, const Tensor &fast, int64_t padding, bool pool) {
    STD_TORCH_CHECK((x.dim() == 4 || x.dim() == 5) && weight.dim() == 4 && fast.dim() == x.dim() + 1,
                    "augmented_conv2d: wrong dimensions");
    const ConvShape s{x.size(-3), x.size(-2), x.size(-1), weight.size(0), weight.size(2), padding, pool};
    STD_TORCH_CHECK(s.C > 0 && s.O > 0 && s.k > 0 && padding >= 0 && s.height() > 0 && s.width() > 0,
                    "augmented_conv2d: nothing to convolve");
    return s;
}

static std::tuple<Tensor, Tensor, Tensor> augmented_conv2d_cpu(Tensor x, Tensor weight, Tensor fast,
                                                               std::optional<Tensor> mix, std::optional<Tensor> bias,
                                                               int64_t padding, int64_t activation, bool pool,
                                                               bool save) {
    Call call(x);
    const ConvShape s = conv_shape(x, weight, fast, padding, pool);
    const bool tasks = x.dim() == 5;
    const int64_t G = tasks ? x.size(0) : 1, L = x.size(-4), S = fast.size(-5), P = s.pooled_pixels();
    STD_TORCH_CHECK(S > 0 && (mix || S == 1), "augmented_conv2d: rows without a mixture");
    Tensor y = call.empty(of_tasks(tasks, {G, L, s.O, s.pooled_height(), s.pooled_width()}));
    Tensor codes = save ? call.empty({G, L, P, s.O}, ScalarType::Byte) : call.empty({0}, ScalarType::Byte);
    const bool keep = save && (activation == kGelu || activation == kTanh);
    Tensor slopes = keep ? call.empty({2, G, L, P, s.O}, call.arithmetic()) : call.empty({0}, call.arithmetic());
    AugmentedConv2dArgs args{};
    args.shape = s, args.L = L, args.S = S, args.activation = activation, args.examples = G * L;
    args.x = call.in(x, "x", {G, L, s.C, s.H, s.W});
    args.weight = call.in(weight, "weight", {s.O, s.C, s.k, s.k});
    args.fast = call.rows(fast, "fast", {G, S, s.O, s.C, s.k, s.k});
    args.mix = call.in(mix, "mix", {G, L, S});
    args.bias = call.in(bias, "bias", {s.O});
    args.y = out(y);
    args.codes = save ? static_cast<uint8_t *>(out(codes)) : nullptr;
    args.slopes = keep ? out(slopes) : nullptr;
    call.run(augmented_conv2d_pick(), &args, G * L, AugmentedConv2dForwardPlan(s, S).size,
             2.0 * G * L * s.pixels() * s.O * s.K());
    return {y, codes, slopes};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
augmented_conv2d_backward_cpu(Tensor dy, Tensor x, Tensor weight, Tensor fast, std::optional<Tensor> mix, Tensor codes,
                              Tensor slopes, int64_t padding, bool pool, bool need_dx) {
    Call call(x);
    const ConvShape s = conv_shape(x, weight, fast, padding, pool);
    const bool tasks = x.dim() == 5;
    const int64_t G = tasks ? x.size(0) : 1, L = x.size(-4), S = fast.size(-5), P = s.pooled_pixels();
    STD_TORCH_CHECK(S > 0 && (mix || S == 1), "augmented_conv2d: rows without a mixture");
    Tensor dx = need_dx ? call.empty(of_tasks(tasks, {G, L, s.C, s.H, s.W})) : call.empty({0});
    Tensor dweight = call.empty({s.O, s.C, s.k, s.k}), dfast = call.empty(of_tasks(tasks, {G, S, s.O, s.C, s.k, s.k}));
    Tensor dmix = mix ? call.empty(of_tasks(tasks, {G, L, S})) : call.empty({0}), dbias = call.empty({s.O});
    AugmentedConv2dBackwardArgs args{};
    args.shape = s, args.G = G, args.L = L, args.S = S, args.examples = G * L;
    args.dy = call.in(dy, "dy", {G, L, s.O, s.pooled_height(), s.pooled_width()});
    args.x = call.in(x, "x", {G, L, s.C, s.H, s.W});
    args.weight = call.in(weight, "weight", {s.O, s.C, s.k, s.k});
    args.fast = call.rows(fast, "fast", {G, S, s.O, s.C, s.k, s.k});
    args.mix = call.in(mix, "mix", {G, L, S});
    args.codes = static_cast<const uint8_t *>(call.in(codes, ScalarType::Byte, "codes", {G, L, P, s.O}));
    if (slopes.numel() > 0) args.slopes = call.in(slopes, call.arithmetic(), "slopes", {2, G, L, P, s.O});
    args.dx = out(dx), args.dweight = out(dweight), args.dfast = out(dfast), args.dmix = out(dmix);
    args.dbias = out(dbias);
    const int64_t blocks = (s.O + kTogetherOutputs - 1) / kTogetherOutputs;
    args.dots = call.scratch(blocks * G * L * S), args.bias_sums = call.scratch(s.O);
    const double work = 2.0 * G * L * P * s.O * s.K();
    if (need_dx)
        call.run(augmented_conv2d_backward_x_pick(), &args, G * L, AugmentedConv2dBackwardXPlan(s, S).size, work);
    call.run(augmented_conv2d_backward_w_pick(), &args, blocks, AugmentedConv2dBackwardWPlan(s, S, s.O).size, work);
    augmented_conv2d_finish_pick()(call.storage(), &args, 0, 1, nullptr);
    return {dx, dweight, dfast, dmix, dbias};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("augmented_conv2d", TORCH_BOX(&mann::augmented_conv2d_cpu));
    m.impl("augmented_conv2d_backward", TORCH_BOX(&mann::augmented_conv2d_backward_cpu));
}
#endif
