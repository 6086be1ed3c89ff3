// A convolution with a slow and a fast weight, and pooling: augmented_conv2d and its backward.
#include "launch.h"

#include "augmented_conv2d.h"

namespace mann::cuda {

using Layer = AugmentedLayer<void>;

// The weights of so many numbers are laid out at once, for whole tasks: 32 MB stay in the second-level cache.
constexpr int64_t kPackedNumbers = int64_t(8) << 20;
// Blocks that keep a large device busy.
constexpr int64_t kManyBlocks = 396;

static const void *shift(const void *data, int64_t bytes) {
    return data ? static_cast<const char *>(data) + bytes : nullptr;
}
static void *shift(void *data, int64_t bytes) { return data ? static_cast<char *>(data) + bytes : nullptr; }

// A call and what both passes need of it.
struct ConvCall {
    Call call;
    ConvShape shape;
    Layer layer;
    int64_t padding, bytes, arith; // of a number that is stored, and computed with
    bool tensor;                   // cores are used

    ConvCall(const Tensor &x, const Tensor &weight, const Tensor &fast, const std::optional<Tensor> &mix, int64_t pad,
             bool pool)
        : call(x), padding(pad) {
        STD_TORCH_CHECK((x.dim() == 4 || x.dim() == 5) && weight.dim() == 4 && fast.dim() == x.dim() + 1,
                        "augmented_conv2d: wrong dimensions");
        const int64_t G = x.dim() == 5 ? x.size(0) : 1, L = x.size(-4), C = x.size(-3), H = x.size(-2), W = x.size(-1);
        const int64_t O = weight.size(0), k = weight.size(2), rows = fast.size(-5), limit = int64_t(1) << 28;
        STD_TORCH_CHECK(C > 0 && O > 0 && k > 0 && pad >= 0 && H + 2 * pad >= k && W + 2 * pad >= k,
                        "augmented_conv2d: nothing to convolve");
        STD_TORCH_CHECK(rows > 0 && (mix || rows == 1), "augmented_conv2d: rows without a mixture");
        STD_TORCH_CHECK((H + 2 * pad) * (W + 2 * pad) < limit / std::max(C, O) && C * k * k < limit / O &&
                            G * L < limit && G * rows < limit,
                        "augmented_conv2d: a layer too large for the CUDA kernel");
        arith = call.arith_bytes(), bytes = call.dtype() == ScalarType::BFloat16 ? 2 : arith;
        const int64_t room = call.on().shared_bytes / arith - ConvPacking::kRows * ConvPacking::kTogether;
        shape = {int(C), int(H), int(W), int(O), int(k), int(pad), pool, int(room)};
        layer = {G, L, rows, nullptr, nullptr, nullptr, nullptr, 0, 0};
        layer.x = call.in(x, "x", {G, L, C, H, W});
        layer.weight = call.in(weight, "weight", {O, C, k, k});
        layer.mix = call.in(mix, "mix", {G, L, rows});
        layer.fast = call.rows(fast, "fast", {G, rows, O, C, k, k}, layer.task_stride, layer.row_stride);
        tensor = C >= 8 && O >= 8 && (bytes == 2 || (bytes == 4 && allows_tf32())) &&
                 std::max(forward_tiling(shape, true).shared(), backward_tiling(shape, true).shared()) <= room;
    }

    Build build(const char *source) const {
        Build build = call.build(source);
        build.set("MANN_C", shape.C).set("MANN_H", shape.H).set("MANN_W", shape.W).set("MANN_O", shape.O);
        return build.set("MANN_TAPS_SIDE", shape.k)
            .set("MANN_PADDING", padding)
            .set("MANN_POOL", shape.pool)
            .set("MANN_ROOM", shape.room)
            .set("MANN_TENSOR", tensor);
    }
    int64_t weight_numbers() const { return int64_t(shape.O) * shape.K(); }
    int64_t image_numbers() const { return int64_t(shape.C) * shape.H * shape.W; }
    int64_t output_numbers() const { return int64_t(shape.O) * shape.pooled(); }
    // Fast weights that are mixed for, or stand for, the examples of a task.
    int64_t weights_of_task() const { return layer.mix ? layer.L : 1; }
    int64_t per_weight() const { return layer.mix ? 1 : layer.L; }
    // Tasks that are taken at once.
    int64_t tasks_at_once(int64_t packed) const {
        return std::clamp<int64_t>(kPackedNumbers / std::max<int64_t>(weights_of_task() * packed, 1), 1,
                                   std::max<int64_t>(layer.G, 1));
    }
    // Tasks g0 to g0 + count alone.
    Layer part(int64_t g0, int64_t count) const {
        Layer some = layer;
        some.G = count;
        some.x = shift(layer.x, g0 * layer.L * image_numbers() * bytes);
        some.mix = shift(layer.mix, g0 * layer.L * layer.rows * bytes);
        some.fast = shift(layer.fast, g0 * layer.task_stride * bytes);
        return some;
    }
    int64_t checked(int64_t numbers) const {
        STD_TORCH_CHECK(numbers <= shape.room, "augmented_conv2d: a kernel or an image too large for shared memory");
        return numbers * arith;
    }
    // Blocks that lay out the weights of these tasks: tiles, and batches of examples with the slow weight's.
    int64_t pack_tiles(bool inner_is_o, int64_t padded) const {
        const ConvPacking p(shape, inner_is_o);
        return ceil_div(inner_is_o ? padded : shape.O, p.tile_o) * ceil_div(inner_is_o ? shape.C : padded, p.tile_c);
    }
    ConvPack<void> pack(const Layer &some, void *packed) const {
        return {some, packed, some.G * ceil_div(weights_of_task(), ConvPacking::kTogether) + 1};
    }
};

static std::tuple<Tensor, Tensor, Tensor> augmented_conv2d_cuda(Tensor x, Tensor weight, Tensor fast,
                                                                std::optional<Tensor> mix, std::optional<Tensor> bias,
                                                                int64_t padding, int64_t activation, bool pool,
                                                                bool save) {
    ConvCall of(x, weight, fast, mix, padding, pool);
    const ConvShape &s = of.shape;
    const int64_t G = of.layer.G, L = of.layer.L, P = s.pooled(), O = s.O;
    Tensor y = of.call.empty(of_tasks(x.dim() == 5, {G, L, O, s.pooled_height(), s.pooled_width()}));
    Tensor codes = of.call.empty({0}, ScalarType::Byte), slopes = of.call.empty({0}, of.call.arithmetic());
    if (save) codes = of.call.empty({G, L, P, O}, ScalarType::Byte);
    const bool keep = save && (activation == kGelu || activation == kTanh);
    if (keep) slopes = of.call.empty({2, G, L, P, O}, of.call.arithmetic());

    const ConvTiling tiling = forward_tiling(s, of.tensor);
    const int64_t padded = 4 * tiling.padded_groups(), packed = padded * s.K(), tasks = of.tasks_at_once(packed);
    const Build build = of.build("augmented_conv2d.cu").set("MANN_ACTIVATION", activation);
    void *scratch = of.call.scratch((1 + tasks * of.weights_of_task()) * packed);
    const void *bias_data = of.call.in(bias, "bias", {O});
    for (int64_t g0 = 0; g0 < G && L > 0; g0 += tasks) {
        const int64_t count = std::min(tasks, G - g0), outputs = g0 * L * of.output_numbers();
        const ConvPack<void> pack = of.pack(of.part(g0, count), scratch);
        of.call.launch(
            build, "augmented_conv2d_pack",
            {of.pack_tiles(true, padded), kPackThreads, 1, of.checked(ConvPacking(s, true).shared(s)), pack.batches},
            pack);
        of.call.launch(build, "augmented_conv2d",
                       {count * L, tiling.threads(), 1, of.checked(tiling.shared()),
                        tiling.tiles.count() * tiling.group_tiles(), true},
                       ConvForward<void>{of.per_weight(), pack.layer.x, scratch, bias_data,
                                         shift(out(y), outputs * of.bytes),
                                         save ? out<uint8_t>(codes) + outputs : nullptr,
                                         keep ? shift(out(slopes), outputs * of.arith) : nullptr, G * L * P * O});
    }
    return {y, codes, slopes};
}

// Scratch memory of the backward pass, and how the gradient of the weights is shared out.
struct ConvBackward {
    ConvCall &of;
    const ConvTiling tiling;
    const ConvGradTiling grad;
    int64_t padded, tasks;           // numbers beside each other in a weight as a convolution reads it; tasks at once
    bool own;                        // every example has a fast weight of its own
    int64_t group;                   // examples of a block
    void *packed, *fast;             // weights, and gradients of fast ones
    void *slow, *bias, *dots;        // parts of sums
    int64_t parts;                   // of dots
    int64_t first_bytes, last_bytes; // of shared memory

    ConvBackward(ConvCall &call, bool need_dx)
        : of(call), tiling(backward_tiling(of.shape, of.tensor)), grad(of.shape) {
        const ConvShape &s = of.shape;
        const int64_t G = of.layer.G, L = of.layer.L;
        padded = 8 * tiling.padded_groups();
        tasks = of.tasks_at_once(padded * s.O * s.taps());
        own = of.layer.mix != nullptr || L == 1;
        // so many that the blocks keep a device busy, of about the same size
        const int64_t examples = std::max<int64_t>(own ? tasks * L : L, 1), blocks = grad.tiles_c(s) * grad.tiles_o(s);
        group = std::clamp<int64_t>(tasks * L * blocks / kManyBlocks, 1, examples);
        group = ceil_div(examples, ceil_div(examples, group));
        packed = need_dx ? of.call.scratch((1 + tasks * of.weights_of_task()) * padded * s.O * s.taps()) : nullptr;
        fast = of.call.scratch((own ? tasks * L : tasks * groups_of(L)) * of.weight_numbers());
        const int64_t sums = ceil_div(G, tasks) * (own ? groups_of(tasks * L) : tasks * groups_of(L));
        slow = of.call.scratch(sums * of.weight_numbers()), bias = of.call.scratch(sums * s.O);
        const ConvRowsTiling of_rows(s, tiling.threads());
        parts = of_rows.parts;
        dots = of.layer.mix ? of.call.scratch(parts * G * L * of.layer.rows) : nullptr;
        first_bytes = of.checked(std::max(grad.shared(), need_dx ? ConvPacking(s, false).shared(s) : 0));
        last_bytes = of.checked(std::max(need_dx ? tiling.shared() : 0, of_rows.shared()));
    }
    int64_t groups_of(int64_t examples) const { return ceil_div(examples, group); }

    // Of some tasks from g0 on, whose slow weight has `done` parts so far; returns how many were added.
    int64_t run(const Build &build, const Layer &some, const ConvOutputGradient<void> &gradient, int64_t g0,
                int64_t done, void *dx, void *dfast) {
        const ConvShape &s = of.shape;
        const int64_t groups = own ? groups_of(some.G * some.L) : some.G * groups_of(some.L), arith = of.arith;
        const ConvPack<void> pack = of.pack(some, packed);
        const int64_t pack_blocks = dx ? pack.batches * of.pack_tiles(false, padded) : 0;
        ConvBackwardFirst<void> first{{gradient, own ? some.G * some.L : some.L, group, own, some.x,
                                       shift(slow, done * of.weight_numbers() * arith), fast,
                                       shift(bias, done * s.O * arith)},
                                      pack,
                                      groups * grad.tiles_c(s) * grad.tiles_o(s)};
        of.call.launch(build, "augmented_conv2d_backward_first",
                       {first.w_blocks + pack_blocks, ConvGradTiling::kThreads, 1, first_bytes}, first);
        const int64_t dots_of_task = some.L * some.rows, examples = some.G * some.L;
        ConvBackwardSecond<void> second{
            {gradient, of.per_weight(), packed, dx},
            {some, fast, dfast, shift(dots, g0 * dots_of_task * arith), of.layer.G * dots_of_task},
            examples,
            dx ? examples * tiling.tiles.count() * tiling.group_tiles() : 0};
        second.rows.layer.L = own ? some.L : groups_of(some.L);
        of.call.launch(build, "augmented_conv2d_backward_second",
                       {second.x_blocks + some.G * parts, tiling.threads(), 1, last_bytes, 1, true}, second);
        return groups;
    }
};

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
augmented_conv2d_backward_cuda(Tensor dy, Tensor x, Tensor weight, Tensor fast, std::optional<Tensor> mix, Tensor codes,
                               Tensor slopes, int64_t padding, bool pool, bool need_dx) {
    ConvCall of(x, weight, fast, mix, padding, pool);
    const ConvShape &s = of.shape;
    const int64_t G = of.layer.G, L = of.layer.L, P = s.pooled(), O = s.O, C = s.C, k = s.k, rows = of.layer.rows;
    const bool tasks = x.dim() == 5;
    Tensor dx = of.call.empty(need_dx ? of_tasks(tasks, {G, L, C, s.H, s.W}) : Sizes{0});
    Tensor dweight = of.call.empty({O, C, k, k}), dfast = of.call.empty(of_tasks(tasks, {G, rows, O, C, k, k}));
    Tensor dmix = of.call.empty(mix ? of_tasks(tasks, {G, L, rows}) : Sizes{0}), dbias = of.call.empty({O});
    ConvOutputGradient<void> all{of.call.in(dy, "dy", {G, L, O, s.pooled_height(), s.pooled_width()}), nullptr, nullptr,
                                 G * L * P * O};
    all.codes = static_cast<const uint8_t *>(of.call.in(codes, "codes", {G, L, P, O}, ScalarType::Byte));
    if (slopes.numel() > 0) all.slopes = of.call.in_arith(slopes, "slopes", {2, G, L, P, O});

    const Build build = of.build("augmented_conv2d_backward.cu").set("MANN_SLOPES", all.slopes != nullptr);
    ConvBackward plan(of, need_dx);
    int64_t done = 0;
    for (int64_t g0 = 0; g0 < G; g0 += plan.tasks) {
        const Layer some = of.part(g0, std::min(plan.tasks, G - g0));
        const int64_t outputs = g0 * L * of.output_numbers();
        const ConvOutputGradient<void> gradient{shift(all.dy, outputs * of.bytes), all.codes + outputs,
                                                shift(all.slopes, outputs * of.arith), all.side};
        done += plan.run(build, some, gradient, g0, done,
                         need_dx ? shift(out(dx), g0 * L * of.image_numbers() * of.bytes) : nullptr,
                         shift(out(dfast), g0 * rows * of.weight_numbers() * of.bytes));
    }
    const int64_t dots = mix ? G * L * rows : 0, blocks = ceil_div(of.weight_numbers() + O, kSumNumbers);
    of.call.launch(build, "augmented_conv2d_backward_sums",
                   {blocks + ceil_div(dots, kSumThreads / 32), kSumThreads, 1, 0, 1, true},
                   ConvBackwardSums<void>{done, dots, plan.parts, plan.slow, plan.bias, plan.dots, out(dweight),
                                          out(dbias), out(dmix)});
    return {dx, dweight, dfast, dmix, dbias};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("augmented_conv2d", TORCH_BOX(&mann::cuda::augmented_conv2d_cuda));
    m.impl("augmented_conv2d_backward", TORCH_BOX(&mann::cuda::augmented_conv2d_backward_cuda));
}
