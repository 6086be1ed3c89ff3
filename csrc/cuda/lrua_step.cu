// One step of the memory: lrua_step and its backward, a block for each example. What a block works on stands in shared
// memory, or where that is too small in global memory.
#include "launch.h"
#include "step.h"

namespace mann::cuda {

constexpr int kThreads = 256;

template <typename S> struct LruaStepArgs {
    StepShape<Arith<S>> shape;
    const S *memory, *usage, *read_weights;      // [B, N, W], [B, N], [B, R, N]
    const S *key, *gate, *beta, *add;            // [B, R, W], [B, R], [B, R] or null, [B, R, W] or null
    S *reads, *memory1, *usage1, *read_weights1; // [B, R, W], [B, N, W], [B, N], [B, R, N] out
    int32_t *least_used;                         // [B, R] out
    Arith<S> *workspace;                         // [B, LruaStepPlan::size] where that is not in shared memory
};

template <typename S> struct LruaStepBackwardArgs {
    StepShape<Arith<S>> shape;
    const S *dreads, *dmemory1, *dread_weights1; // [B, R, W], [B, N, W] or null, [B, R, N] or null
    const S *memory, *read_weights;              // [B, N, W], [B, R, N]
    const S *key, *gate, *beta, *add;            // [B, R, W], [B, R], [B, R] or null, [B, R, W] or null
    const int32_t *least_used;                   // [B, R]
    S *dmemory, *dread_weights;                  // [B, N, W], [B, R, N] out
    S *dkey, *dgate, *dbeta, *dadd; // [B, R, W], [B, R], [B, R], [B, R, W] out; the last two as beta and add
    Arith<S> *workspace;            // [B, LruaStepBackwardPlan::size] where that is not in shared memory
};

// The inputs of a step that go by heads, as arithmetic numbers: offsets.
struct HeadsPlan {
    int64_t key, add, gate, beta, slots;

    MANN_BOTH HeadsPlan(const MemoryShape &s, Plan &plan)
        : key(plan.take(s.words())), add(plan.take(s.words())), gate(plan.take(s.R)), beta(plan.take(s.R)),
          slots(plan.take(s.R)) {}
};
struct LruaStepPlan : Plan {
    int64_t memory, usage, previous, weights;
    HeadsPlan heads;
    int64_t scratch;

    MANN_BOTH explicit LruaStepPlan(const MemoryShape &s)
        : memory(take(s.memory())), usage(take(s.N)), previous(take(s.slots())), weights(take(s.slots())),
          heads(s, *this), scratch(take(step_forward_scratch(s, kThreads))) {}
};
struct LruaStepBackwardPlan : Plan {
    int64_t memory, dmemory, previous, weights, dweights;
    HeadsPlan heads;
    int64_t dreads, dgate, dbeta, scratch;

    MANN_BOTH explicit LruaStepBackwardPlan(const MemoryShape &s)
        : memory(take(s.memory())), dmemory(take(s.memory())), previous(take(s.slots())), weights(take(s.slots())),
          dweights(take(s.slots())), heads(s, *this), dreads(take(s.words())), dgate(take(s.R)), dbeta(take(s.R)),
          scratch(take(step_backward_scratch(s, kThreads))) {}
};

// The inputs of example b that go by heads; returns the least-used slots, which the caller fills.
template <typename S, typename Args, typename T, typename Step>
MANN_INLINE int32_t *take_inputs(const Args &a, const HeadsPlan &plan, int64_t b, T *base, Step &step) {
    const MemoryShape &s = a.shape;
    T *key = base + plan.key, *add = a.add ? base + plan.add : key, *gate = base + plan.gate, *beta = base + plan.beta;
    take_heads(a.key + b * s.R * s.W, s.R, s.W, key);
    if (a.add) take_heads(a.add + b * s.R * s.W, s.R, s.W, add);
    for_each(s.R, [&](int h) {
        gate[h] = sigmoid(to_arith(a.gate[b * s.R + h]));
        if (a.beta) beta[h] = to_arith(a.beta[b * s.R + h]);
    });
    int32_t *slots = reinterpret_cast<int32_t *>(base + plan.slots);
    step.key = key, step.add = add, step.gate = gate, step.beta = a.beta ? beta : nullptr, step.least_used = slots;
    return slots;
}

template <typename S, bool in_shared>
__global__ void __launch_bounds__(kThreads, 1) lrua_step_kernel(const LruaStepArgs<S> a) {
    using T = Arith<S>;
    MANN_DYNAMIC_SHARED(bytes);
    const StepShape<T> s = a.shape;
    const LruaStepPlan plan(s);
    const int64_t b = blockIdx.x;
    T *base = in_shared ? reinterpret_cast<T *>(bytes) : a.workspace + b * plan.size;
    StepForward<T> step{};
    step.memory = base + plan.memory, step.usage = base + plan.usage, step.weights = base + plan.weights;
    step.scratch = base + plan.scratch;
    T *previous = base + plan.previous;
    step.previous = previous;
    take_rows(a.usage + b * s.N, 1, s.N, s.N, step.usage);
    take_rows(a.memory + b * s.N * s.W, s.N, s.W, s.stride, step.memory);
    take_heads(a.read_weights + b * s.R * s.N, s.R, s.N, previous);
    int32_t *slots = take_inputs<S>(a, plan.heads, b, base, step);
    __syncthreads();
    if (warp_of_block() == 0) choose_slots(step.usage, s.N, s.R, slots);
    __syncthreads();
    step_forward(s, step, [&](int h, int w, T read) { a.reads[(b * s.R + h) * s.W + w] = to_storage<S>(read); });
    __syncthreads();
    give_rows(step.usage, 1, s.N, s.N, a.usage1 + b * s.N);
    give_rows(step.memory, s.N, s.W, s.stride, a.memory1 + b * s.N * s.W);
    give_heads(step.weights, s.R, s.N, a.read_weights1 + b * s.R * s.N);
    for_each(s.R, [&](int h) { a.least_used[b * s.R + h] = slots[h]; });
}

template <typename S, bool in_shared>
__global__ void __launch_bounds__(kThreads, 1) lrua_step_backward_kernel(const LruaStepBackwardArgs<S> a) {
    using T = Arith<S>;
    MANN_DYNAMIC_SHARED(bytes);
    const StepShape<T> s = a.shape;
    const LruaStepBackwardPlan plan(s);
    const int64_t b = blockIdx.x, cells = b * s.N * s.W, words = b * s.R * s.W, weights = b * s.R * s.N;
    T *base = in_shared ? reinterpret_cast<T *>(bytes) : a.workspace + b * plan.size;
    T *previous = base + plan.previous, *dreads = base + plan.dreads;
    StepForward<T> again{};
    again.memory = base + plan.memory, again.weights = base + plan.weights, again.previous = previous;
    again.scratch = base + plan.scratch;
    StepBackward<T> step{};
    step.memory = again.memory, step.dmemory = base + plan.dmemory, step.weights = again.weights;
    step.dweights = base + plan.dweights, step.previous = previous, step.dreads = dreads;
    step.dgate = base + plan.dgate, step.dbeta = base + plan.dbeta, step.scratch = again.scratch;
    take_rows(a.memory + cells, s.N, s.W, s.stride, again.memory);
    take_rows(a.dmemory1 ? a.dmemory1 + cells : nullptr, s.N, s.W, s.stride, step.dmemory);
    take_heads(a.read_weights + weights, s.R, s.N, previous);
    take_heads(a.dread_weights1 ? a.dread_weights1 + weights : nullptr, s.R, s.N, step.dweights);
    take_heads(a.dreads + words, s.R, s.W, dreads);
    int32_t *slots = take_inputs<S>(a, plan.heads, b, base, again);
    // whoever calls, no slot is outside memory
    for_each(s.R, [&](int h) { slots[h] = max(0, min(a.least_used[b * s.R + h], s.N - 1)); });
    step.key = again.key, step.add = again.add, step.gate = again.gate, step.beta = again.beta;
    step.least_used = slots;
    __syncthreads();
    write_and_address(s, again);
    __syncthreads();
    step_backward<false>(s, step, [&](int h, int w, T dkey, T dadd) {
        const int64_t at = words + h * s.W + w;
        a.dkey[at] = to_storage<S>(a.add ? dkey : dkey + dadd);
        if (a.add) a.dadd[at] = to_storage<S>(dadd);
    });
    __syncthreads();
    give_rows(step.dmemory, s.N, s.W, s.stride, a.dmemory + cells);
    give_heads(step.dweights, s.R, s.N, a.dread_weights + weights);
    for_each(s.R, [&](int h) {
        a.dgate[b * s.R + h] = to_storage<S>(step.dgate[h]);
        if (a.beta) a.dbeta[b * s.R + h] = to_storage<S>(step.dbeta[h]);
    });
}

// Both directions: where the numbers of a block stand, and how.
template <typename Plan, typename Args>
static int64_t place(Call &call, Args &a, const Tensor &read_weights, const Tensor &key, bool shared, bool erase_all,
                     double decay, double eps) {
    using T = decltype(a.shape.eps);
    STD_TORCH_CHECK(read_weights.dim() == 3 && key.dim() == 3, "lrua_step: wrong number of dimensions");
    const int64_t B = read_weights.size(0), N = read_weights.size(2), W = key.size(2), R = key.size(1);
    check_offsets(N, W, R);
    STD_TORCH_CHECK(R <= N, "lrua_step: more heads than slots");
    const auto shape = [&](bool in_shared) {
        return StepShape<T>{MemoryShape::of(N, W, R, kThreads, in_shared), shared, erase_all, T(decay), T(eps)};
    };
    a.shape = shape(true);
    const int64_t size = Plan(a.shape).size;
    if (call.fits_shared(size)) return size * int64_t(sizeof(T));
    a.shape = shape(false);
    a.workspace = call.scratch<T>(B * Plan(a.shape).size);
    return 0;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_step_cuda(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
               std::optional<Tensor> add, bool shared, bool erase_all, double decay, double eps) {
    Call call(memory);
    const int64_t B = read_weights.size(0), N = read_weights.size(2), W = key.size(2), R = key.size(1);
    Tensor reads = call.empty({B, R, W}), memory1 = call.empty({B, N, W}), usage1 = call.empty({B, N});
    Tensor read_weights1 = call.empty({B, R, N}), least_used = call.empty({B, R}, ScalarType::Int);
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        LruaStepArgs<S> a{};
        const int64_t bytes = place<LruaStepPlan>(call, a, read_weights, key, shared, erase_all, decay, eps);
        a.memory = call.in<S>(memory, "memory", {B, N, W});
        a.usage = call.in<S>(usage, "usage", {B, N});
        a.read_weights = call.in<S>(read_weights, "read_weights", {B, R, N});
        a.key = call.in<S>(key, "key", {B, R, W});
        a.gate = call.in<S>(gate, "gate", {B, R});
        a.beta = call.in<S>(beta, "beta", {B, R});
        a.add = call.in<S>(add, "add", {B, R, W});
        a.reads = out<S>(reads), a.memory1 = out<S>(memory1), a.usage1 = out<S>(usage1);
        a.read_weights1 = out<S>(read_weights1), a.least_used = out<int32_t>(least_used);
        const auto lrua_step = a.workspace ? &lrua_step_kernel<S, false> : &lrua_step_kernel<S, true>;
        if (B > 0) MANN_LAUNCH(lrua_step, B, kThreads, 1, bytes, call.stream(), a);
    });
    return {reads, memory1, usage1, read_weights1, least_used};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_step_backward_cuda(Tensor dreads, std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1,
                        Tensor memory, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                        std::optional<Tensor> add, Tensor least_used, bool shared, bool erase_all, double eps) {
    Call call(memory);
    const int64_t B = read_weights.size(0), N = read_weights.size(2), W = key.size(2), R = key.size(1);
    Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N}), dkey = call.empty({B, R, W});
    Tensor dgate = call.empty({B, R}), dbeta = beta ? call.empty({B, R}) : call.empty({0});
    Tensor dadd = add ? call.empty({B, R, W}) : call.empty({0});
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        LruaStepBackwardArgs<S> a{};
        const int64_t bytes = place<LruaStepBackwardPlan>(call, a, read_weights, key, shared, erase_all, 0, eps);
        a.dreads = call.in<S>(dreads, "dreads", {B, R, W});
        a.dmemory1 = call.in<S>(dmemory1, "dmemory1", {B, N, W});
        a.dread_weights1 = call.in<S>(dread_weights1, "dread_weights1", {B, R, N});
        a.memory = call.in<S>(memory, "memory", {B, N, W});
        a.read_weights = call.in<S>(read_weights, "read_weights", {B, R, N});
        a.key = call.in<S>(key, "key", {B, R, W});
        a.gate = call.in<S>(gate, "gate", {B, R});
        a.beta = call.in<S>(beta, "beta", {B, R});
        a.add = call.in<S>(add, "add", {B, R, W});
        a.least_used = call.in<int32_t>(least_used, "least_used", {B, R});
        a.dmemory = out<S>(dmemory), a.dread_weights = out<S>(dread_weights), a.dkey = out<S>(dkey);
        a.dgate = out<S>(dgate), a.dbeta = out<S>(dbeta), a.dadd = out<S>(dadd);
        const auto lrua_step_backward =
            a.workspace ? &lrua_step_backward_kernel<S, false> : &lrua_step_backward_kernel<S, true>;
        if (B > 0) MANN_LAUNCH(lrua_step_backward, B, kThreads, 1, bytes, call.stream(), a);
    });
    return {dmemory, dread_weights, dkey, dgate, dbeta, dadd};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("lrua_step", TORCH_BOX(&mann::cuda::lrua_step_cuda));
    m.impl("lrua_step_backward", TORCH_BOX(&mann::cuda::lrua_step_backward_cuda));
}
