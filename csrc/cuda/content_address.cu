// Read weights by cosine similarity: content_address and its backward, a block for each example. The memory stays where
// it is; the numbers per slot stand in shared memory, or where that is too small in global memory.
#include "address.h"
#include "launch.h"

namespace mann::cuda {

constexpr int kThreads = 256;

template <typename S> struct ContentAddressArgs {
    MemoryShape shape;
    Arith<S> eps;
    const S *memory, *key, *beta; // [B, N, W], [B, R, W], [B, R] or null
    S *read_weights;              // [B, R, N] out
    Arith<S> *workspace;          // [B, ContentAddressPlan::size] where that is not in shared memory
};

template <typename S> struct ContentAddressBackwardArgs {
    MemoryShape shape;
    Arith<S> eps;
    const S *dread_weights, *memory, *key; // [B, R, N], [B, N, W], [B, R, W]
    const S *beta, *read_weights;          // [B, R] or null, [B, R, N]
    S *dmemory, *dkey, *dbeta;             // [B, N, W], [B, R, W], [B, R] out
    Arith<S> *workspace;                   // [B, ContentAddressBackwardPlan::size] where that is not in shared memory
};

struct ContentAddressPlan : Plan {
    int64_t key, beta, squares, weights;

    MANN_BOTH explicit ContentAddressPlan(const MemoryShape &s)
        : key(take(s.words())), beta(take(s.R)), squares(take(s.N)), weights(take(s.slots())) {}
};
struct ContentAddressBackwardPlan : ContentAddressPlan {
    int64_t dweights, dots, dkey_factor, sums;

    MANN_BOTH explicit ContentAddressBackwardPlan(const MemoryShape &s)
        : ContentAddressPlan(s), dweights(take(s.slots())), dots(take(s.slots())), dkey_factor(take(s.R)),
          sums(take(column_parts(s.N, s.W, kThreads) * s.words())) {}
};

// Key and strength of example b to where they are wanted; returns the strength, or null where it is 1.
template <typename S, typename Args, typename T>
MANN_INLINE const T *take_key(const Args &a, const MemoryShape &s, int64_t b, T *key, T *beta) {
    take_heads(a.key + b * s.R * s.W, s.R, s.W, key);
    for_each(a.beta ? s.R : 0, [&](int h) { beta[h] = to_arith(a.beta[b * s.R + h]); });
    return a.beta ? beta : nullptr;
}

template <typename S, bool in_shared>
__global__ void __launch_bounds__(kThreads, 1) content_address_kernel(const ContentAddressArgs<S> a) {
    using T = Arith<S>;
    MANN_DYNAMIC_SHARED(bytes);
    const MemoryShape s = a.shape;
    const ContentAddressPlan plan(s);
    const int64_t b = blockIdx.x;
    const S *memory = a.memory + b * s.N * s.W;
    T *base = in_shared ? reinterpret_cast<T *>(bytes) : a.workspace + b * plan.size;
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

// Row n of the gradient of memory: ddots (x) key, less what the norms take off.
template <typename S, typename T>
MANN_INLINE void dmemory_of_row(const MemoryShape &s, const S *memory, const T *key, const T *ddots, const T *dots,
                                int n, int lane, S *dmemory) {
    const T shrink = row_factor(s, dots, n);
    for (int w = lane; w < s.W; w += s.lanes) {
        T dm = -shrink * to_arith(memory[n * s.W + w]);
        for (int g = 0; g < s.groups(); ++g) dm += dot(load_heads(ddots, g * s.N + n), load_heads(key, g * s.W + w));
        dmemory[n * s.W + w] = to_storage<S>(dm);
    }
}

template <typename S, bool in_shared>
__global__ void __launch_bounds__(kThreads, 1) content_address_backward_kernel(const ContentAddressBackwardArgs<S> a) {
    using T = Arith<S>;
    MANN_DYNAMIC_SHARED(bytes);
    const MemoryShape s = a.shape;
    const ContentAddressBackwardPlan plan(s);
    const int64_t b = blockIdx.x;
    const S *memory = a.memory + b * s.N * s.W;
    T *base = in_shared ? reinterpret_cast<T *>(bytes) : a.workspace + b * plan.size;
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
    for_rows(s.N, s.lanes, [&](int n, int lane, bool exists) {
        if (exists) dmemory_of_row(s, memory, key, dweights, dots, n, lane, a.dmemory + b * s.N * s.W);
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

static Tensor content_address_cuda(Tensor memory, Tensor key, std::optional<Tensor> beta, double eps) {
    Call call(memory);
    check_sizes(memory, key);
    const int64_t B = memory.size(0), N = memory.size(1), W = memory.size(2), R = key.size(1);
    Tensor read_weights = call.empty({B, R, N});
    call.with_storage([&](auto zero) {
        using S = decltype(zero);
        ContentAddressArgs<S> a{};
        a.shape = MemoryShape::of(N, W, R, kThreads, false), a.eps = eps;
        a.memory = call.in<S>(memory, "memory", {B, N, W});
        a.key = call.in<S>(key, "key", {B, R, W});
        a.beta = call.in<S>(beta, "beta", {B, R});
        a.read_weights = out<S>(read_weights);
        const int64_t size = ContentAddressPlan(a.shape).size;
        if (!call.fits_shared(size)) a.workspace = call.scratch<Arith<S>>(B * size);
        const int64_t bytes = a.workspace ? 0 : size * int64_t(sizeof(Arith<S>));
        const auto content_address = a.workspace ? &content_address_kernel<S, false> : &content_address_kernel<S, true>;
        if (B > 0) MANN_LAUNCH(content_address, B, kThreads, 1, bytes, call.stream(), a);
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
        a.shape = MemoryShape::of(N, W, R, kThreads, false), a.eps = eps;
        a.dread_weights = call.in<S>(dread_weights, "dread_weights", {B, R, N});
        a.memory = call.in<S>(memory, "memory", {B, N, W});
        a.key = call.in<S>(key, "key", {B, R, W});
        a.beta = call.in<S>(beta, "beta", {B, R});
        a.read_weights = call.in<S>(read_weights, "read_weights", {B, R, N});
        a.dmemory = out<S>(dmemory), a.dkey = out<S>(dkey), a.dbeta = out<S>(dbeta);
        const int64_t size = ContentAddressBackwardPlan(a.shape).size;
        if (!call.fits_shared(size)) a.workspace = call.scratch<Arith<S>>(B * size);
        const int64_t bytes = a.workspace ? 0 : size * int64_t(sizeof(Arith<S>));
        const auto content_address_backward =
            a.workspace ? &content_address_backward_kernel<S, false> : &content_address_backward_kernel<S, true>;
        if (B > 0) MANN_LAUNCH(content_address_backward, B, kThreads, 1, bytes, call.stream(), a);
    });
    return {dmemory, dkey, dbeta};
}

} // namespace mann::cuda

STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m) {
    m.impl("content_address", TORCH_BOX(&mann::cuda::content_address_cuda));
    m.impl("content_address_backward", TORCH_BOX(&mann::cuda::content_address_backward_cuda));
}
