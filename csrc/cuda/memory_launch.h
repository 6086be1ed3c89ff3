// How the steps of the memory are launched: sizes, macros and blocks, for every operator that takes them.
#pragma once

#include "launch.h"

#include "memory_step.h"

namespace mann::cuda {

// How the rows of an example are shared out.
struct MemoryPlan {
    int vector, lanes;           // numbers of a load, lanes of a row
    int warps_apart;             // parts of a tile: 1, or one for each warp where a block has no room for their sums
    int tiles, tile_slots;       // of an example
    int choosers, chooser_slots; // blocks of memory_use, and the slots of each
    int readers;                 // and those that make the reads
    int parts() const { return tiles * warps_apart; }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rough instructions of a row in a warp's lanes, by the numbers of a load and the lanes of a row; `most`: numbers that
// a lane can keep of a head's vector, times heads.
inline int64_t row_cost(int64_t W, int64_t R, int64_t vector, int64_t lanes, int64_t most) {
    const int64_t columns = divide_up(W, vector * lanes) * vector;
    int64_t steps = 0;
    while ((int64_t(1) << steps) < lanes) ++steps;
    const int64_t cost = lanes * (columns * (3 * R + 1) + 4 * (columns / vector) + steps * (2 * R + 1) + 2 * R +
                                  20 * divide_up(R, lanes) + 10);
    const int64_t kept = (R + 1) * columns;
    return kept <= most ? cost : cost + cost * kept * kept / (most * most);
}

// rows: what goes in whole rows, and so decides how many numbers a load may have.
inline MemoryPlan memory_plan(const Call &call, int64_t B, int64_t N, int64_t W, int64_t R, int64_t most,
                              std::initializer_list<const void *> rows) {
    MemoryPlan plan{};
    const int64_t bytes = call.dtype() == ScalarType::BFloat16 ? 2 : call.arith_bytes();
    int64_t best = 0;
    for (const int vector : {4, 2, 1}) {
        const auto aligned = [&](const void *data) {
            return reinterpret_cast<uintptr_t>(data) % (vector * bytes) == 0;
        };
        if (W % vector != 0 || !std::all_of(rows.begin(), rows.end(), aligned)) continue;
        for (int lanes = 1; lanes <= 32; lanes *= 2) {
            const int64_t cost = row_cost(W, R, vector, lanes, most);
            if (plan.lanes == 0 || cost < best) best = cost, plan.vector = vector, plan.lanes = lanes;
        }
    }
    plan.warps_apart = kMemoryWarps * R * W * call.arith_bytes() > 32 << 10 ? kMemoryWarps : 1;
    const int64_t blocks = std::max<int64_t>(divide_up(2 * call.on().multiprocessors, std::max<int64_t>(B, 1)), 1);
    const auto split = [&](int64_t at_least, int &count, int &slots) {
        slots = int(divide_up(divide_up(N, blocks), at_least) * at_least);
        count = int(divide_up(N, slots));
    };
    split(2 * kMemoryWarps * (32 / plan.lanes), plan.tiles, plan.tile_slots);
    split(4 * kMemoryThreads, plan.choosers, plan.chooser_slots);
    plan.readers = int(divide_up(R * W, kReadColumns));
    return plan;
}
// What a lane keeps of each head forward (key, sum of reads) and backward (key, dreads, dkey).
constexpr int64_t kMostForward = 30, kMostBackward = 25;

struct MemoryOptions {
    int64_t W, R;
    bool beta, add, write;
    int64_t head() const { return R * W + R * (1 + beta) + R * W * add; }
};
inline Build memory_build(const Call &call, const char *source, const MemoryPlan &plan, const MemoryOptions &o) {
    Build build = call.build(source);
    build.set("MANN_W", o.W).set("MANN_R", o.R).set("MANN_VECTOR", plan.vector).set("MANN_LANES", plan.lanes);
    build.set("MANN_PARTS", plan.warps_apart);
    return build.set("MANN_BETA", o.beta).set("MANN_ADD", o.add).set("MANN_WRITE", o.write);
}
// memory_use has no rows: one kernel for everybody who has such heads.
inline Build use_build(const Call &call, const MemoryOptions &o) {
    MemoryPlan none{};
    none.vector = none.lanes = none.warps_apart = 1;
    return memory_build(call, "memory_use.cu", none, {o.W, o.R, o.beta, false, false});
}

inline MemorySizes memory_sizes(const MemoryPlan &plan, int64_t B, int64_t N, int64_t T, int64_t ring) {
    MemorySizes s{};
    s.B = B, s.N = N, s.T = int(T), s.ring = int(ring);
    s.tiles = plan.tiles, s.tile_slots = plan.tile_slots, s.parts = plan.parts();
    return s;
}

inline int64_t forward_part(const MemoryOptions &o) { return 2 * o.R + o.R * o.W; }
inline int64_t backward_part(const MemoryOptions &o) { return o.head() + o.R; }

// The first launch of a call follows nobody.
inline void launch_write(Call &call, const Build &build, const MemoryWrite<void> &a, bool follows = true) {
    call.launch(build, "memory_write", {a.sizes.B * a.sizes.tiles, kMemoryThreads, 1, 0, 1, follows}, a);
}
// For `steps` steps from that of the arguments on.
inline void launch_use(Call &call, const Build &build, const MemoryUse<void> &a, int64_t steps = 1,
                       bool follows = true) {
    call.launch(build, "memory_use", {a.sizes.B * (a.choosers + a.readers), kMemoryThreads, 1, 0, steps, follows}, a);
}
inline void launch_backward(Call &call, const Build &build, const MemoryBackward<void> &a) {
    call.launch(build, "memory_backward", {a.sizes.B * a.sizes.tiles, kMemoryThreads, 1, 0, 1, true}, a);
}
inline void launch_sum(Call &call, const Build &build, const MemoryOptions &o, const MemorySum<void> &a,
                       int64_t steps = 1) {
    call.launch(build, "memory_sum", {a.sizes.B * divide_up(o.head(), kReadColumns), kSumThreads, 1, 0, steps, true},
                a);
}

} // namespace mann::cuda
