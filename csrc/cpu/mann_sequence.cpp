// A whole MANN episode: LSTM controller, heads and memory. A part of the batch runs through all of time on one thread,
// so the threads never wait for each other; the products with the recurrent weights take all its examples at once.
#include "mann_backward.h"
#include "mann_forward.h"

namespace mann::MANN_ISA {

template <typename S> void pack_weights(const PackArgs &a, int64_t, int64_t, void *) {
    const S *source = static_cast<const S *>(a.source);
    Arith<S> *panels = static_cast<Arith<S> *>(a.panels);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, Bf16>)
        if (packs_pairs<S>()) return void(pack_pairs(source, a.transposed, a.K, a.N, panels));
#endif
    pack(source, a.transposed, a.K, a.N, panels);
}

} // namespace mann::MANN_ISA

MANN_KERNEL(pack_weights, PackArgs)
MANN_KERNEL(mann_sequence, MannSequenceArgs)
MANN_KERNEL(mann_sequence_backward, MannSequenceBackwardArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static MannOptions mann_options(const Tensor &weight_hh, const Tensor &c, const Tensor &read_weights,
                                const Tensor &steps, bool write_add, bool key_strength, bool squash, bool shared,
                                bool erase_all, double decay, double eps, int64_t checkpoint_every) {
    STD_TORCH_CHECK(weight_hh.dim() == 2 && c.dim() == 2 && read_weights.dim() == 3 && steps.dim() == 3,
                    "mann_sequence: wrong number of dimensions");
    STD_TORCH_CHECK(checkpoint_every > 0, "mann_sequence: checkpoint_every must be positive");
    const int64_t N = read_weights.size(2), R = read_weights.size(1), H = c.size(1);
    STD_TORCH_CHECK(R > 0 && R <= N && H > 0, "mann_sequence: want 0 < heads <= slots, and hidden units");
    const int64_t W = (weight_hh.size(1) - H) / R;
    return {{N, W, R, shared, erase_all, decay, eps},
            steps.size(0),
            steps.size(1),
            H,
            checkpoint_every,
            write_add,
            key_strength,
            squash};
}

// Packs a matrix [K, N] (or its transpose) for the products inside the time loop.
static const void *packed(Call &call, const void *source, bool transposed, int64_t K, int64_t N) {
    void *panels = call.scratch(packed_bound(K, N));
    const PackArgs args{source, transposed, K, N, panels};
    pack_weights_pick()(call.storage(), &args, 0, 1, nullptr);
    return panels;
}

using Forward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

static Forward mann_sequence_cpu(Tensor gates_x, Tensor weight_hh, Tensor weight_head, Tensor bias_head, Tensor h,
                                 Tensor c, Tensor reads, Tensor memory, Tensor usage, Tensor read_weights,
                                 std::optional<Tensor> lengths, bool write_add, bool key_strength, bool squash,
                                 bool shared, bool erase_all, double decay, double eps, int64_t checkpoint_every,
                                 bool save) {
    Call call(gates_x);
    const MannOptions o = mann_options(weight_hh, c, read_weights, gates_x, write_add, key_strength, squash, shared,
                                       erase_all, decay, eps, checkpoint_every);
    const int64_t T = o.T, B = o.B, H = o.H, N = o.step.N, W = o.step.W, R = o.step.R, P = baseline::padded_slots(N);
    const int64_t K = o.recurrent(), heads = o.head();
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

    MannSequenceArgs args{};
    args.options = o;
    args.gates_x = call.in(gates_x, "gates_x", {T, B, 4 * H});
    args.weight_hh = packed(call, call.in(weight_hh, "weight_hh", {4 * H, K}), true, K, 4 * H);
    args.weight_head = packed(call, call.in(weight_head, "weight_head", {heads, H}), true, H, heads);
    args.bias_head = call.in(bias_head, "bias_head", {heads});
    args.h = call.in(h, "h", {B, H});
    args.c = call.in(c, "c", {B, H});
    args.reads = call.in(reads, "reads", {B, R, W});
    args.memory = call.in(memory, "memory", {B, N, W});
    args.usage = call.in(usage, "usage", {B, N});
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.lengths = call.lengths(lengths, B);
    args.output = out(output), args.h1 = out(h1), args.c1 = out(c1), args.reads1 = out(reads1);
    args.memory1 = out(memory1), args.usage1 = out(usage1), args.read_weights1 = out(read_weights1);
    if (save) {
        args.saved_gates = out(saved_gates);
        args.saved_least_used = static_cast<int32_t *>(out(saved_least_used));
        args.saved_c = out(saved_c), args.saved_memory = out(saved_memory);
        args.saved_read_weights = out(saved_read_weights);
    }
    call.run(mann_sequence_pick(), &args, B, baseline::MannForwardPlan(o, P, std::min(B, baseline::kTogether)).size,
             double(T) * B * (K * 4 * H + N * W * (3 * R + 1)));
    return {output,        h1,           c1,
            reads1,        memory1,      usage1,
            read_weights1, saved_gates,  saved_least_used,
            saved_c,       saved_memory, saved_read_weights};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mann_sequence_backward_cpu(
    Tensor doutput, std::optional<Tensor> dh1, std::optional<Tensor> dc1, std::optional<Tensor> dreads1,
    std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1, Tensor weight_hh, Tensor weight_head,
    Tensor bias_head, Tensor c, Tensor memory, Tensor read_weights, std::optional<Tensor> lengths, Tensor output,
    Tensor saved_gates, Tensor saved_least_used, Tensor saved_c, Tensor saved_memory, Tensor saved_read_weights,
    bool write_add, bool key_strength, bool squash, bool shared, bool erase_all, double eps, int64_t checkpoint_every) {
    Call call(doutput);
    const MannOptions o = mann_options(weight_hh, c, read_weights, doutput, write_add, key_strength, squash, shared,
                                       erase_all, 0, eps, checkpoint_every);
    const int64_t T = o.T, B = o.B, H = o.H, N = o.step.N, W = o.step.W, R = o.step.R, P = baseline::padded_slots(N);
    const int64_t K = o.recurrent(), heads = o.head();
    const ScalarType arith = call.arithmetic();
    const int64_t kept = copies(T, checkpoint_every);
    const Tensor dgates = call.empty({T, B, 4 * H}), dhead = call.empty({T, B, heads});
    const Tensor dh = call.empty({B, H}), dc = call.empty({B, H}), dreads = call.empty({B, R, W});
    const Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N});

    MannSequenceBackwardArgs args{};
    args.options = o;
    args.doutput = call.in(doutput, "doutput", {T, B, K});
    args.dh1 = call.in(dh1, "dh1", {B, H});
    args.dc1 = call.in(dc1, "dc1", {B, H});
    args.dreads1 = call.in(dreads1, "dreads1", {B, R, W});
    args.dmemory1 = call.in(dmemory1, "dmemory1", {B, N, W});
    args.dread_weights1 = call.in(dread_weights1, "dread_weights1", {B, R, N});
    const void *head_rows = call.in(weight_head, "weight_head", {heads, H});
    args.weight_hh = packed(call, call.in(weight_hh, "weight_hh", {4 * H, K}), false, 4 * H, K);
    args.weight_head = packed(call, head_rows, false, heads, H);
    args.weight_head_forward = packed(call, head_rows, true, H, heads);
    args.bias_head = call.in(bias_head, "bias_head", {heads});
    args.c = call.in(c, "c", {B, H});
    args.memory = call.in(memory, "memory", {B, N, W});
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.lengths = call.lengths(lengths, B);
    args.output = call.in(output, "output", {T, B, K});
    args.saved_gates = call.in(saved_gates, arith, "saved_gates", {T, B, 4 * H});
    args.saved_least_used = call.slots(saved_least_used, "saved_least_used", {T, B, R}, N);
    args.saved_c = call.in(saved_c, arith, "saved_c", {kept, B, H});
    args.saved_memory = call.in(saved_memory, arith, "saved_memory", {kept, B, N, W});
    args.saved_read_weights = call.in(saved_read_weights, arith, "saved_read_weights", {kept, B, R, N});
    args.dgates = out(dgates), args.dhead = out(dhead), args.dh = out(dh), args.dc = out(dc), args.dreads = out(dreads);
    args.dmemory = out(dmemory), args.dread_weights = out(dread_weights);
    call.run(mann_sequence_backward_pick(), &args, B,
             baseline::MannBackwardPlan(o, P, std::min(B, baseline::kTogether)).size,
             double(T) * B * (K * 4 * H + N * W * (9 * R + 2)));
    return {dgates, dhead, dh, dc, dreads, dmemory, dread_weights};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("mann_sequence", TORCH_BOX(&mann::mann_sequence_cpu));
    m.impl("mann_sequence_backward", TORCH_BOX(&mann::mann_sequence_backward_cpu));
}
#endif
