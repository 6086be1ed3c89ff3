// A whole MANN episode: mann_sequence and its backward.
#include "launch.h" // first: what the structs of arguments need

#include "mann_on_grid.h"
#include "mann_plan.h"
#include "mann_sequence.h"

namespace mann::cuda {

constexpr int64_t kMost = 1 << 30;

static MannSizes mann_sizes(const Tensor &weight_hh, const Tensor &c, const Tensor &read_weights, const Tensor &steps,
                            bool write_add, bool key_strength) {
    STD_TORCH_CHECK(weight_hh.dim() == 2 && c.dim() == 2 && read_weights.dim() == 3 && steps.dim() == 3,
                    "mann_sequence: wrong number of dimensions");
    const int64_t N = read_weights.size(2), R = read_weights.size(1), H = c.size(1);
    STD_TORCH_CHECK(R > 0 && R <= N && H > 0, "mann_sequence: want 0 < heads <= slots, hidden units");
    const int64_t W = (weight_hh.size(1) - H) / R;
    check_offsets(N, W, R);
    STD_TORCH_CHECK(steps.size(0) < kMost && steps.size(1) < kMost, "mann_sequence: too large for the CUDA kernel");
    return {steps.size(0), steps.size(1), N, W, R, H, write_add, key_strength, 4};
}
static int64_t copies(int64_t T, int64_t checkpoint_every) { return T > 0 ? (T - 1) / checkpoint_every : 0; }

using Options = MannOptions;
static Build build_of(const Call &call, const char *source, const MannSizes &s, const MannPlan &plan, bool held,
                      int64_t shared_bytes, const Options &o) {
    return call.build(source)
        .set("MANN_N", s.N)
        .set("MANN_W", s.W)
        .set("MANN_R", s.R)
        .set("MANN_H", s.H)
        .set("MANN_THREADS", kRowThreads)
        .set("MANN_BLOCKS", plan.blocks)
        .set("MANN_EXAMPLES", plan.examples)
        .set("MANN_PARTS", plan.parts)
        .set("MANN_HELD", held)
        .set("MANN_TENSOR", plan.tensor)
        .set("MANN_SHARED_BYTES", shared_bytes)
        .set("MANN_WRITE_ADD", o.write_add)
        .set("MANN_KEY_STRENGTH", o.key_strength)
        .set("MANN_SQUASH", o.squash)
        .set("MANN_SOFTPLUS", 1)
        .set("MANN_SHARED_LRU", o.shared)
        .set("MANN_ERASE_ALL", o.erase_all);
}
static Grid grid_of(const MannSizes &s, const MannPlan &plan, int64_t shared_bytes) {
    const int64_t clusters = (s.B + plan.examples - 1) / plan.examples;
    return {clusters * plan.blocks, kRowThreads, plan.blocks, shared_bytes};
}
static MannPlan plan_of(const Call &call, MannSizes s) {
    s.number_bytes = call.arith_bytes();
    const ScalarType dtype = call.dtype();
    s.fragment = dtype == ScalarType::BFloat16 ? 4 : dtype == ScalarType::Float && allows_tf32() ? 8 : 0;
    const Device device = call.on();
    return mann_plan(s, device.capability >= 90 ? device.shared_bytes : 0, device.multiprocessors);
}

using Forward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

static Forward mann_sequence_cuda(Tensor gates_x, Tensor weight_hh, Tensor weight_head, Tensor bias_head, Tensor h,
                                  Tensor c, Tensor reads, Tensor memory, Tensor usage, Tensor read_weights,
                                  std::optional<Tensor> lengths, bool write_add, bool key_strength, bool squash,
                                  bool shared, bool erase_all, double decay, double eps, int64_t checkpoint_every,
                                  bool save) {
    Call call(gates_x);
    const MannSizes s = mann_sizes(weight_hh, c, read_weights, gates_x, write_add, key_strength);
    STD_TORCH_CHECK(checkpoint_every > 0, "mann_sequence: checkpoint_every must be positive");
    const int64_t T = s.T, B = s.B, H = s.H, N = s.N, W = s.W, R = s.R, K = s.recurrent(), heads = s.head();
    const auto saved = [&](Sizes sizes, ScalarType dtype) {
        return save ? call.empty(sizes, dtype) : call.empty({0}, dtype);
    };
    const ScalarType arith = call.arithmetic();
    const int64_t kept = copies(T, checkpoint_every);
    const Tensor output = call.empty({T, B, K}), h1 = call.empty({B, H}), c1 = call.empty({B, H});
    const Tensor reads1 = call.empty({B, R, W}), memory1 = call.empty({B, N, W}), usage1 = call.empty({B, N});
    const Tensor read_weights1 = call.empty({B, R, N});
    const Tensor saved_gates = saved({T, B, 4 * H}, arith), saved_least_used = saved({T, B, R}, ScalarType::Int);
    const Tensor saved_c = saved({kept, B, H}, arith), saved_memory = saved({kept, B, N, W}, arith);
    const Tensor saved_read_weights = saved({kept, B, R, N}, arith);
    MannForward<void> a{};
    a.steps = int(T), a.batch = int(B), a.checkpoint_every = int(std::min(checkpoint_every, kMost)), a.decay = decay,
    a.eps = eps;
    a.gates_x = call.in(gates_x, "gates_x", {T, B, 4 * H});
    a.weight_hh = call.in(weight_hh, "weight_hh", {4 * H, K});
    a.weight_head = call.in(weight_head, "weight_head", {heads, H});
    a.bias_head = call.in(bias_head, "bias_head", {heads});
    a.h = call.in(h, "h", {B, H}), a.c = call.in(c, "c", {B, H}), a.reads = call.in(reads, "reads", {B, R, W});
    a.memory = call.in(memory, "memory", {B, N, W}), a.usage = call.in(usage, "usage", {B, N});
    a.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    a.lengths = call.in_int64(lengths, "lengths", {B});
    a.output = out(output), a.h1 = out(h1), a.c1 = out(c1), a.reads1 = out(reads1), a.memory1 = out(memory1);
    a.usage1 = out(usage1), a.read_weights1 = out(read_weights1);
    if (save) {
        a.saved_gates = out(saved_gates), a.saved_least_used = out<int32_t>(saved_least_used);
        a.saved_c = out(saved_c), a.saved_memory = out(saved_memory), a.saved_read_weights = out(saved_read_weights);
    }
    const MannPlan plan = plan_of(call, s);
    const Options options{write_add, key_strength, squash, shared, erase_all};
    if (plan.blocks > 0) {
        const Build build =
            build_of(call, "mann_sequence_forward.cu", s, plan, plan.held_forward, plan.forward_bytes, options);
        call.launch(build, "mann_sequence_forward", grid_of(s, plan, plan.forward_bytes), a);
    } else {
        mann_on_grid(call, s, a, options);
    }
    return {output,        h1,           c1,
            reads1,        memory1,      usage1,
            read_weights1, saved_gates,  saved_least_used,
            saved_c,       saved_memory, saved_read_weights};
}

// [T, B, head], before bias and activations, in arithmetic type: what forward made of the same h.
static Tensor recompute_heads(const Tensor &output, const Tensor &weight_head, ScalarType arith, int64_t H) {
    const auto in_arith = [&](const Tensor &tensor) {
        return tensor.scalar_type() == arith ? tensor : torch::stable::to(tensor, arith);
    };
    const Tensor h = torch::stable::narrow(const_cast<Tensor &>(output), 2, 0, H);
    return torch::stable::matmul(in_arith(h), torch::stable::transpose(in_arith(weight_head), 0, 1));
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mann_sequence_backward_cuda(
    Tensor doutput, std::optional<Tensor> dh1, std::optional<Tensor> dc1, std::optional<Tensor> dreads1,
    std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1, Tensor weight_hh, Tensor weight_head,
    Tensor bias_head, Tensor c, Tensor memory, Tensor read_weights, std::optional<Tensor> lengths, Tensor output,
    Tensor saved_gates, Tensor saved_least_used, Tensor saved_c, Tensor saved_memory, Tensor saved_read_weights,
    bool write_add, bool key_strength, bool squash, bool shared, bool erase_all, double eps, int64_t checkpoint_every) {
    Call call(doutput);
    const MannSizes s = mann_sizes(weight_hh, c, read_weights, doutput, write_add, key_strength);
    STD_TORCH_CHECK(checkpoint_every > 0, "mann_sequence: checkpoint_every must be positive");
    const int64_t T = s.T, B = s.B, H = s.H, N = s.N, W = s.W, R = s.R, K = s.recurrent(), heads = s.head();
    const int64_t kept = copies(T, checkpoint_every), segment = std::min(T, checkpoint_every);
    const Tensor dgates = call.empty({T, B, 4 * H}), dhead = call.empty({T, B, heads});
    const Tensor dh = call.empty({B, H}), dc = call.empty({B, H}), dreads = call.empty({B, R, W});
    const Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N});
    MannBackward<void> a{};
    a.steps = int(T), a.batch = int(B), a.checkpoint_every = int(std::min(checkpoint_every, kMost)), a.eps = eps;
    a.doutput = call.in(doutput, "doutput", {T, B, K});
    a.dh1 = call.in(dh1, "dh1", {B, H}), a.dc1 = call.in(dc1, "dc1", {B, H});
    a.dreads1 = call.in(dreads1, "dreads1", {B, R, W}), a.dmemory1 = call.in(dmemory1, "dmemory1", {B, N, W});
    a.dread_weights1 = call.in(dread_weights1, "dread_weights1", {B, R, N});
    a.weight_hh = call.in(weight_hh, "weight_hh", {4 * H, K});
    a.weight_head = call.in(weight_head, "weight_head", {heads, H});
    a.bias_head = call.in(bias_head, "bias_head", {heads});
    a.c = call.in(c, "c", {B, H}), a.memory = call.in(memory, "memory", {B, N, W});
    a.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    a.lengths = call.in_int64(lengths, "lengths", {B});
    a.output = call.in(output, "output", {T, B, K});
    a.saved_gates = call.in_arith(saved_gates, "saved_gates", {T, B, 4 * H});
    a.saved_least_used = call.in_int32(saved_least_used, "saved_least_used", {T, B, R});
    a.saved_c = call.in_arith(saved_c, "saved_c", {kept, B, H});
    a.saved_memory = call.in_arith(saved_memory, "saved_memory", {kept, B, N, W});
    a.saved_read_weights = call.in_arith(saved_read_weights, "saved_read_weights", {kept, B, R, N});
    a.dgates = out(dgates), a.dhead = out(dhead), a.dh = out(dh), a.dc = out(dc), a.dreads = out(dreads);
    a.dmemory = out(dmemory), a.dread_weights = out(dread_weights);
    const MannPlan plan = plan_of(call, s);
    const Options options{write_add, key_strength, squash, shared, erase_all};
    if (plan.blocks == 0) {
        mann_on_grid(call, s, a, options);
        return {dgates, dhead, dh, dc, dreads, dmemory, dread_weights};
    }
    const Tensor raw_heads = recompute_heads(output, weight_head, call.arithmetic(), H);
    a.heads = call.in_arith(raw_heads, "heads", {T, B, heads});
    a.cells = call.scratch(segment * B * H), a.weights = call.scratch(segment * B * N * ((R + 3) / 4 * 4));
    a.overwritten = call.scratch(segment * B * R * W), a.restarts = call.scratch(segment / kRestartEvery * B * N * W);
    const Build build =
        build_of(call, "mann_sequence_backward.cu", s, plan, plan.held_backward, plan.backward_bytes, options);
    call.launch(build, "mann_sequence_backward", grid_of(s, plan, plan.backward_bytes), a);
    return {dgates, dhead, dh, dc, dreads, dmemory, dread_weights};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("mann_sequence", TORCH_BOX(&mann::cuda::mann_sequence_cuda));
    m.impl("mann_sequence_backward", TORCH_BOX(&mann::cuda::mann_sequence_backward_cuda));
}
