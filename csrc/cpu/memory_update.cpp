// Erase and write: memory_update and its backward.
#include "plan.h"
#include "rows.h"

namespace mann {

struct MemoryUpdateArgs {
    StepOptions options;
    const void *memory;        // [B, N, W]
    const void *write_weights; // [B, R, N]
    const void *add;           // [B, R, W]
    const int32_t *least_used; // [B, R]
    void *new_memory;          // [B, N, W] out
};

struct MemoryUpdateBackwardArgs {
    StepOptions options;
    const void *dmemory;       // [B, N, W], of the new memory
    const void *write_weights; // [B, R, N]
    const void *add;           // [B, R, W]
    const int32_t *least_used; // [B, R]
    void *dmemory0;            // [B, N, W] out, of the old memory
    void *dwrite_weights;      // [B, R, N] out
    void *dadd;                // [B, R, W] out
};

namespace MANN_ISA {

struct MemoryUpdatePlan : Plan {
    int64_t block, write_weights, add; // a RowBlock, [R, P], [R, Q]
    int64_t dwrite_weights, dadd;      // [R, P], [R, Q]: backward alone
    explicit MemoryUpdatePlan(const StepOptions &o) {
        const int64_t P = padded_slots(o.N), Q = round_up(o.W, 16);
        block = take(16 * Q), write_weights = take(o.R * P), add = take(o.R * Q);
        dwrite_weights = take(o.R * P), dadd = take(o.R * Q);
    }
};

template <typename S> void memory_update(const MemoryUpdateArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t N = s.N, P = s.P, W = s.W, R = s.R, Q = padded_width<T>(W);
    const MemoryUpdatePlan plan(a.options);
    T *base = static_cast<T *>(scratch), *write_weights = base + plan.write_weights, *add = base + plan.add;
    RowBlock<T> rows{base + plan.block, N, P, W, Q};
    for (int64_t b = begin; b < end; ++b) {
        convert_rows(static_cast<const S *>(a.write_weights) + b * R * N, write_weights, R, N, P);
        convert_rows(static_cast<const S *>(a.add) + b * R * W, add, R, W, Q);
        const S *memory = static_cast<const S *>(a.memory) + b * N * W;
        S *new_memory = static_cast<S *>(a.new_memory) + b * N * W;
        rows.for_each([&] {
            rows.place(new_memory);
            rows.outer(R, write_weights, add, rows.erased(memory, a.least_used + b * R, s.erased()));
            rows.give(new_memory);
        });
    }
}

template <typename S>
void memory_update_backward(const MemoryUpdateBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t N = s.N, P = s.P, W = s.W, R = s.R, Q = padded_width<T>(W);
    const MemoryUpdatePlan plan(a.options);
    T *base = static_cast<T *>(scratch), *write_weights = base + plan.write_weights, *add = base + plan.add;
    T *dwrite_weights = base + plan.dwrite_weights, *dadd = base + plan.dadd;
    RowBlock<T> drows{base + plan.block, N, P, W, Q};
    for (int64_t b = begin; b < end; ++b) {
        convert_rows(static_cast<const S *>(a.write_weights) + b * R * N, write_weights, R, N, P);
        convert_rows(static_cast<const S *>(a.add) + b * R * W, add, R, W, Q);
        std::fill_n(dadd, R * Q, T(0));
        S *dmemory0 = static_cast<S *>(a.dmemory0) + b * N * W;
        drows.for_each([&] {
            drows.place(dmemory0);
            drows.take(static_cast<const S *>(a.dmemory) + b * N * W);
            drows.dot(R, add, dwrite_weights);
            drows.add_sums(R, write_weights, dadd);
            drows.erase(a.least_used + b * R, s.erased());
            drows.give(dmemory0);
        });
        take_rows(dwrite_weights, static_cast<S *>(a.dwrite_weights) + b * R * N, R, N, P);
        take_rows(dadd, static_cast<S *>(a.dadd) + b * R * W, R, W, Q);
    }
}

} // namespace MANN_ISA
} // namespace mann

MANN_KERNEL(memory_update, MemoryUpdateArgs)
MANN_KERNEL(memory_update_backward, MemoryUpdateBackwardArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static StepOptions update_options(const Tensor &memory, const Tensor &add, bool erase_all) {
    STD_TORCH_CHECK(memory.dim() == 3 && add.dim() == 3, "memory_update: memory and add must have three dimensions");
    return {memory.size(1), memory.size(2), add.size(1), false, erase_all, 0, 0};
}

static Tensor memory_update_cpu(Tensor memory, Tensor write_weights, Tensor add, Tensor least_used, bool erase_all) {
    Call call(memory);
    const StepOptions o = update_options(memory, add, erase_all);
    const int64_t B = memory.size(0);
    Tensor new_memory = call.empty({B, o.N, o.W});
    const MemoryUpdateArgs args{o,
                                call.in(memory, "memory", {B, o.N, o.W}),
                                call.in(write_weights, "write_weights", {B, o.R, o.N}),
                                call.in(add, "add", {B, o.R, o.W}),
                                call.slots(least_used, "least_used", {B, o.R}, o.N),
                                out(new_memory)};
    call.run(memory_update_pick(), &args, B, baseline::MemoryUpdatePlan(o).size, double(B) * o.N * o.W * (o.R + 2));
    return new_memory;
}

static std::tuple<Tensor, Tensor, Tensor> memory_update_backward_cpu(Tensor dmemory, Tensor write_weights, Tensor add,
                                                                     Tensor least_used, bool erase_all) {
    Call call(dmemory);
    const StepOptions o = update_options(dmemory, add, erase_all);
    const int64_t B = dmemory.size(0);
    Tensor dmemory0 = call.empty({B, o.N, o.W}), dwrite_weights = call.empty({B, o.R, o.N}),
           dadd = call.empty({B, o.R, o.W});
    const MemoryUpdateBackwardArgs args{o,
                                        call.in(dmemory, "dmemory", {B, o.N, o.W}),
                                        call.in(write_weights, "write_weights", {B, o.R, o.N}),
                                        call.in(add, "add", {B, o.R, o.W}),
                                        call.slots(least_used, "least_used", {B, o.R}, o.N),
                                        out(dmemory0),
                                        out(dwrite_weights),
                                        out(dadd)};
    call.run(memory_update_backward_pick(), &args, B, baseline::MemoryUpdatePlan(o).size,
             double(B) * o.N * o.W * (2 * o.R + 2));
    return {dmemory0, dwrite_weights, dadd};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("memory_update", TORCH_BOX(&mann::memory_update_cpu));
    m.impl("memory_update_backward", TORCH_BOX(&mann::memory_update_backward_cpu));
}
#endif
