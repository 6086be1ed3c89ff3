// One step of the memory: lrua_step and its backward, a sequence of length 1, of which only the chosen slots are kept.
#include "lrua_sequence.h"

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static StepOptions step_options(const Tensor &read_weights, const Tensor &key, bool shared, bool erase_all,
                                double decay, double eps) {
    STD_TORCH_CHECK(read_weights.dim() == 3 && key.dim() == 3, "lrua_step: wrong number of dimensions");
    const int64_t N = read_weights.size(2), R = read_weights.size(1);
    STD_TORCH_CHECK(R <= N, "lrua_step: more heads than slots");
    return {N, key.size(2), R, shared, erase_all, decay, eps};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_step_cpu(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
              std::optional<Tensor> add, bool shared, bool erase_all, double decay, double eps) {
    Call call(memory);
    const StepOptions o = step_options(read_weights, key, shared, erase_all, decay, eps);
    const int64_t B = read_weights.size(0), N = o.N, W = o.W, R = o.R, P = baseline::padded_slots(N);
    Tensor reads = call.empty({B, R, W}), memory1 = call.empty({B, N, W}), usage1 = call.empty({B, N});
    Tensor read_weights1 = call.empty({B, R, N}), least_used = call.empty({B, R}, ScalarType::Int);
    LruaSequenceArgs args{};
    args.options = o, args.T = 1, args.B = B, args.checkpoint_every = 1;
    args.memory = call.in(memory, "memory", {B, N, W});
    args.usage = call.in(usage, "usage", {B, N});
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.key = call.in(key, "key", {B, R, W});
    args.gate = call.in(gate, "gate", {B, R});
    args.beta = call.in(beta, "beta", {B, R});
    args.add = call.in(add, "add", {B, R, W});
    args.reads = out(reads), args.new_memory = out(memory1), args.new_usage = out(usage1);
    args.new_read_weights = out(read_weights1), args.saved_least_used = static_cast<int32_t *>(out(least_used));
    call.run(lrua_sequence_pick(), &args, B, baseline::LruaForwardPlan(o, P).size, double(B) * N * W * (3 * R + 3));
    return {reads, memory1, usage1, read_weights1, least_used};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_step_backward_cpu(Tensor dreads, std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1,
                       Tensor memory, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                       std::optional<Tensor> add, Tensor least_used, bool shared, bool erase_all, double eps) {
    Call call(memory);
    const StepOptions o = step_options(read_weights, key, shared, erase_all, 0, eps);
    const int64_t B = read_weights.size(0), N = o.N, W = o.W, R = o.R, P = baseline::padded_slots(N);
    Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N}), dkey = call.empty({B, R, W});
    Tensor dgate = call.empty({B, R}), dbeta = beta ? call.empty({B, R}) : call.empty({0});
    Tensor dadd = add ? call.empty({B, R, W}) : call.empty({0});
    LruaSequenceBackwardArgs args{};
    args.options = o, args.T = 1, args.B = B, args.checkpoint_every = 1;
    args.dreads = call.in(dreads, "dreads", {B, R, W});
    args.dnew_memory = call.in(dmemory1, "dmemory1", {B, N, W});
    args.dnew_read_weights = call.in(dread_weights1, "dread_weights1", {B, R, N});
    args.memory = call.in(memory, "memory", {B, N, W});
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.key = call.in(key, "key", {B, R, W});
    args.gate = call.in(gate, "gate", {B, R});
    args.beta = call.in(beta, "beta", {B, R});
    args.add = call.in(add, "add", {B, R, W});
    args.saved_least_used = call.slots(least_used, "least_used", {B, R}, N);
    args.dmemory = out(dmemory), args.dread_weights = out(dread_weights), args.dkey = out(dkey),
    args.dgate = out(dgate);
    args.dbeta = out(dbeta), args.dadd = out(dadd);
    call.run(lrua_sequence_backward_pick(), &args, B, baseline::LruaBackwardPlan(o, P, 1, 1).size,
             double(B) * N * W * (9 * R + 4));
    return {dmemory, dread_weights, dkey, dgate, dbeta, dadd};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("lrua_step", TORCH_BOX(&mann::lrua_step_cpu));
    m.impl("lrua_step_backward", TORCH_BOX(&mann::lrua_step_backward_cpu));
}
#endif
