// Entry points of summarize_gradients.
#include "launch.h"

#include <cmath>

#include "summarize_gradients.h"

namespace mann::cuda {

// Blocks: one on each multiprocessor, as long as there are tiles of 16 coordinates.
static int64_t blocks_of(const Call &call, int64_t count) {
    return std::min<int64_t>(call.on().multiprocessors, (count + 15) / 16);
}

// The backward pass: how many warps a block has, and whether the states of all steps are in shared memory. That is
// where they belong; for very many steps they go to the second-level cache.
struct SummarizePlan {
    SummarizeSizes sizes;
    bool states_in_shared;
    int64_t warps, shared_bytes;

    SummarizePlan(const Call &call, int64_t D, int64_t steps) : sizes(int(D)) {
        const int64_t most = sizes.backward_threads / 32;
        const int64_t numbers = call.on().shared_bytes / call.arith_bytes() - sizes.both;
        const int64_t of_warp = sizes.stage + steps * sizes.state;
        states_in_shared = numbers / of_warp >= most;
        const int64_t each = states_in_shared ? of_warp : sizes.stage;
        warps = std::min(most, numbers / each);
        STD_TORCH_CHECK(numbers > 0 && warps > 0, "the CUDA kernel of summarize_gradients: ", D,
                        " hidden units (D) need more shared memory than this device has");
        shared_bytes = (sizes.both + warps * each) * call.arith_bytes();
    }
    Build build(const Call &call, int64_t D) const {
        return call.build("summarize_gradients.cu").set("MANN_D", D).set("MANN_STATES_IN_SHARED", states_in_shared);
    }
};

static int64_t hidden_of(const Tensor &grads, const Tensor &weight_hh) {
    STD_TORCH_CHECK(grads.dim() > 0 && grads.size(0) > 0 && weight_hh.dim() == 2,
                    "summarize_gradients: wrong number of dimensions");
    const int64_t D = weight_hh.size(1);
    STD_TORCH_CHECK(grads.size(0) < int64_t(1) << 31 && grads.numel() / grads.size(0) < int64_t(1) << 30,
                    "the CUDA kernels take at most 2^30 coordinates");
    STD_TORCH_CHECK(D > 0 && D <= 64, "the CUDA kernels take at most 64 hidden units (D), got ", D);
    return D;
}

static SummarizeWeights<void> weights_of(Call &call, int64_t D, const Tensor &weight_ih, const Tensor &weight_hh,
                                         const Tensor &bias, const Tensor &weight_out, const Tensor &bias_out) {
    return {call.in(weight_ih, "weight_ih", {4 * D, 2}), call.in(weight_hh, "weight_hh", {4 * D, D}),
            call.in(bias, "bias", {4 * D}), call.in(weight_out, "weight_out", {1, D}),
            call.in(bias_out, "bias_out", {1})};
}

static Tensor summarize_gradients(Tensor grads, Tensor weight_ih, Tensor weight_hh, Tensor bias, Tensor weight_out,
                                  Tensor bias_out, double p) {
    Call call(grads);
    const int64_t D = hidden_of(grads, weight_hh), steps = grads.size(0), count = grads.numel() / steps;
    SummarizeForward<void> args{};
    args.steps = int(steps), args.count = int(count), args.p = p, args.scale = std::exp(p);
    args.grads = call.in(grads, "grads", grads.sizes());
    args.weights = weights_of(call, D, weight_ih, weight_hh, bias, weight_out, bias_out);
    Tensor fast = call.empty(rest(grads.sizes()));
    args.fast = out(fast);
    const SummarizePlan plan(call, D, steps);
    const Grid grid{blocks_of(call, count), plan.sizes.forward_threads, 1, plan.sizes.fragments * call.arith_bytes()};
    call.launch(plan.build(call, D), "summarize_gradients_forward", grid, args);
    return fast;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
summarize_gradients_backward(Tensor dfast, Tensor grads, Tensor weight_ih, Tensor weight_hh, Tensor bias,
                             Tensor weight_out, Tensor bias_out, double p) {
    Call call(grads);
    const int64_t D = hidden_of(grads, weight_hh), steps = grads.size(0), count = grads.numel() / steps;
    const SummarizePlan plan(call, D, steps);
    const Build build = plan.build(call, D);
    const int64_t blocks = blocks_of(call, count), warps = blocks * plan.warps;
    const int64_t parts = plan.sizes.sums_of_warps ? warps : blocks;
    Tensor dgrads = call.empty(grads.sizes()), dweight_ih = call.empty({4 * D, 2});
    Tensor dweight_hh = call.empty({4 * D, D}), dbias = call.empty({4 * D}), dweight_out = call.empty({1, D});
    Tensor dbias_out = call.empty({1});
    SummarizeBackward<void> args{};
    args.steps = int(steps), args.count = int(count), args.p = p, args.scale = std::exp(p);
    args.dfast = call.in(dfast, "dfast", rest(grads.sizes())), args.grads = call.in(grads, "grads", grads.sizes());
    args.weights = weights_of(call, D, weight_ih, weight_hh, bias, weight_out, bias_out);
    args.dgrads = out(dgrads), args.sums = call.scratch(parts * plan.sizes.sums);
    if (!plan.states_in_shared) args.states = call.scratch(warps * steps * plan.sizes.state);
    call.launch(build, "summarize_gradients_backward", {blocks, int(32 * plan.warps), 1, plan.shared_bytes}, args);
    SummarizeTotal<void> total{};
    total.parts = parts, total.sums = args.sums;
    total.dweight_ih = out(dweight_ih), total.dweight_hh = out(dweight_hh), total.dbias = out(dbias);
    total.dweight_out = out(dweight_out), total.dbias_out = out(dbias_out);
    call.launch(build, "summarize_gradients_total", {(plan.sizes.sums + 31) / 32, 256, 1, 0, 1, true}, total);
    return {dgrads, dweight_ih, dweight_hh, dbias, dweight_out, dbias_out};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("summarize_gradients", TORCH_BOX(&mann::cuda::summarize_gradients));
    m.impl("summarize_gradients_backward", TORCH_BOX(&mann::cuda::summarize_gradients_backward));
}
