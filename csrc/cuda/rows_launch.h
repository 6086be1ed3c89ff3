// How kernels are launched that have the rows of an example in the registers of the blocks of a cluster (rows.h).
#pragma once

#include "grid_sequence.h"
#include "mann_plan.h"

namespace mann::cuda {

// 0 blocks where the memory of an example is too large for a cluster.
inline MannPlan rows_plan(const Call &call, const GridSizes &s) {
    const Device device = call.on();
    const MannSizes sizes{s.T, s.B, s.N, s.memory.W, s.memory.R, 0, s.memory.add, s.memory.beta, call.arith_bytes()};
    return lrua_plan(sizes, device.capability >= 90 ? device.shared_bytes : 0, device.multiprocessors);
}
template <typename Args>
void launch_rows(Call &call, const char *source, const char *kernel, const GridSizes &s, const MannPlan &plan,
                 int64_t shared_bytes, const Args &args) {
    Build build = call.build(source);
    build.set("MANN_N", s.N).set("MANN_W", s.memory.W).set("MANN_R", s.memory.R).set("MANN_PARTS", plan.parts);
    build.set("MANN_THREADS", kRowThreads).set("MANN_SHARED_BYTES", shared_bytes).set("MANN_WRITE_ADD", s.memory.add);
    build.set("MANN_KEY_STRENGTH", s.memory.beta).set("MANN_SQUASH", 0).set("MANN_SOFTPLUS", 0);
    build.set("MANN_SHARED_LRU", s.shared).set("MANN_ERASE_ALL", s.erase_all);
    call.launch(build, kernel, {s.B * plan.parts, kRowThreads, plan.parts, shared_bytes}, args);
}

} // namespace mann::cuda
