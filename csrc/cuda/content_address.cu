// Read weights by cosine similarity: content_address and its backward, a block for each example. What a block works on
// stands in shared memory as far as that has room.
#include "address.h"
#include "launch.h"

namespace mann::cuda {

constexpr int kThreads = 256;

// What is in shared memory: the memory and the numbers per slot; these alone, and the memory is read where it is;
// nothing, and the numbers per slot are in global memory too.
enum class Staged { kMemory, kNumbers, kNothing };

template <typename S> struct ContentAddressArgs {
    MemoryShape shape;
    Arith<S> eps;
    const S *memory, *key, *beta; // [B, N, W], [B, R, W], [B, R] or null
    S *read_weights;              // [B, R, N] out
    Arith<S> *workspace;          // [B, ContentAddressPlan::size] where nothing is in shared memory
};

template <typename S> struct ContentAddressBackwardArgs {
    MemoryShape shape;
    Arith<S> eps;
    const S *dread_weights, *memory, *key; // [B, R, N], [B, N, W], [B, R, W]
    const S *beta, *read_weights;          // [B, R] or null, [B, R, N]
    S *dmemory, *dkey, *dbeta;             // [B, N, W], [B, R, W], [B, R] out
    Arith<S> *workspace;                   // [B, ContentAddressBackwardPlan::size] where nothing is in shared memory
};

struct ContentAddressPlan : Plan {
    int64_t memory, key, beta, squares, weights;

    MANN_BOTH ContentAddressPlan(const MemoryShape &s, Staged staged)
        : memory(take(staged == Staged::kMemory ? s.memory() : 0)), key(take(s.words())), beta(take(s.R)),
          squares(take(s.N)), weights(take(s.slots())) {}
};
struct ContentAddressBackwardPlan : ContentAddressPlan {
    int64_t dweights, dots, dkey_factor, sums;

    MANN_BOTH ContentAddressBackwardPlan(const MemoryShape &s, Staged staged)
        : ContentAddressPlan(s, staged), dweights(take(s.slots())), dots(take(s.slots())), dkey_factor(take(s.R)),
          sums(take(column_parts(s.N, s.W, kThreads) * s.words())) {}
};

// The memory of example b, where the block reads it from.
template <Staged staged, typename S, typename T>
MANN_INLINE auto take_memory(const S *memory, const MemoryShape &s, int64_t b, [[maybe_unused]] T *target) {
    memory += b * s.N * s.W;
    if constexpr (staged == Staged::kMemory) {
        take_rows(memory, s.N, s.W, s.stride, target);
        return static_cast<const T *>(target);
    } else {
        return memory;
    }
}
// Key and strength of example b to where they are wanted; returns the strength, or null where it is 1.
template <typename S, typename Args, typename T>
MANN_INLINE const T *take_key(const Args &a, const MemoryShape &s, int64_t b, T *key, T *beta) {
    take_heads(a.key + b * s.R * s.W, s.R, s.W, key);
    for_each(a.beta ? s.R : 0, [&](int h) { beta[h] = to_arith(a.beta[b * s.R + h]); });
    return a.beta ? beta : nullptr;
}

template <typename S, Staged staged>
__global__ void __launch_bounds__(kThreads, 1) content_address_kernel(const ContentAddressArgs<S> a) {
    using T = Arith<S>;
    MANN_DYNAMIC_SHARED(bytes);
    const MemoryShape s = a.shape;
    const ContentAddressPlan plan(s, staged);
    const int64_t b = blockIdx.x;
    T *base = staged == Staged::kNothing ? a.workspace + b * plan.size : reinterpret_cast<T *>(bytes);
    const auto *memory = take_memory<staged>(a.memory, s, b, base + plan.memory);
    T *key = base + plan.key, *squares = base + plan.squares, *weights = base + plan.weights;
    const T *beta = take_key<S>(a, s, b, key, base + plan.beta);
    __syncthreads();
    for_rows(s.N, s.lanes,
             [&](int n, int lane, bool exists) { match_row(s, memory, key, n, lane, exists, weights, squares); });
    __syncthreads();
    for_heads(s.R, [&](int h) { softmax_of_cosine(s, h, key, beta, a.eps, squares, weights); });
    __syncthreads();
    give_heads(weights, s.R, s.N, a.read_weights + b * s.R * s.N);
}

template <typename S, Staged staged>
__global__ void __launch_bounds__(kThreads, 1) content_address_backward_kernel(const ContentAddressBackwardArgs<S> a) {
    using T = Arith<S>;
    MANN_DYNAMIC_SHARED(bytes);
    const MemoryShape s = a.shape;
    const ContentAddressBackwardPlan plan(s, staged);
    const int64_t b = blockIdx.x;
    T *base = staged == Staged::kNothing ? a.workspace + b * plan.size : reinterpret_cast<T *>(bytes);
    const auto *memory = take_memory<staged>(a.memory, s, b, base + plan.memory);
    T *key = base + plan.key, *squares = base + plan.squares, *weights = base + plan.weights;
    T *dweights = base + plan.dweights, *dots = base + plan.dots, *dkey_factor = base + plan.dkey_factor;
    T *sums = base + plan.sums;
    const T *beta = take_key<S>(a, s, b, key, base + plan.beta);
    take_heads(a.read_weights + b * s.R * s.N, s.R, s.N, weights);
    take_heads(a.dread_weights + b * s.R * s.N, s.R, s.N, dweights);
    __syncthreads();
    for_rows(s.N, s.lanes,
             [&](int n, int lane, bool exists) { match_row(s, memory, key, n, lane, exists, dots, squares); });
    __syncthreads();
    for_heads(s.R, [&](int h) {
        const auto grad = softmax_of_cosine_backward(s, h, key, beta, a.eps, squares, weights, dweights, dots);
        if (lane_of_warp() != 0) return;
        dkey_factor[h] = grad.dkey_factor;
        a.dbeta[b * s.R + h] = to_storage<S>(grad.dbeta);
    });
    __syncthreads();
    // ddots (x) key, less what the norms take off
    for_numbers(s.N, s.W, [&](int n, int w, int i) {
        T dm = -row_factor(s, dots, n) * to_arith(memory[n * s.stride + w]);
        for (int g = 0; g < s.groups(); ++g) dm += dot(load_heads(dweights, g * s.N + n), load_heads(key, g * s.W + w));
        a.dmemory[b * s.N * s.W + i] = to_storage<S>(dm);
    });
    const int parts = column_parts(s.N, s.W, kThreads);
    for_columns(s.W, parts, [&](int w, int part) {
        for (int g = 0; g < s.groups(); ++g)
            store_heads(sums + part * s.words(), g * s.W + w, sum_column(s, memory, dweights, g, w, part, parts));
    });
    __syncthreads();
    for_numbers(s.R, s.W, [&](int h, int w, int i) {
        const T dkey = sum_parts(s, sums, parts, h, w) - dkey_factor[h] * key[of_head(h, w, s.W)];
        a.dkey[b * s.R * s.W + i] = to_storage<S>(dkey);
    });
}

static void check_sizes(const Tensor &memory, const Tensor &key) {
    STD_TORCH_CHECK(memory.dim() == 3 && key.dim() == 3, "content_address: memory and key must have three dimensions");
    check_offsets(memory.size(1), memory.size(2), key.size(1));
}

// Decides what is in shared memory and calls launch(staged, bytes of it), staged a constant. A memory that is read once
// stays where it is: forward, up to four heads.
template <typename Plan, typename S, typename Args, typename F>
static void with_staged(Call &call, Args &a, const Tensor &memory, bool read_once, F &&launch) {
    const int64_t B = memory.size(0), N = memory.size(1), W = memory.size(2);
    const int R = a.shape.R;
    const auto with = [&](auto staged) {
        a.shape = MemoryShape::of(N, W, R, kThreads, staged == Staged::kMemory);
        const int64_t size = Plan(a.shape, staged).size;
        if (staged == Staged::kNothing) a.workspace = call.scratch<Arith<S>>(B * size);
        else if (!call.fits_shared(size)) return false;
        if (B > 0) launch(staged, a.workspace ? 0 : size * int64_t(sizeof(Arith<S>)));
        return true;
    };
    if (!read_once && with(std::integral_constant<Staged, Staged::kMemory>())) return;
    if (with(std::integral_constant<Staged, Staged::kNumbers>())) return;
    with(std::integral_constant<Staged, Staged::kNothing>());
}

static Tensor content_address_cuda(Tensor memory, Tensor key, std::optional<Tensor> beta, double eps) {
    Call call(memory);
    check_sizes(memory, key);
    const int64_t B = memory.size(0), N = memory.size(1), W = memory.size(2), R = key.size(1);
    Tensor read_weights = call.empty({B, R, N});
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        ContentAddressArgs<S> a{};
        a.shape.R = int(R), a.eps = eps;
        a.memory = call.in<S>(memory, "memory", {B, N, W});
        a.key = call.in<S>(key, "key", {B, R, W});
        a.beta = call.in<S>(beta, "beta", {B, R});
        a.read_weights = out<S>(read_weights);
        with_staged<ContentAddressPlan, S>(call, a, memory, R <= kHeadGroup, [&](auto staged, int64_t bytes) {
            const auto content_address = &content_address_kernel<S, staged>;
            MANN_LAUNCH(content_address, B, kThreads, 1, bytes, call.stream(), a);
        });
    });
    return read_weights;
}

static std::tuple<Tensor, Tensor, Tensor> content_address_backward_cuda(Tensor dread_weights, Tensor memory, Tensor key,
                                                                        std::optional<Tensor> beta, Tensor read_weights,
                                                                        double eps) {
    Call call(memory);
    check_sizes(memory, key);
    const int64_t B = memory.size(0), N = memory.size(1), W = memory.size(2), R = key.size(1);
    Tensor dmemory = call.empty({B, N, W}), dkey = call.empty({B, R, W}), dbeta = call.empty({B, R});
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        ContentAddressBackwardArgs<S> a{};
        a.shape.R = int(R), a.eps = eps;
        a.dread_weights = call.in<S>(dread_weights, "dread_weights", {B, R, N});
        a.memory = call.in<S>(memory, "memory", {B, N, W});
        a.key = call.in<S>(key, "key", {B, R, W});
        a.beta = call.in<S>(beta, "beta", {B, R});
        a.read_weights = call.in<S>(read_weights, "read_weights", {B, R, N});
        a.dmemory = out<S>(dmemory), a.dkey = out<S>(dkey), a.dbeta = out<S>(dbeta);
        with_staged<ContentAddressBackwardPlan, S>(call, a, memory, false, [&](auto staged, int64_t bytes) {
            const auto content_address_backward = &content_address_backward_kernel<S, staged>;
            MANN_LAUNCH(content_address_backward, B, kThreads, 1, bytes, call.stream(), a);
        });
    });
    return {dmemory, dkey, dbeta};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("content_address", TORCH_BOX(&mann::cuda::content_address_cuda));
    m.impl("content_address_backward", TORCH_BOX(&mann::cuda::content_address_backward_cuda));
}
