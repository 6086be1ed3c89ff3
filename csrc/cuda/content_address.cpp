// content_address: read weights by cosine similarity, and their backward: an example to a cluster, or its slots split
// over the device.
#include "rows_launch.h" // first: what the structs of arguments need

#include "content_address.h"

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
    AddressForward<void> a{eps, call.in(memory, "memory", {B, N, W}), call.in(key, "key", {B, R, W}),
                           call.in(beta, "beta", {B, R}), out(read_weights)};
    const GridSizes s{1, B, N, 1, o, false, false, 0, eps, nullptr};
    if (const MannPlan on_clusters = rows_plan(call, s); on_clusters.blocks > 0) {
        launch_rows(call, "content_address.cu", "content_address_forward", s, on_clusters, on_clusters.forward_bytes,
                    a);
        return read_weights;
    }
    MemoryWrite<void> write{};
    write.before.memory = a.memory, write.head.key = a.key, write.head.beta = a.beta;
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
    AddressBackward<void> a{eps,
                            call.in(dread_weights, "dread_weights", {B, R, N}),
                            call.in(memory, "memory", {B, N, W}),
                            call.in(key, "key", {B, R, W}),
                            call.in(beta, "beta", {B, R}),
                            call.in(read_weights, "read_weights", {B, R, N}),
                            out(dmemory),
                            out(dkey),
                            out(dbeta)};
    const GridSizes s{1, B, N, 1, o, false, false, 0, eps, nullptr};
    if (const MannPlan on_clusters = rows_plan(call, s); on_clusters.blocks > 0) {
        launch_rows(call, "content_address.cu", "content_address_backward", s, on_clusters, on_clusters.backward_bytes,
                    a);
        return {dmemory, dkey, dbeta};
    }
    MemoryBackward<void> back{};
    back.before.memory = a.memory, back.head.key = a.key, back.head.beta = a.beta;
    const MemoryPlan plan = memory_plan(call, B, N, W, R, kMostBackward, {back.before.memory});
    back.sizes = memory_sizes(plan, B, N, 1, 1), back.eps = eps;
    back.weights_in = a.read_weights, back.dweights1 = a.dread_weights;
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
