// Least-used slots and gated write weights: lrua_write_weights and its backward.
#include "memory_backward.h"

namespace mann {

struct LruaWriteWeightsArgs {
    StepOptions options;
    const void *usage;        // [B, N]
    const void *read_weights; // [B, R, N]
    const void *gate;         // [B, R], before the sigmoid
    void *write_weights;      // [B, R, N] out
    int32_t *least_used;      // [B, R] out
};

struct LruaWriteWeightsBackwardArgs {
    StepOptions options;
    const void *dwrite_weights; // [B, R, N]
    const void *read_weights;   // [B, R, N]
    const void *gate;           // [B, R], before the sigmoid
    const int32_t *least_used;  // [B, R]
    void *dread_weights;        // [B, R, N] out
    void *dgate;                // [B, R] out
};

// Scratch: usage [P], two of [R, P], two of [R]; backward three of [R, P], two of [R].
inline int64_t lrua_write_weights_scratch(int64_t P, int64_t R) { return P + 3 * R * P + 2 * R; }

namespace MANN_ISA {

template <typename S>
void lrua_write_weights(const LruaWriteWeightsArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    T *usage = static_cast<T *>(scratch), *read_weights = usage + s.P, *write_weights = read_weights + s.R * s.P;
    T *gate = write_weights + s.R * s.P;
    for (int64_t b = begin; b < end; ++b) {
        int32_t *least_used = a.least_used + b * s.R;
        convert(static_cast<const S *>(a.usage) + b * s.N, usage, s.N);
        convert_rows(static_cast<const S *>(a.read_weights) + b * s.R * s.N, read_weights, s.R, s.N, s.P);
        sigmoid_of(static_cast<const S *>(a.gate) + b * s.R, gate, s.R);
        least_used_slots(usage, s.N, s.R, least_used);
        interpolate(s, read_weights, gate, least_used, write_weights);
        take_rows(write_weights, static_cast<S *>(a.write_weights) + b * s.R * s.N, s.R, s.N, s.P);
    }
}

template <typename S>
void lrua_write_weights_backward(const LruaWriteWeightsBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    T *dwrite_weights = static_cast<T *>(scratch), *read_weights = dwrite_weights + s.R * s.P;
    T *dread_weights = read_weights + s.R * s.P, *gate = dread_weights + s.R * s.P, *dgate = gate + s.R;
    for (int64_t b = begin; b < end; ++b) {
        convert_rows(static_cast<const S *>(a.dwrite_weights) + b * s.R * s.N, dwrite_weights, s.R, s.N, s.P);
        convert_rows(static_cast<const S *>(a.read_weights) + b * s.R * s.N, read_weights, s.R, s.N, s.P);
        sigmoid_of(static_cast<const S *>(a.gate) + b * s.R, gate, s.R);
        interpolate_backward(s, dwrite_weights, read_weights, gate, a.least_used + b * s.R, dread_weights, dgate);
        take_rows(dread_weights, static_cast<S *>(a.dread_weights) + b * s.R * s.N, s.R, s.N, s.P);
        convert(dgate, static_cast<S *>(a.dgate) + b * s.R, s.R);
    }
}

} // namespace MANN_ISA
} // namespace mann

MANN_KERNEL(lrua_write_weights, LruaWriteWeightsArgs)
MANN_KERNEL(lrua_write_weights_backward, LruaWriteWeightsBackwardArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static StepOptions write_options(const Tensor &read_weights, bool shared) {
    STD_TORCH_CHECK(read_weights.dim() == 3, "lrua_write_weights: read_weights must have three dimensions");
    const int64_t N = read_weights.size(2), R = read_weights.size(1);
    STD_TORCH_CHECK(R <= N, "lrua_write_weights: more heads than slots");
    return {N, 0, R, shared, false, 0, 0};
}

static std::tuple<Tensor, Tensor> lrua_write_weights_cpu(Tensor usage, Tensor read_weights, Tensor gate, bool shared) {
    Call call(read_weights);
    const StepOptions o = write_options(read_weights, shared);
    const int64_t B = read_weights.size(0);
    Tensor write_weights = call.empty({B, o.R, o.N}), least_used = call.empty({B, o.R}, ScalarType::Int);
    const LruaWriteWeightsArgs args{o,
                                    call.in(usage, "usage", {B, o.N}),
                                    call.in(read_weights, "read_weights", {B, o.R, o.N}),
                                    call.in(gate, "gate", {B, o.R}),
                                    out(write_weights),
                                    static_cast<int32_t *>(out(least_used))};
    call.run(lrua_write_weights_pick(), &args, B, lrua_write_weights_scratch(baseline::padded_slots(o.N), o.R),
             double(B) * o.N * o.R);
    return {write_weights, least_used};
}

static std::tuple<Tensor, Tensor> lrua_write_weights_backward_cpu(Tensor dwrite_weights, Tensor read_weights,
                                                                  Tensor gate, Tensor least_used, bool shared) {
    Call call(read_weights);
    const StepOptions o = write_options(read_weights, shared);
    const int64_t B = read_weights.size(0);
    Tensor dread_weights = call.empty({B, o.R, o.N}), dgate = call.empty({B, o.R});
    const LruaWriteWeightsBackwardArgs args{o,
                                            call.in(dwrite_weights, "dwrite_weights", {B, o.R, o.N}),
                                            call.in(read_weights, "read_weights", {B, o.R, o.N}),
                                            call.in(gate, "gate", {B, o.R}),
                                            call.slots(least_used, "least_used", {B, o.R}, o.N),
                                            out(dread_weights),
                                            out(dgate)};
    call.run(lrua_write_weights_backward_pick(), &args, B, lrua_write_weights_scratch(baseline::padded_slots(o.N), o.R),
             double(B) * o.N * o.R);
    return {dread_weights, dgate};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("lrua_write_weights", TORCH_BOX(&mann::lrua_write_weights_cpu));
    m.impl("lrua_write_weights_backward", TORCH_BOX(&mann::lrua_write_weights_backward_cpu));
}
#endif
