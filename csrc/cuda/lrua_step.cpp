// lrua_step: one step of the memory, and its backward: lrua_sequence's on clusters, or the slots of an example split
// over blocks.
#include "grid_sequence.h"

namespace mann::cuda {

static MemoryOptions step_options(const Tensor &memory, const Tensor &key, bool beta, bool add) {
    STD_TORCH_CHECK(memory.dim() == 3 && key.dim() == 3, "lrua_step: memory and key must have three dimensions");
    check_offsets(memory.size(1), memory.size(2), key.size(1));
    STD_TORCH_CHECK(key.size(1) <= memory.size(1), "lrua_step: more heads than slots");
    return {memory.size(2), key.size(1), beta, add, true};
}
static MemoryHead<void> step_head(Call &call, const Tensor &key, const Tensor &gate, const std::optional<Tensor> &beta,
                                  const std::optional<Tensor> &add, int64_t B, const MemoryOptions &o) {
    MemoryHead<void> head{};
    head.key = call.in(key, "key", {B, o.R, o.W}), head.gate = call.in(gate, "gate", {B, o.R});
    head.beta = call.in(beta, "beta", {B, o.R}), head.add = call.in(add, "add", {B, o.R, o.W});
    return head;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_step_cuda(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
               std::optional<Tensor> add, bool shared, bool erase_all, double decay, double eps) {
    Call call(memory);
    const MemoryOptions o = step_options(memory, key, beta.has_value(), add.has_value());
    const int64_t B = memory.size(0), N = memory.size(1), W = o.W, R = o.R;
    const bool narrow = call.dtype() != call.arithmetic();
    Tensor reads = call.empty({B, R, W}), memory1 = call.empty({B, N, W}), usage1 = call.empty({B, N});
    Tensor read_weights1 = call.empty({B, R, N}), least_used = call.empty({B, R}, ScalarType::Int);
    GridForward on_clusters{};
    on_clusters.memory = call.in(memory, "memory", {B, N, W}), on_clusters.usage = call.in(usage, "usage", {B, N});
    on_clusters.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    on_clusters.head = step_head(call, key, gate, beta, add, B, o), on_clusters.reads = out(reads);
    on_clusters.memory1 = out(memory1), on_clusters.usage1 = out(usage1);
    on_clusters.read_weights1 = out(read_weights1), on_clusters.saved_least_used = out<int32_t>(least_used);
    if (lrua_on_clusters(call, {1, B, N, 1, o, shared, erase_all, decay, eps, nullptr}, on_clusters))
        return {reads, memory1, usage1, read_weights1, least_used};
    MemoryWrite<void> write{};
    write.before.memory = on_clusters.memory, write.before.weights = on_clusters.read_weights;
    write.head = on_clusters.head;
    const MemoryPlan plan = memory_plan(call, B, N, W, R, kMostForward, {write.before.memory});
    write.sizes = memory_sizes(plan, B, N, 1, 1);
    write.eps = eps, write.decay = decay, write.shared = shared, write.erase_all = erase_all;
    write.memory1 = out(memory1);
    write.logits = call.scratch(B * R * N), write.found = call.scratch(B * plan.parts() * forward_part(o));
    write.usage = on_clusters.usage, write.usage1 = narrow ? call.scratch(B * N) : out(usage1);
    write.least_used = out<int32_t>(least_used);
    MemoryUse<void> choose{};
    choose.sizes = write.sizes, choose.choosers = plan.choosers, choose.chooser_slots = plan.chooser_slots;
    choose.usage = write.usage, choose.candidate_usage = call.scratch(B * plan.choosers * R);
    const Tensor slots = call.empty({B, plan.choosers, R}, ScalarType::Int);
    choose.candidate_slots = out<int32_t>(slots);
    write.candidate_usage = choose.candidate_usage, write.candidate_slots = choose.candidate_slots;
    write.choosers = plan.choosers;
    MemoryUse<void> use{};
    use.sizes = write.sizes, use.choosers = plan.choosers, use.chooser_slots = plan.chooser_slots;
    use.readers = plan.readers, use.logits = write.logits, use.found = write.found;
    use.usage1 = write.usage1, use.usage_out = narrow ? out(usage1) : nullptr;
    use.weights = out(read_weights1), use.reads = out(reads), use.reads_row = R * W;
    const Build of_use = use_build(call, o);
    launch_use(call, of_use, choose, 1, false);
    launch_write(call, memory_build(call, "memory_write.cu", plan, o), write);
    launch_use(call, of_use, use);
    return {reads, memory1, usage1, read_weights1, least_used};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_step_backward_cuda(Tensor dreads, std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1,
                        Tensor memory, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                        std::optional<Tensor> add, Tensor least_used, bool shared, bool erase_all, double eps) {
    Call call(memory);
    const MemoryOptions o = step_options(memory, key, beta.has_value(), add.has_value());
    const int64_t B = memory.size(0), N = memory.size(1), W = o.W, R = o.R;
    Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N});
    Tensor dkey = call.empty({B, R, W}), dgate = call.empty({B, R});
    Tensor dbeta = beta ? call.empty({B, R}) : call.empty({0}), dadd = add ? call.empty({B, R, W}) : call.empty({0});
    GridBackward on_clusters{};
    on_clusters.memory = call.in(memory, "memory", {B, N, W});
    on_clusters.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    on_clusters.head = step_head(call, key, gate, beta, add, B, o);
    on_clusters.dreads = call.in(dreads, "dreads", {B, R, W});
    on_clusters.dmemory1 = call.in(dmemory1, "dmemory1", {B, N, W});
    on_clusters.dread_weights1 = call.in(dread_weights1, "dread_weights1", {B, R, N});
    on_clusters.saved_least_used = call.in_int32(least_used, "least_used", {B, R});
    on_clusters.dmemory = out(dmemory), on_clusters.dread_weights = out(dread_weights);
    on_clusters.dkey = out(dkey), on_clusters.dgate = out(dgate);
    on_clusters.dbeta = out(dbeta), on_clusters.dadd = out(dadd);
    if (lrua_on_clusters(call, {1, B, N, 1, o, shared, erase_all, 0, eps, nullptr}, on_clusters))
        return {dmemory, dread_weights, dkey, dgate, dbeta, dadd};
    MemoryBackward<void> back{};
    back.before.memory = on_clusters.memory, back.before.weights = on_clusters.read_weights;
    back.head = on_clusters.head, back.dmemory1 = on_clusters.dmemory1;
    const MemoryPlan forward_plan = memory_plan(call, B, N, W, R, kMostForward, {back.before.memory});
    const MemoryPlan plan = memory_plan(call, B, N, W, R, kMostBackward, {back.before.memory, back.dmemory1});
    // The step once more, for its weights and reads.
    MemoryWrite<void> write{};
    write.sizes = memory_sizes(forward_plan, B, N, 1, 1), write.head = back.head, write.before = back.before;
    write.eps = eps, write.shared = shared, write.erase_all = erase_all;
    write.logits = call.scratch(B * R * N), write.found = call.scratch(B * forward_plan.parts() * forward_part(o));
    // only read: there are no candidates
    write.least_used = const_cast<int32_t *>(on_clusters.saved_least_used);
    MemoryUse<void> use{};
    use.sizes = write.sizes, use.choosers = plan.choosers, use.chooser_slots = plan.chooser_slots;
    use.readers = plan.readers, use.logits = write.logits, use.found = write.found;
    use.totals = call.scratch(B * R * 2), use.reads_copy = call.scratch(B * R * W);
    use.dweights = on_clusters.dread_weights1;
    if (use.dweights) use.means = call.scratch(B * plan.choosers * R);
    back.sizes = memory_sizes(plan, B, N, 1, 1), back.eps = eps, back.shared = shared, back.erase_all = erase_all;
    back.dmemory_out = out(dmemory), back.logits = write.logits, back.totals = use.totals;
    back.dweights1 = use.dweights, back.dweights_out = out(dread_weights);
    back.dreads = on_clusters.dreads, back.dreads_row = R * W;
    back.reads = use.reads_copy, back.first_means = use.means, back.choosers = plan.choosers;
    back.found = call.scratch(B * plan.parts() * backward_part(o)), back.least_used = write.least_used;
    MemorySum<void> sum{};
    sum.sizes = back.sizes, sum.head = back.head, sum.found = back.found;
    sum.dkey = out(dkey), sum.dgate = out(dgate), sum.dbeta = out(dbeta), sum.dadd = out(dadd);
    const Build backward = memory_build(call, "memory_backward.cu", plan, o);
    launch_write(call, memory_build(call, "memory_write.cu", forward_plan, o), write, false);
    launch_use(call, use_build(call, o), use);
    launch_backward(call, backward, back);
    launch_sum(call, backward, o, sum);
    return {dmemory, dread_weights, dkey, dgate, dbeta, dadd};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("lrua_step", TORCH_BOX(&mann::cuda::lrua_step_cuda));
    m.impl("lrua_step_backward", TORCH_BOX(&mann::cuda::lrua_step_backward_cuda));
}
