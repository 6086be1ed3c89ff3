// Read weights by cosine similarity: content_address and its backward.
#include "kernel.h"
#include "memory_backward.h"

namespace mann {

struct ContentAddressArgs {
    int64_t N, W, R;
    double eps;
    const void *memory; // [B, N, W]
    const void *key;    // [B, R, W]
    const void *beta;   // [B, R] or null
    void *read_weights; // [B, R, N] out
};

struct ContentAddressBackwardArgs {
    int64_t N, W, R;
    double eps;
    const void *dread_weights; // [B, R, N]
    const void *memory;        // [B, N, W]
    const void *key;           // [B, R, W]
    const void *beta;          // [B, R] or null
    const void *read_weights;  // [B, R, N]
    void *dmemory;             // [B, N, W] out
    void *dkey;                // [B, R, W] out
    void *dbeta;               // [B, R] out
};

// Scratch: memory [W, P], row_squares [P], weights [R, P], key [R, W].
inline int64_t content_address_scratch(int64_t P, int64_t W, int64_t R) { return W * P + P + R * P + R * W; }
// Scratch: memory and dmemory [W, P], row_squares and row_factor [P], weights, dweights and dots [R, P], key and dkey
// [R, W], dkey_factor [R].
inline int64_t content_address_backward_scratch(int64_t P, int64_t W, int64_t R) {
    return 2 * W * P + 2 * P + 3 * R * P + 2 * R * W + R;
}

namespace MANN_ISA {

template <typename S> void content_address(const ContentAddressArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const int64_t N = a.N, W = a.W, R = a.R, P = padded_slots(N);
    T *memory = static_cast<T *>(scratch), *row_squares = memory + W * P, *weights = row_squares + P,
      *key = weights + R * P;
    const S *beta = static_cast<const S *>(a.beta);
    for (int64_t b = begin; b < end; ++b) {
        take_memory(N, P, W, static_cast<const S *>(a.memory) + b * N * W, memory);
        convert(static_cast<const S *>(a.key) + b * R * W, key, R * W);
        match(P, W, memory, R, key, weights, row_squares);
        pad_row_squares(N, P, row_squares);
        for (int64_t h = 0; h < R; ++h) {
            softmax_of_cosine(N, P, weights + h * P, row_squares, square_sum(key + h * W, W),
                              beta ? to_arith(beta[b * R + h]) : T(1), T(a.eps), weights + h * P);
            convert(weights + h * P, static_cast<S *>(a.read_weights) + (b * R + h) * N, N);
        }
    }
}

template <typename S>
void content_address_backward(const ContentAddressBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const int64_t N = a.N, W = a.W, R = a.R, P = padded_slots(N);
    T *memory = static_cast<T *>(scratch), *dmemory = memory + W * P, *row_squares = dmemory + W * P;
    T *row_factor = row_squares + P, *weights = row_factor + P, *dweights = weights + R * P, *dots = dweights + R * P;
    T *key = dots + R * P, *dkey = key + R * W, *dkey_factor = dkey + R * W;
    const S *beta = static_cast<const S *>(a.beta);
    for (int64_t b = begin; b < end; ++b) {
        take_memory(N, P, W, static_cast<const S *>(a.memory) + b * N * W, memory);
        convert(static_cast<const S *>(a.key) + b * R * W, key, R * W);
        convert_rows(static_cast<const S *>(a.read_weights) + b * R * N, weights, R, N, P);
        convert_rows(static_cast<const S *>(a.dread_weights) + b * R * N, dweights, R, N, P);
        match(P, W, memory, R, key, dots, row_squares);
        pad_row_squares(N, P, row_squares);
        std::memset(row_factor, 0, P * sizeof(T));
        std::memset(dmemory, 0, W * P * sizeof(T));
        for (int64_t h = 0; h < R; ++h) {
            const T strength = beta ? to_arith(beta[b * R + h]) : T(1);
            const auto grad =
                softmax_of_cosine_backward(P, weights + h * P, dots + h * P, row_squares, square_sum(key + h * W, W),
                                           strength, T(a.eps), dweights + h * P, row_factor);
            static_cast<S *>(a.dbeta)[b * R + h] = to_storage<S>(grad.dbeta);
            dkey_factor[h] = grad.dkey_factor;
        }
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) {
            BackwardPass<T> pass{};
            pass.memory = memory, pass.dmemory = dmemory, pass.row_factor = row_factor;
            pass.ddots = dweights + h * P, pass.key = key + h * W, pass.dkey = dkey + h * W;
            backward_pass<T, heads, kMatch>(P, W, pass);
            std::memset(row_factor, 0, P * sizeof(T)); // counted once
        });
        for (int64_t h = 0; h < R; ++h)
            for (int64_t w = 0; w < W; ++w) dkey[h * W + w] -= dkey_factor[h] * key[h * W + w];
        convert(dkey, static_cast<S *>(a.dkey) + b * R * W, R * W);
        give_memory(N, P, W, dmemory, static_cast<S *>(a.dmemory) + b * N * W);
    }
}

} // namespace MANN_ISA
} // namespace mann

MANN_KERNEL(content_address, ContentAddressArgs)
MANN_KERNEL(content_address_backward, ContentAddressBackwardArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static Tensor content_address_cpu(Tensor memory, Tensor key, std::optional<Tensor> beta, double eps) {
    Call call(memory);
    STD_TORCH_CHECK(memory.dim() == 3 && key.dim() == 3, "content_address: memory and key must have three dimensions");
    const int64_t B = memory.size(0), N = memory.size(1), W = memory.size(2), R = key.size(1),
                  P = baseline::padded_slots(N);
    Tensor read_weights = call.empty({B, R, N});
    const ContentAddressArgs args{N,
                                  W,
                                  R,
                                  eps,
                                  call.in(memory, "memory", {B, N, W}),
                                  call.in(key, "key", {B, R, W}),
                                  call.in(beta, "beta", {B, R}),
                                  out(read_weights)};
    call.run(content_address_pick(), &args, B, content_address_scratch(P, W, R), double(B) * N * W * (R + 2));
    return read_weights;
}

static std::tuple<Tensor, Tensor, Tensor> content_address_backward_cpu(Tensor dread_weights, Tensor memory, Tensor key,
                                                                       std::optional<Tensor> beta, Tensor read_weights,
                                                                       double eps) {
    Call call(memory);
    STD_TORCH_CHECK(memory.dim() == 3 && key.dim() == 3, "content_address: memory and key must have three dimensions");
    const int64_t B = memory.size(0), N = memory.size(1), W = memory.size(2), R = key.size(1),
                  P = baseline::padded_slots(N);
    Tensor dmemory = call.empty({B, N, W}), dkey = call.empty({B, R, W}), dbeta = call.empty({B, R});
    const ContentAddressBackwardArgs args{N,
                                          W,
                                          R,
                                          eps,
                                          call.in(dread_weights, "dread_weights", {B, R, N}),
                                          call.in(memory, "memory", {B, N, W}),
                                          call.in(key, "key", {B, R, W}),
                                          call.in(beta, "beta", {B, R}),
                                          call.in(read_weights, "read_weights", {B, R, N}),
                                          out(dmemory),
                                          out(dkey),
                                          out(dbeta)};
    call.run(content_address_backward_pick(), &args, B, content_address_backward_scratch(P, W, R),
             double(B) * N * W * (3 * R + 4));
    return {dmemory, dkey, dbeta};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("content_address", TORCH_BOX(&mann::content_address_cpu));
    m.impl("content_address_backward", TORCH_BOX(&mann::content_address_backward_cpu));
}
#endif
