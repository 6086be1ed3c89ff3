// Erase and write: memory_update and its backward.
#include "memory_backward.h"

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

// Scratch: memory [W, P], write_weights [R, P], add [R, W]; backward one more of each of the last two.
inline int64_t memory_update_scratch(int64_t P, int64_t W, int64_t R) { return W * P + 2 * R * P + 2 * R * W; }

namespace MANN_ISA {

template <typename S> void memory_update(const MemoryUpdateArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t N = s.N, P = s.P, W = s.W, R = s.R;
    T *memory = static_cast<T *>(scratch), *write_weights = memory + W * P, *add = write_weights + R * P;
    for (int64_t b = begin; b < end; ++b) {
        take_memory(N, P, W, static_cast<const S *>(a.memory) + b * N * W, memory);
        convert_rows(static_cast<const S *>(a.write_weights) + b * R * N, write_weights, R, N, P);
        convert(static_cast<const S *>(a.add) + b * R * W, add, R * W);
        for (int64_t i = 0; i < s.erased(); ++i)
            set_slot(s, memory, a.least_used[b * R + i], static_cast<const T *>(nullptr));
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) {
            write_and_match<T, heads, 0, false>(P, W, memory, write_weights + h * P, add + h * W, nullptr, nullptr,
                                                nullptr);
        });
        give_memory(N, P, W, memory, static_cast<S *>(a.new_memory) + b * N * W);
    }
}

template <typename S>
void memory_update_backward(const MemoryUpdateBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t N = s.N, P = s.P, W = s.W, R = s.R;
    T *dmemory = static_cast<T *>(scratch), *write_weights = dmemory + W * P, *dwrite_weights = write_weights + R * P;
    T *add = dwrite_weights + R * P, *dadd = add + R * W;
    for (int64_t b = begin; b < end; ++b) {
        take_memory(N, P, W, static_cast<const S *>(a.dmemory) + b * N * W, dmemory);
        convert_rows(static_cast<const S *>(a.write_weights) + b * R * N, write_weights, R, N, P);
        convert(static_cast<const S *>(a.add) + b * R * W, add, R * W);
        std::memset(dwrite_weights, 0, R * P * sizeof(T));
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) {
            BackwardPass<T> pass{};
            pass.dmemory = dmemory, pass.write_weights = write_weights + h * P, pass.add = add + h * W;
            pass.dwrite_weights = dwrite_weights + h * P, pass.dadd = dadd + h * W;
            backward_pass<T, heads, kWrite>(P, W, pass);
        });
        for (int64_t i = 0; i < s.erased(); ++i)
            set_slot(s, dmemory, a.least_used[b * R + i], static_cast<const T *>(nullptr));
        give_memory(N, P, W, dmemory, static_cast<S *>(a.dmemory0) + b * N * W);
        take_rows(dwrite_weights, static_cast<S *>(a.dwrite_weights) + b * R * N, R, N, P);
        convert(dadd, static_cast<S *>(a.dadd) + b * R * W, R * W);
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
    call.run(memory_update_pick(), &args, B, memory_update_scratch(baseline::padded_slots(o.N), o.W, o.R),
             double(B) * o.N * o.W * (o.R + 2));
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
    call.run(memory_update_backward_pick(), &args, B, memory_update_scratch(baseline::padded_slots(o.N), o.W, o.R),
             double(B) * o.N * o.W * (2 * o.R + 2));
    return {dmemory0, dwrite_weights, dadd};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("memory_update", TORCH_BOX(&mann::memory_update_cpu));
    m.impl("memory_update_backward", TORCH_BOX(&mann::memory_update_backward_cpu));
}
#endif
