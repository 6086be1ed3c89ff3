// Entry points of generate_fast_weights.
#include "launch.h"

#include <cmath>

#include "generate_fast_weights.h"

namespace mann::cuda {

namespace {

// Blocks: one on each multiprocessor, as long as there are tiles of 16 coordinates.
int64_t blocks_of(const Call &call, int64_t count) {
    return std::min<int64_t>(call.on().multiprocessors, (count + 15) / 16);
}

int64_t hidden_of(const Tensor &grads, const Tensor &bias1) {
    STD_TORCH_CHECK(bias1.dim() == 1, "generate_fast_weights: wrong number of dimensions");
    STD_TORCH_CHECK(grads.numel() < int64_t(1) << 30, "the CUDA kernels take at most 2^30 coordinates");
    const int64_t D = bias1.size(0);
    STD_TORCH_CHECK(D > 0 && D <= 64, "the CUDA kernels take at most 64 hidden units (D), got ", D);
    return D;
}

GenerateWeights<void> weights_of(Call &call, int64_t D, const Tensor &weight1, const Tensor &bias1,
                                 const Tensor &weight2, const Tensor &bias2, const Tensor &weight3,
                                 const Tensor &bias3) {
    return {call.in(weight1, "weight1", {D, 2}), call.in(bias1, "bias1", {D}),
            call.in(weight2, "weight2", {D, D}), call.in(bias2, "bias2", {D}),
            call.in(weight3, "weight3", {1, D}), call.in(bias3, "bias3", {1})};
}

Build build_of(const Call &call, int64_t D) { return call.build("generate_fast_weights.cu").set("MANN_D", D); }

Tensor generate_fast_weights(Tensor grads, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor weight3,
                             Tensor bias3, double p) {
    Call call(grads);
    const int64_t D = hidden_of(grads, bias1), count = grads.numel();
    GenerateForward<void> args{};
    args.count = int(count), args.p = p, args.scale = std::exp(p);
    args.grads = call.in(grads, "grads", grads.sizes());
    args.weights = weights_of(call, D, weight1, bias1, weight2, bias2, weight3, bias3);
    Tensor fast = call.empty(grads.sizes());
    args.fast = out(fast);
    const GenerateSizes sizes{int(D)};
    call.launch(
        build_of(call, D), "generate_fast_weights_forward",
        {blocks_of(call, count), sizes.forward_threads, 1, (sizes.fragments + sizes.first) * call.arith_bytes()}, args);
    return fast;
}

Tensor generate_fast_weights_sides(Tensor grads, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, double p) {
    Call call(grads);
    STD_TORCH_CHECK(bias1.dim() == 1, "generate_fast_weights: wrong number of dimensions");
    const int64_t hidden = bias1.size(0), D = hidden > 0 ? hidden_of(grads, bias1) : 1, count = grads.numel();
    GenerateSides<void> args{};
    args.count = int(count), args.hidden = int(hidden), args.p = p, args.scale = std::exp(p);
    args.grads = call.in(grads, "grads", grads.sizes());
    args.weights.weight1 = call.in(weight1, "weight1", {hidden, 2});
    args.weights.bias1 = call.in(bias1, "bias1", {hidden});
    args.weights.weight2 = call.in(weight2, "weight2", {hidden, hidden});
    args.weights.bias2 = call.in(bias2, "bias2", {hidden});
    Tensor sides = call.empty({2 + 2 * hidden, count}, ScalarType::Byte);
    args.sides = out<uint8_t>(sides);
    const GenerateSizes sizes{int(D)};
    call.launch(
        build_of(call, D), "generate_fast_weights_sides",
        {blocks_of(call, count), sizes.forward_threads, 1, (sizes.fragments + sizes.first) * call.arith_bytes()}, args);
    return sides;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
generate_fast_weights_backward(Tensor dfast, Tensor grads, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,
                               Tensor weight3, Tensor bias3, double p) {
    Call call(grads);
    const int64_t D = hidden_of(grads, bias1), count = grads.numel();
    const GenerateSizes sizes{int(D)};
    const int64_t beside = 2 * sizes.fragments + sizes.first, blocks = blocks_of(call, count);
    const int64_t room = call.on().shared_bytes / call.arith_bytes() - beside;
    const int64_t warps = std::min<int64_t>(sizes.backward_threads / 32, room / sizes.stage);
    STD_TORCH_CHECK(room > 0 && warps > 0, "the CUDA kernel of generate_fast_weights: ", D,
                    " hidden units (D) need more shared memory than this device has");
    Tensor dgrads = call.empty(grads.sizes()), dweight1 = call.empty({D, 2}), dbias1 = call.empty({D});
    Tensor dweight2 = call.empty({D, D}), dbias2 = call.empty({D}), dweight3 = call.empty({1, D});
    Tensor dbias3 = call.empty({1});
    GenerateBackward<void> args{};
    args.count = int(count), args.p = p, args.scale = std::exp(p);
    args.dfast = call.in(dfast, "dfast", grads.sizes()), args.grads = call.in(grads, "grads", grads.sizes());
    args.weights = weights_of(call, D, weight1, bias1, weight2, bias2, weight3, bias3);
    GenerateTotal<void> total{};
    total.parts = sizes.sums_of_warps ? blocks * warps : blocks;
    args.dgrads = out(dgrads), args.sums = call.scratch(total.parts * sizes.sums);
    const Build build = build_of(call, D);
    call.launch(build, "generate_fast_weights_backward",
                {blocks, int(32 * warps), 1, (beside + warps * sizes.stage) * call.arith_bytes()}, args);
    total.sums = args.sums;
    total.dweight1 = out(dweight1), total.dbias1 = out(dbias1), total.dweight2 = out(dweight2);
    total.dbias2 = out(dbias2), total.dweight3 = out(dweight3), total.dbias3 = out(dbias3);
    call.launch(build, "generate_fast_weights_total", {(sizes.sums + 31) / 32, 256, 1, 0, 1, true}, total);
    return {dgrads, dweight1, dbias1, dweight2, dbias2, dweight3, dbias3};
}

} // namespace

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("generate_fast_weights", TORCH_BOX(&mann::cuda::generate_fast_weights));
    m.impl("generate_fast_weights_sides", TORCH_BOX(&mann::cuda::generate_fast_weights_sides));
    m.impl("generate_fast_weights_backward", TORCH_BOX(&mann::cuda::generate_fast_weights_backward));
}
