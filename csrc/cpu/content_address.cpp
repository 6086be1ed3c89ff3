// Read weights by cosine similarity: content_address and its backward.
#include "plan.h"
#include "rows.h"

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

namespace MANN_ISA {

struct ContentAddressPlan : Plan {
    int64_t block, key, beta, row_squares, weights;                       // a RowBlock, [R, Q], [R], [P], [R, P]
    int64_t dblock, dkey, dkey_factor, dbeta, row_factor, dots, dweights; // backward alone: the same, and [P], [R, P]
    ContentAddressPlan(int64_t N, int64_t W, int64_t R) {
        const int64_t P = padded_slots(N), Q = round_up(W, 16);
        block = take(16 * Q), key = take(R * Q), beta = take(R), row_squares = take(P), weights = take(R * P);
        dblock = take(16 * Q), dkey = take(R * Q), dkey_factor = take(R), dbeta = take(R);
        row_factor = take(P), dots = take(R * P), dweights = take(R * P);
    }
};

template <typename S> void content_address(const ContentAddressArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const int64_t N = a.N, W = a.W, R = a.R, P = padded_slots(N), Q = padded_width<T>(W);
    const MemoryShape<T> s{N, P, W, R, false, false, 0, T(a.eps)};
    const ContentAddressPlan plan(N, W, R);
    T *base = static_cast<T *>(scratch), *key = base + plan.key, *row_squares = base + plan.row_squares;
    T *weights = base + plan.weights, *beta = a.beta ? base + plan.beta : nullptr;
    RowBlock<T> rows{base + plan.block, N, P, W, Q};
    for (int64_t b = begin; b < end; ++b) {
        convert_rows(static_cast<const S *>(a.key) + b * R * W, key, R, W, Q);
        rows.for_each([&] {
            rows.look(static_cast<const S *>(a.memory) + b * N * W);
            rows.dot(R, key, weights);
            rows.square(row_squares);
        });
        if (beta) convert(static_cast<const S *>(a.beta) + b * R, beta, R);
        address(s, weights, row_squares, key, Q, beta, weights);
        take_rows(weights, static_cast<S *>(a.read_weights) + b * R * N, R, N, P);
    }
}

template <typename S>
void content_address_backward(const ContentAddressBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const int64_t N = a.N, W = a.W, R = a.R, P = padded_slots(N), Q = padded_width<T>(W);
    const MemoryShape<T> s{N, P, W, R, false, false, 0, T(a.eps)};
    const ContentAddressPlan plan(N, W, R);
    T *base = static_cast<T *>(scratch), *key = base + plan.key, *row_squares = base + plan.row_squares;
    T *weights = base + plan.weights, *dots = base + plan.dots, *dweights = base + plan.dweights;
    T *dkey = base + plan.dkey, *dkey_factor = base + plan.dkey_factor, *row_factor = base + plan.row_factor;
    T *dbeta = base + plan.dbeta, *beta = a.beta ? base + plan.beta : nullptr;
    RowBlock<T> rows{base + plan.block, N, P, W, Q}, drows{base + plan.dblock, N, P, W, Q};
    for (int64_t b = begin; b < end; ++b) {
        const S *memory = static_cast<const S *>(a.memory) + b * N * W;
        S *dmemory = static_cast<S *>(a.dmemory) + b * N * W;
        convert_rows(static_cast<const S *>(a.key) + b * R * W, key, R, W, Q);
        convert_rows(static_cast<const S *>(a.read_weights) + b * R * N, weights, R, N, P);
        convert_rows(static_cast<const S *>(a.dread_weights) + b * R * N, dweights, R, N, P);
        rows.for_each([&] {
            rows.look(memory);
            rows.dot(R, key, dots);
            rows.square(row_squares);
        });
        pad_row_squares(N, P, row_squares);
        std::fill_n(dkey, R * Q, T(0));
        if (beta) convert(static_cast<const S *>(a.beta) + b * R, beta, R);
        address_backward(s, weights, dots, row_squares, key, Q, beta, dweights, row_factor, dkey_factor, dbeta);
        convert(dbeta, static_cast<S *>(a.dbeta) + b * R, R);
        rows.for_each([&] {
            rows.look(memory);
            rows.add_sums(R, dweights, dkey);
            drows.n0 = rows.n0;
            drows.place(dmemory);
            drows.outer(R, dweights, key, nullptr, row_factor, rows.data);
            drows.give(dmemory);
        });
        for (int64_t h = 0; h < R; ++h)
            for (int64_t q = 0; q < Q; ++q) dkey[h * Q + q] -= dkey_factor[h] * key[h * Q + q];
        take_rows(dkey, static_cast<S *>(a.dkey) + b * R * W, R, W, Q);
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
    const int64_t B = memory.size(0), N = memory.size(1), W = memory.size(2), R = key.size(1);
    Tensor read_weights = call.empty({B, R, N});
    const ContentAddressArgs args{N,
                                  W,
                                  R,
                                  eps,
                                  call.in(memory, "memory", {B, N, W}),
                                  call.in(key, "key", {B, R, W}),
                                  call.in(beta, "beta", {B, R}),
                                  out(read_weights)};
    call.run(content_address_pick(), &args, B, baseline::ContentAddressPlan(N, W, R).size, double(B) * N * W * (R + 2));
    return read_weights;
}

static std::tuple<Tensor, Tensor, Tensor> content_address_backward_cpu(Tensor dread_weights, Tensor memory, Tensor key,
                                                                       std::optional<Tensor> beta, Tensor read_weights,
                                                                       double eps) {
    Call call(memory);
    STD_TORCH_CHECK(memory.dim() == 3 && key.dim() == 3, "content_address: memory and key must have three dimensions");
    const int64_t B = memory.size(0), N = memory.size(1), W = memory.size(2), R = key.size(1);
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
    call.run(content_address_backward_pick(), &args, B, baseline::ContentAddressPlan(N, W, R).size,
             double(B) * N * W * (3 * R + 4));
    return {dmemory, dkey, dbeta};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("content_address", TORCH_BOX(&mann::content_address_cpu));
    m.impl("content_address_backward", TORCH_BOX(&mann::content_address_backward_cpu));
}
#endif
