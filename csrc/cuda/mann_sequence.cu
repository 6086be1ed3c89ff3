// A whole MANN episode on clusters of blocks: mann_sequence and its backward.
#include "launch.h"
#include "mann_sequence_plan.h"

namespace mann::cuda {

constexpr int kMostTile = 8;

static MannSizes mann_sizes(const Tensor &weight_hh, const Tensor &c, const Tensor &read_weights, const Tensor &steps,
                            bool write_add, bool key_strength, bool squash, int64_t checkpoint_every) {
    STD_TORCH_CHECK(weight_hh.dim() == 2 && c.dim() == 2 && read_weights.dim() == 3 && steps.dim() == 3,
                    "mann_sequence: wrong number of dimensions");
    STD_TORCH_CHECK(checkpoint_every > 0, "mann_sequence: checkpoint_every must be positive");
    const int64_t N = read_weights.size(2), R = read_weights.size(1), H = c.size(1);
    STD_TORCH_CHECK(R > 0 && R <= N && H > 0 && H < 1 << 20, "mann_sequence: want 0 < heads <= slots, hidden units");
    const int64_t W = (weight_hh.size(1) - H) / R;
    check_offsets(N, W, R);
    MannSizes s{};
    const int64_t most = int64_t(1) << 31;
    STD_TORCH_CHECK(steps.size(0) < most - 1 && steps.size(1) < most - kMostTile && (2 * R * W + 2 * R) < most,
                    "mann_sequence: too large for the CUDA kernel");
    s.T = int(steps.size(0)), s.B = int(steps.size(1)), s.checkpoint_every = int(std::min(checkpoint_every, most - 1));
    s.N = int(N), s.W = int(W), s.R = int(R), s.H = int(H);
    s.write_add = write_add, s.key_strength = key_strength, s.squash = squash;
    return s.with_tile(1);
}
template <typename T>
static StepShape<T> step_shape(const MannSizes &s, bool shared, bool erase_all, double decay, double eps) {
    return {MemoryShape::of(s.N, s.W, s.R, kThreads, true), shared, erase_all, T(decay), T(eps)};
}
static int64_t copies(int64_t T, int64_t checkpoint_every) { return T > 0 ? (T - 1) / checkpoint_every : 0; }

// Calls f with the blocks of a cluster as a constant.
template <typename S, typename F> static void with_tile(const Call &call, MannSizes &s, F &&f) {
    const MannPlan plan = mann_plan<S>(s, call.shared_limit());
    STD_TORCH_CHECK(plan.tile > 0,
                    "mann_sequence: the cluster kernels take no such sizes: a cluster of 8 blocks needs ",
                    std::max(plan.forward_bytes, plan.backward_bytes), " bytes of shared memory in each, there are ",
                    call.shared_limit());
    s = s.with_tile(plan.tile);
    if (plan.tile == 4) f(std::integral_constant<int, 4>());
    else f(std::integral_constant<int, 8>());
}
static int blocks(const MannSizes &s) { return round_up(s.B, s.tile); }

using Forward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

static Forward mann_sequence_cuda(Tensor gates_x, Tensor weight_hh, Tensor weight_head, Tensor bias_head, Tensor h,
                                  Tensor c, Tensor reads, Tensor memory, Tensor usage, Tensor read_weights,
                                  std::optional<Tensor> lengths, bool write_add, bool key_strength, bool squash,
                                  bool shared, bool erase_all, double decay, double eps, int64_t checkpoint_every,
                                  bool save) {
    Call call(gates_x);
    MannSizes s = mann_sizes(weight_hh, c, read_weights, gates_x, write_add, key_strength, squash, checkpoint_every);
    const int64_t T = s.T, B = s.B, H = s.H, N = s.N, W = s.W, R = s.R, K = s.recurrent, heads = s.head;
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
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        MannForwardArgs<S> a{};
        a.gates_x = call.in<S>(gates_x, "gates_x", {T, B, 4 * H});
        a.weight_hh = call.in<S>(weight_hh, "weight_hh", {4 * H, K});
        a.weight_head = call.in<S>(weight_head, "weight_head", {heads, H});
        a.bias_head = call.in<S>(bias_head, "bias_head", {heads});
        a.h = call.in<S>(h, "h", {B, H}), a.c = call.in<S>(c, "c", {B, H});
        a.reads = call.in<S>(reads, "reads", {B, R, W}), a.memory = call.in<S>(memory, "memory", {B, N, W});
        a.usage = call.in<S>(usage, "usage", {B, N});
        a.read_weights = call.in<S>(read_weights, "read_weights", {B, R, N});
        a.lengths = call.in<int64_t>(lengths, "lengths", {B});
        a.output = out<S>(output), a.h1 = out<S>(h1), a.c1 = out<S>(c1), a.reads1 = out<S>(reads1);
        a.memory1 = out<S>(memory1), a.usage1 = out<S>(usage1), a.read_weights1 = out<S>(read_weights1);
        if (save) {
            a.saved_gates = out<Arith<S>>(saved_gates), a.saved_least_used = out<int32_t>(saved_least_used);
            a.saved_c = out<Arith<S>>(saved_c), a.saved_memory = out<Arith<S>>(saved_memory);
            a.saved_read_weights = out<Arith<S>>(saved_read_weights);
        }
        a.step = step_shape<Arith<S>>(s, shared, erase_all, decay, eps);
        with_tile<S>(call, s, [&](auto tile) {
            a.sizes = s, a.layout = MannForwardLayout<S>::template of<tile>(s, a.step);
            const auto mann_sequence = &mann_sequence_fwd_kernel<S, tile>;
            if (B > 0) MANN_LAUNCH(mann_sequence, blocks(s), kThreads, tile, a.layout.bytes, call.stream(), a);
        });
    });
    return {output,        h1,           c1,
            reads1,        memory1,      usage1,
            read_weights1, saved_gates,  saved_least_used,
            saved_c,       saved_memory, saved_read_weights};
}

// [T, B, head], before bias and activations, in arithmetic type: what forward made of the same h.
static Tensor heads_again(const Tensor &output, const Tensor &weight_head, ScalarType arith, int64_t H) {
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
    MannSizes s = mann_sizes(weight_hh, c, read_weights, doutput, write_add, key_strength, squash, checkpoint_every);
    const int64_t T = s.T, B = s.B, H = s.H, N = s.N, W = s.W, R = s.R, K = s.recurrent, heads = s.head;
    const int64_t kept = copies(T, checkpoint_every), segment = std::min(T, checkpoint_every);
    const Tensor dgates = call.empty({T, B, 4 * H}), dhead = call.empty({T, B, heads});
    const Tensor dh = call.empty({B, H}), dc = call.empty({B, H}), dreads = call.empty({B, R, W});
    const Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N});
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        using A = Arith<S>;
        MannBackwardArgs<S> a{};
        a.doutput = call.in<S>(doutput, "doutput", {T, B, K});
        a.dh1 = call.in<S>(dh1, "dh1", {B, H}), a.dc1 = call.in<S>(dc1, "dc1", {B, H});
        a.dreads1 = call.in<S>(dreads1, "dreads1", {B, R, W});
        a.dmemory1 = call.in<S>(dmemory1, "dmemory1", {B, N, W});
        a.dread_weights1 = call.in<S>(dread_weights1, "dread_weights1", {B, R, N});
        a.weight_hh = call.in<S>(weight_hh, "weight_hh", {4 * H, K});
        a.weight_head = call.in<S>(weight_head, "weight_head", {heads, H});
        a.bias_head = call.in<S>(bias_head, "bias_head", {heads});
        a.c = call.in<S>(c, "c", {B, H}), a.memory = call.in<S>(memory, "memory", {B, N, W});
        a.read_weights = call.in<S>(read_weights, "read_weights", {B, R, N});
        a.lengths = call.in<int64_t>(lengths, "lengths", {B});
        call.in<S>(output, "output", {T, B, K});
        const Tensor raw_heads = heads_again(output, weight_head, call.arithmetic(), H);
        a.heads = call.in<A>(raw_heads, "heads", {T, B, heads});
        a.saved_gates = call.in<A>(saved_gates, "saved_gates", {T, B, 4 * H});
        a.saved_least_used = call.in<int32_t>(saved_least_used, "saved_least_used", {T, B, R});
        a.saved_c = call.in<A>(saved_c, "saved_c", {kept, B, H});
        a.saved_memory = call.in<A>(saved_memory, "saved_memory", {kept, B, N, W});
        a.saved_read_weights = call.in<A>(saved_read_weights, "saved_read_weights", {kept, B, R, N});
        a.dgates = out<S>(dgates), a.dhead = out<S>(dhead), a.dh = out<S>(dh), a.dc = out<S>(dc);
        a.dreads = out<S>(dreads), a.dmemory = out<S>(dmemory), a.dread_weights = out<S>(dread_weights);
        a.step = step_shape<A>(s, shared, erase_all, 0, eps);
        with_tile<S>(call, s, [&](auto tile) {
            a.sizes = s, a.layout = MannBackwardLayout<S>::template of<tile>(s, a.step);
            a.cells = call.scratch<A>(segment * B * H), a.records = call.scratch<A>(segment * B * a.record());
            a.restarts = call.scratch<A>(segment / kRestartEvery * B * a.step.memory());
            const auto mann_sequence_backward = &mann_sequence_bwd_kernel<S, tile>;
            if (B > 0) MANN_LAUNCH(mann_sequence_backward, blocks(s), kThreads, tile, a.layout.bytes, call.stream(), a);
        });
    });
    return {dgates, dhead, dh, dc, dreads, dmemory, dread_weights};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("mann_sequence", TORCH_BOX(&mann::cuda::mann_sequence_cuda));
    m.impl("mann_sequence_backward", TORCH_BOX(&mann::cuda::mann_sequence_backward_cuda));
}

// mann_plan for Python: the blocks of a cluster, 0 where the sizes do not fit; bytes [2] of shared memory of a block,
// forward and backward.
extern "C" __attribute__((visibility("default"))) int mann_sequence_plan(int bf16, int N, int W, int R, int H,
                                                                         int write_add, int key_strength,
                                                                         int64_t shared_limit, int64_t *bytes) {
    using namespace mann::cuda;
    MannSizes s{};
    s.N = N, s.W = W, s.R = R, s.H = H, s.write_add = write_add, s.key_strength = key_strength;
    const MannPlan plan = bf16 ? mann_plan<Bf16>(s, shared_limit) : mann_plan<float>(s, shared_limit);
    bytes[0] = plan.forward_bytes, bytes[1] = plan.backward_bytes;
    return plan.tile;
}
