// A fully connected layer with a slow and a fast weight: augmented_linear and its backward.
#include "launch.h"

#include "augmented_linear.h"

namespace mann::cuda {

using Layer = AugmentedLayer<void>;

// The layer of a call; rows of fast may lie apart, what is inside one may not.
static Layer layer_of(Call &call, const Tensor &x, const Tensor &weight, const Tensor &fast,
                      const std::optional<Tensor> &mix) {
    STD_TORCH_CHECK((x.dim() == 2 || x.dim() == 3) && weight.dim() == 2 && fast.dim() == x.dim() + 1,
                    "augmented_linear: wrong dimensions");
    const int64_t G = x.dim() == 3 ? x.size(0) : 1, L = x.size(-2), I = x.size(-1), O = weight.size(0);
    const int64_t rows = fast.size(-3);
    STD_TORCH_CHECK(I > 0 && O > 0 && rows > 0 && (mix || rows == 1),
                    "augmented_linear: an empty layer, or rows without a mixture");
    const int64_t limit = int64_t(1) << 31, tiles = LinearTile(false).tiles(O, I);
    STD_TORCH_CHECK(I < limit / 2 && O < limit / 2 && (G * L + 1) * ceil_div(std::max(I, O), 16) < limit &&
                        (G * rows + 1) * tiles < limit - G * L * ceil_div(I, 16),
                    "augmented_linear: a layer too large for the CUDA kernel");
    Layer layer{G, L, rows, nullptr, nullptr, nullptr, nullptr, 0, 0};
    layer.x = call.in(x, "x", {G, L, I});
    layer.weight = call.in(weight, "weight", {O, I});
    layer.mix = call.in(mix, "mix", {G, L, rows});
    layer.fast = call.rows(fast, "fast", {G, rows, O, I}, layer.task_stride, layer.row_stride);
    return layer;
}

// Large tiles where there are enough of them for a large device.
static bool is_large(const Layer &layer, int64_t width) {
    return layer.G * LinearTile(true).tiles(layer.L, width) >= 132;
}
static Build build_for(const Call &call, const char *source, int64_t I, int64_t O, bool large) {
    return call.build(source).set("MANN_I", I).set("MANN_O", O).set("MANN_LARGE", large);
}
// Bytes of shared memory for operands of so many tiles of rows, and for the sums of `sums` numbers at the end.
static int64_t shared_bytes(const Call &call, const LinearTile &tile, int row_tiles, int sums) {
    const int64_t b = kLinearDepth * (tile.columns() + 4), weights = std::max<int64_t>(7680 / b, 1);
    const int64_t operands = row_tiles * kLinearDepth * (tile.rows() + 4) + weights * (b + tile.rows() + 32);
    return std::max<int64_t>(operands, int64_t(16) * sums * kLinearThreads) * call.arith_bytes();
}

static std::tuple<Tensor, Tensor> augmented_linear_cuda(Tensor x, Tensor weight, Tensor fast, std::optional<Tensor> mix,
                                                        std::optional<Tensor> bias, int64_t activation, bool save) {
    Call call(x);
    const Layer layer = layer_of(call, x, weight, fast, mix);
    const int64_t G = layer.G, L = layer.L, I = x.size(-1), O = weight.size(0);
    const bool keep = save && activation != kIdentity, large = is_large(layer, O);
    Tensor y = call.empty(of_tasks(x.dim() == 3, {G, L, O})), slopes = call.empty({0}, call.arithmetic());
    if (keep) slopes = call.empty({2, G, L, O}, call.arithmetic());
    const LinearTile tile(large);
    const Build build = build_for(call, "augmented_linear.cu", I, O, large).set("MANN_ACTIVATION", activation);
    call.launch(build, "augmented_linear", {G * tile.tiles(L, O), kLinearThreads, 1, shared_bytes(call, tile, 1, 2)},
                LinearForward<void>{layer, call.in(bias, "bias", {O}), out(y), keep ? out(slopes) : nullptr});
    return {y, slopes};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> augmented_linear_backward_cuda(Tensor dy, Tensor x,
                                                                                         Tensor weight, Tensor fast,
                                                                                         std::optional<Tensor> mix,
                                                                                         Tensor slopes) {
    Call call(x);
    const Layer layer = layer_of(call, x, weight, fast, mix);
    const int64_t G = layer.G, L = layer.L, I = x.size(-1), O = weight.size(0), rows = layer.rows;
    const bool tasks = x.dim() == 3;
    Tensor dx = call.empty(of_tasks(tasks, {G, L, I})), dfast = call.empty(of_tasks(tasks, {G, rows, O, I}));
    Tensor dweight = call.empty({O, I}), dbias = call.empty({O});
    Tensor dmix = mix ? call.empty(of_tasks(tasks, {G, L, rows})) : call.empty({0});
    const bool large = is_large(layer, I);
    const LinearTile tile(large);
    const int64_t parts = ceil_div(I, tile.columns()), x_blocks = G * tile.tiles(L, I);
    const Build build = build_for(call, "augmented_linear_backward.cu", I, O, large);
    LinearBackward<void> args{
        layer, call.in(dy, "dy", {G, L, O}), nullptr, out(dx), out(dweight), out(dfast), out(dbias), nullptr, x_blocks};
    if (slopes.numel() > 0) args.slopes = call.in_arith(slopes, "slopes", {2, G, L, O});
    if (mix) args.dots = call.scratch(parts * G * L * rows);
    call.launch(build, "augmented_linear_backward",
                {x_blocks + (1 + G * rows) * tile.tiles(O, I), kLinearThreads, 1, shared_bytes(call, tile, 2, 1)},
                args);
    if (mix)
        call.launch(build, "augmented_linear_backward_mix",
                    {ceil_div(G * L * rows, kLinearThreads), kLinearThreads, 1, 0, 1, true},
                    LinearMix<void>{G * L * rows, parts, args.dots, out(dmix)});
    return {dx, dweight, dfast, dmix, dbias};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("augmented_linear", TORCH_BOX(&mann::cuda::augmented_linear_cuda));
    m.impl("augmented_linear_backward", TORCH_BOX(&mann::cuda::augmented_linear_backward_cuda));
}
