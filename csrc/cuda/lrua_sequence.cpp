// lrua_sequence: the steps of the memory for keys that are known beforehand.
#include "rows_launch.h" // first: what the structs of arguments need

#include "lrua_sequence.h"

namespace mann::cuda {

static GridSizes lrua_sizes(Call &call, const Tensor &read_weights, const Tensor &key, bool beta, bool add,
                            const std::optional<Tensor> &lengths, bool shared, bool erase_all, double decay, double eps,
                            int64_t checkpoint_every) {
    STD_TORCH_CHECK(read_weights.dim() == 3 && key.dim() == 4, "lrua_sequence: wrong number of dimensions");
    STD_TORCH_CHECK(checkpoint_every > 0, "lrua_sequence: checkpoint_every must be positive");
    const int64_t B = read_weights.size(0), R = read_weights.size(1), N = read_weights.size(2), W = key.size(3);
    check_offsets(N, W, R);
    STD_TORCH_CHECK(R <= N, "lrua_sequence: more heads than slots");
    const int64_t *steps = call.in_int64(lengths, "lengths", {B});
    return {key.size(0), B, N, checkpoint_every, {W, R, beta, add, true}, shared, erase_all, decay, eps, steps};
}
static MemoryHead<void> lrua_head(Call &call, const GridSizes &s, const Tensor &key, const Tensor &gate,
                                  const std::optional<Tensor> &beta, const std::optional<Tensor> &add) {
    const int64_t T = s.T, B = s.B, R = s.memory.R, W = s.memory.W;
    MemoryHead<void> head{};
    head.key = call.in(key, "key", {T, B, R, W}), head.gate = call.in(gate, "gate", {T, B, R});
    head.beta = call.in(beta, "beta", {T, B, R}), head.add = call.in(add, "add", {T, B, R, W});
    return head;
}

bool lrua_on_clusters(Call &call, const GridSizes &s, const GridForward &a) {
    const MannPlan plan = rows_plan(call, s);
    if (plan.blocks == 0) return false;
    LruaForward<void> b{};
    b.steps = int(s.T), b.batch = int(s.B), b.checkpoint_every = int(std::min<int64_t>(s.checkpoint_every, 1 << 30));
    b.decay = s.decay, b.eps = s.eps, b.lengths = s.lengths;
    b.key = a.head.key, b.gate = a.head.gate, b.beta = a.head.beta, b.add = a.head.add;
    b.memory = a.memory, b.usage = a.usage, b.read_weights = a.read_weights;
    b.reads = a.reads, b.memory1 = a.memory1, b.usage1 = a.usage1, b.read_weights1 = a.read_weights1;
    b.saved_least_used = a.saved_least_used, b.saved_memory = a.saved_memory;
    b.saved_read_weights = a.saved_read_weights;
    launch_rows(call, "lrua_sequence_forward.cu", "lrua_sequence_forward", s, plan, plan.forward_bytes, b);
    return true;
}

bool lrua_on_clusters(Call &call, const GridSizes &s, const GridBackward &a) {
    const MannPlan plan = rows_plan(call, s);
    if (plan.blocks == 0) return false;
    const int64_t B = s.B, N = s.N, R = s.memory.R, W = s.memory.W, segment = std::min(s.T, s.checkpoint_every);
    LruaBackward<void> b{};
    b.steps = int(s.T), b.batch = int(B), b.checkpoint_every = int(std::min<int64_t>(s.checkpoint_every, 1 << 30));
    b.eps = s.eps, b.lengths = s.lengths;
    b.dreads = a.dreads, b.dmemory1 = a.dmemory1, b.dread_weights1 = a.dread_weights1;
    b.key = a.head.key, b.gate = a.head.gate, b.beta = a.head.beta, b.add = a.head.add;
    b.memory = a.memory, b.read_weights = a.read_weights, b.saved_least_used = a.saved_least_used;
    b.saved_memory = a.saved_memory, b.saved_read_weights = a.saved_read_weights;
    b.weights = call.scratch(segment * B * N * ((R + 3) / 4 * 4));
    b.overwritten = call.scratch(segment * B * R * W);
    b.restarts = call.scratch(segment / kRestartEvery * B * N * W);
    b.means = call.scratch(segment * B * plan.parts * R);
    b.dkey = a.dkey, b.dgate = a.dgate, b.dbeta = a.dbeta, b.dadd = a.dadd;
    b.dmemory = a.dmemory, b.dread_weights = a.dread_weights;
    launch_rows(call, "lrua_sequence_backward.cu", "lrua_sequence_backward", s, plan, plan.backward_bytes, b);
    return true;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_sequence_cuda(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate,
                   std::optional<Tensor> beta, std::optional<Tensor> add, std::optional<Tensor> lengths, bool shared,
                   bool erase_all, double decay, double eps, int64_t checkpoint_every, bool save) {
    Call call(memory);
    const GridSizes s = lrua_sizes(call, read_weights, key, beta.has_value(), add.has_value(), lengths, shared,
                                   erase_all, decay, eps, checkpoint_every);
    const int64_t T = s.T, B = s.B, N = s.N, R = s.memory.R, W = s.memory.W, kept = s.copies();
    const auto saved = [&](Sizes sizes, ScalarType dtype) {
        return save ? call.empty(sizes, dtype) : call.empty({0}, dtype);
    };
    const Tensor reads = call.empty({T, B, R, W}), memory1 = call.empty({B, N, W}), usage1 = call.empty({B, N});
    const Tensor read_weights1 = call.empty({B, R, N}), saved_least_used = saved({T, B, R}, ScalarType::Int);
    const Tensor saved_memory = saved({kept, B, N, W}, call.arithmetic());
    const Tensor saved_read_weights = saved({kept, B, R, N}, call.arithmetic());
    GridForward a{};
    a.memory = call.in(memory, "memory", {B, N, W}), a.usage = call.in(usage, "usage", {B, N});
    a.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    a.memory1 = out(memory1), a.usage1 = out(usage1), a.read_weights1 = out(read_weights1);
    a.head = lrua_head(call, s, key, gate, beta, add);
    a.reads = out(reads), a.reads_row = R * W;
    if (save) {
        a.saved_least_used = out<int32_t>(saved_least_used), a.saved_memory = out(saved_memory);
        a.saved_read_weights = out(saved_read_weights);
    }
    if (!lrua_on_clusters(call, s, a)) grid_lrua_forward(call, s, a);
    return {reads, memory1, usage1, read_weights1, saved_least_used, saved_memory, saved_read_weights};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_sequence_backward_cuda(Tensor dreads, std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1,
                            Tensor memory, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                            std::optional<Tensor> add, std::optional<Tensor> lengths, Tensor saved_least_used,
                            Tensor saved_memory, Tensor saved_read_weights, bool shared, bool erase_all, double eps,
                            int64_t checkpoint_every) {
    Call call(key);
    const GridSizes s = lrua_sizes(call, read_weights, key, beta.has_value(), add.has_value(), lengths, shared,
                                   erase_all, 0, eps, checkpoint_every);
    const int64_t T = s.T, B = s.B, N = s.N, R = s.memory.R, W = s.memory.W, kept = s.copies();
    const Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N});
    const Tensor dkey = call.empty({T, B, R, W}), dgate = call.empty({T, B, R});
    const Tensor dbeta = beta ? call.empty({T, B, R}) : call.empty({0});
    const Tensor dadd = add ? call.empty({T, B, R, W}) : call.empty({0});
    GridBackward a{};
    a.memory = call.in(memory, "memory", {B, N, W});
    a.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    a.dmemory1 = call.in(dmemory1, "dmemory1", {B, N, W});
    a.dread_weights1 = call.in(dread_weights1, "dread_weights1", {B, R, N});
    a.dmemory = out(dmemory), a.dread_weights = out(dread_weights);
    a.head = lrua_head(call, s, key, gate, beta, add);
    a.dreads = call.in(dreads, "dreads", {T, B, R, W}), a.dreads_row = R * W;
    a.saved_least_used = call.in_int32(saved_least_used, "saved_least_used", {T, B, R});
    a.saved_memory = call.in_arith(saved_memory, "saved_memory", {kept, B, N, W});
    a.saved_read_weights = call.in_arith(saved_read_weights, "saved_read_weights", {kept, B, R, N});
    a.dkey = out(dkey), a.dgate = out(dgate), a.dbeta = beta ? out(dbeta) : nullptr;
    a.dadd = add ? out(dadd) : nullptr;
    if (!lrua_on_clusters(call, s, a)) grid_lrua_backward(call, s, a);
    return {dmemory, dread_weights, dkey, dgate, dbeta, dadd};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("lrua_sequence", TORCH_BOX(&mann::cuda::lrua_sequence_cuda));
    m.impl("lrua_sequence_backward", TORCH_BOX(&mann::cuda::lrua_sequence_backward_cuda));
}
