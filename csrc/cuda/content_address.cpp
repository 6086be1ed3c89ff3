// content_address: read weights by cosine similarity, and their backward, the slots of an example split over blocks.
#include "memory_launch.h"

namespace mann::cuda {

static MemoryOptions address_options(const Tensor &memory, const Tensor &key, bool beta) {
    STD_TORCH_CHECK(memory.dim() == 3 && key.dim() == 3, "content_address: memory and key must have three dimensions");
    check_offsets(memory.size(1), memory.size(2), key.size(1));
    return {memory.size(2), key.size(1), beta, false, false};
}

static Tensor content_address_cuda(Tensor memory, Tensor key, std::optional<Tensor> beta, double eps) {
    Call call(memory);
    const MemoryOptions o = address_options(memory, key, beta.has_value());
    const int64_t B = memory.size(0), N = memory.size(1), W = o.W, R = o.R;
    Tensor read_weights = call.empty({B, R, N});
    MemoryWrite<void> write{};
    write.before.memory = call.in(memory, "memory", {B, N, W});
    write.head.key = call.in(key, "key", {B, R, W}), write.head.beta = call.in(beta, "beta", {B, R});
    const MemoryPlan plan = memory_plan(call, B, N, W, R, kMostForward, {write.before.memory});
    write.sizes = memory_sizes(plan, B, N, 1, 1), write.eps = eps;
    write.logits = call.scratch(B * R * N), write.found = call.scratch(B * plan.parts() * forward_part(o));
    MemoryUse<void> use{};
    use.sizes = write.sizes, use.logits = write.logits, use.found = write.found;
    use.choosers = plan.choosers, use.chooser_slots = plan.chooser_slots, use.weights = out(read_weights);
    launch_write(call, memory_build(call, "memory_write.cu", plan, o), write, false);
    launch_use(call, use_build(call, o), use);
    return read_weights;
}

// Without a strength there is no dbeta: it is not initialised.
static std::tuple<Tensor, Tensor, Tensor> content_address_backward_cuda(Tensor dread_weights, Tensor memory, Tensor key,
                                                                        std::optional<Tensor> beta, Tensor read_weights,
                                                                        double eps) {
    Call call(memory);
    const MemoryOptions o = address_options(memory, key, beta.has_value());
    const int64_t B = memory.size(0), N = memory.size(1), W = o.W, R = o.R;
    Tensor dmemory = call.empty({B, N, W}), dkey = call.empty({B, R, W}), dbeta = call.empty({B, R});
    MemoryBackward<void> back{};
    back.before.memory = call.in(memory, "memory", {B, N, W});
    back.head.key = call.in(key, "key", {B, R, W}), back.head.beta = call.in(beta, "beta", {B, R});
    const MemoryPlan plan = memory_plan(call, B, N, W, R, kMostBackward, {back.before.memory});
    back.sizes = memory_sizes(plan, B, N, 1, 1), back.eps = eps;
    back.weights_in = call.in(read_weights, "read_weights", {B, R, N});
    back.dweights1 = call.in(dread_weights, "dread_weights", {B, R, N});
    back.dmemory_out = out(dmemory), back.found = call.scratch(B * plan.parts() * backward_part(o));
    MemoryUse<void> use{};
    use.sizes = back.sizes, use.choosers = plan.choosers, use.chooser_slots = plan.chooser_slots;
    use.weights_in = back.weights_in, use.dweights = back.dweights1;
    use.means = call.scratch(B * plan.choosers * R);
    back.first_means = use.means, back.choosers = plan.choosers;
    MemorySum<void> sum{};
    sum.sizes = back.sizes, sum.head = back.head, sum.found = back.found;
    sum.dkey = out(dkey), sum.dbeta = out(dbeta);
    const Build backward = memory_build(call, "memory_backward.cu", plan, o);
    launch_use(call, use_build(call, o), use, 1, false);
    launch_backward(call, backward, back);
    launch_sum(call, backward, o, sum);
    return {dmemory, dkey, dbeta};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("content_address", TORCH_BOX(&mann::cuda::content_address_cuda));
    m.impl("content_address_backward", TORCH_BOX(&mann::cuda::content_address_backward_cuda));
}
